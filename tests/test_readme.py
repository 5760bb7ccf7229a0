"""What the README and docs/ say: the tree is what git knows, links lead somewhere, commands exist and run."""

import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from cuboid.trainer.runlog import read_metrics

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("benchmarks/*.md")),
]


def block(heading: str) -> str:
    """The first fenced block below a heading of the README."""
    found = re.search(rf"^## {re.escape(heading)}\n.*?^```\w+\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found, f"no block below {heading!r}"
    return found[1]


def commands() -> list[str]:
    """Every command of the README's ```sh blocks, in order, without its comment."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = [line.split("  #")[0].strip() for text in blocks for line in text.splitlines()]
    return [line for line in lines if line]


def test_the_tree_has_one_phrase_for_every_file() -> None:
    told: dict[str, str] = {}
    starred, folder = set(), ""
    for line in block("The tree").splitlines():
        found = re.fullmatch(r"( *)(\S+?)(/?)( \*)?(?: {2,}(\S.*))?", line)
        assert found, f"not a line of the tree: {line!r}"
        indent, name, slash, star, phrase = found.groups()
        assert phrase, f"{name} has no phrase"
        if slash:
            folder = f"{name}/" if name != "." else ""
            continue
        told[(folder if indent else "") + name] = phrase
        starred |= {folder + name} if star else set()
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    known = {name for name in listed if Path(name).name not in ("__init__.py", "py.typed") and (ROOT / name).exists()}
    assert set(told) == known, f"missing {sorted(known - set(told))}, gone {sorted(set(told) - known)}"
    ignores = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]["per-file-ignores"]
    (floor,) = (glob for glob, codes in ignores.items() if codes == ["TID253"])
    assert starred == set(floor.strip("!{}").split(","))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_what_is_there(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    paths = re.findall(r"`((?:parallel|trainer|launch|recipes|tests|benchmarks|docs)/[\w./]+\.\w+)`", text)
    for path in paths:
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    assert not re.search(r"(?<![/\w])python3? \w+/", text), f"{page.name} has a command without .venv/bin/"


def test_the_recipe_reference_is_current() -> None:
    command = [sys.executable, ROOT / "docs" / "recipe_reference.py"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert printed == (ROOT / "docs" / "recipe.md").read_text(), "run `make docs`"


def test_ci_runs_what_the_readme_names() -> None:
    targets = dict(re.findall(r"^([a-z0-9-]+):([^#\n]*)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line.split()[1] for line in commands() if line.startswith("make ")}
    assert named <= set(targets)
    assert "smollm2" in targets["test-full"].split()  # a command of the README reads that model
    run_by_ci = re.findall(r"^within \S+ make ([a-z0-9-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert {"install", "lint", "types", "smollm2", "test", "test-full", "test-disk", "test-slurm"} == set(run_by_ci)
    assert named <= {*run_by_ci, "quickstart"}  # which a test below runs


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_the_commands_run_as_they_stand(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In a folder where the README's paths lead here, in order: a later command reads what an earlier one left."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt", "recipes", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    # as from a shell: of the make that may run this test, its commands know neither the environment nor the options
    told_by_make = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VENV")
    shell = {name: value for name, value in os.environ.items() if name not in told_by_make}
    for line in commands():
        if line.startswith(("make test", "make smollm2")):
            continue  # CI runs these; this is one of them
        # The environment is there: make must not install into it.
        command = line.replace("make ", "make --assume-old=install ", 1) if line.startswith("make ") else line
        began = time.monotonic()
        # Long enough for a machine with other work; what the README promises is for an idle one.
        limited = ["timeout", "--kill-after=15", "900" if line == "make quickstart" else "600", "bash", "-c", command]
        done = subprocess.run(limited, cwd=tmp_path, env=shell, capture_output=True, text=True, check=False)
        with capfd.disabled():
            print(f"\n{time.monotonic() - began:.0f} s: {line}", end="", flush=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        if line == "make quickstart":
            check_quickstart(tmp_path, done.stdout.splitlines())


def check_quickstart(folder: Path, printed: list[str]) -> None:
    """It has learned, and ends with the lines that the README shows, whose places are there."""
    records = read_metrics(folder / "runs/quickstart")
    assert [record["step"] for record in records] == list(range(1, 61))
    assert sum(record["loss"] for record in records[-5:]) / 5 < 0.55 * records[0]["loss"]
    closing = dict(line.split(maxsplit=1) for line in printed[-5:])
    assert list(closing) == ["metrics", "timeline", "tracker", "checkpoint", "next"]
    shown = block("What it prints").splitlines()
    assert [line for line in printed[-5:] if line[:7] != "tracker"] == [x for x in shown[-5:] if x[:7] != "tracker"]
    assert all((folder / closing[what]).exists() for what in ("metrics", "timeline", "checkpoint"))
    tracker = re.fullmatch(r"TRACKIO_DIR=(\S+) (\S+) show --project cuboid", closing["tracker"])
    assert tracker
    assert all((folder / place).exists() for place in tracker.groups())
    assert closing["next"] in commands()
