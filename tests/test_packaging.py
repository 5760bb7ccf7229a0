"""The wheel holds exactly the four folders as they stand in git, and says which revision it was built from."""

import email
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("parallel", "trainer", "recipes", "launch")


def git(*arguments: str, cwd: Path = ROOT) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout


def tracked(*folders: str) -> list[str]:
    """Files of the index that are still there."""
    return [name for name in git("ls-files", *folders).split() if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of its own with the tracked files as they are now: nothing stale, ignored or uncommitted."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    git("init", "-q", cwd=folder)
    git("add", "--all", cwd=folder)
    git("commit", "-q", "-m", "Build", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["-q", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, checkout], check=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_is_what_git_knows(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - metadata == {f"cuboid/{name}" for name in tracked(*FOLDERS)}
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


def test_every_package_is_typed_and_every_recipe_shipped() -> None:
    assert {f"{folder}/py.typed" for folder in FOLDERS} <= set(tracked(*FOLDERS))
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").glob("*.yaml")}
    assert {"recipes/quickstart.yaml", "recipes/smollm2.yaml"} <= recipes <= set(tracked("recipes"))


def test_the_version_names_the_revision(checkout: Path, wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    release, _, revision = email.message_from_bytes(archive.read(metadata))["Version"].partition("+g")
    assert release
    assert revision == git("rev-parse", "--short", "HEAD", cwd=checkout).strip()


def test_the_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Also without site-packages: the editable install must not be what answers."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from cuboid.parallel import layout; print(layout.__file__)"
    )
    command = [sys.executable, "-I", "-S", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60)
    assert Path(done.stdout.strip()) == tmp_path / "cuboid" / "parallel" / "layout.py"
