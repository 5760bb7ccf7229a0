"""What the README and docs/ say: the tree is what git knows, links lead somewhere, commands exist and run."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    paths = re.findall(r"`((?:parallel|trainer|launch|recipes|tests|benchmarks|docs)/[\w./]+\.\w+)`", text)
    for path in paths:
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_recipe_reference_is_current() -> None:
    command = [sys.executable, ROOT / "docs" / "recipe_reference.py"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert printed == (ROOT / "docs" / "recipe.md").read_text(), "run `make docs`"


def test_ci_runs_what_the_readme_names() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line.split()[1] for line in commands() if line.startswith("make ")}
    assert named <= targets
    ci = (ROOT / ".ci" / "run").read_text()
    assert {"install", "lint", "types", "test", "test-full"} <= set(re.findall(r"make ([a-z-]+)", ci))


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_the_commands_run_as_they_stand(tmp_path: Path) -> None:
    """In a folder where the README's paths lead here, in order: a later command reads what an earlier one left."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt", "recipes", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for line in commands():
        if line.startswith(("make test", "make install", "make smollm2", "git ")):
            continue  # CI runs these; this is one of them
        # The environment is there: make must not install into it.
        command = line.replace("make ", "make --assume-old=install ", 1) if line.startswith("make ") else line
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
