"""Every test's environment: a home and a cache of its own, no tracker to upload to, the machine where time counts."""

import fcntl
import os
import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from verifying import Verify


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("WANDB", "TRACKIO", "NETRC", "XDG_CACHE"))]:
            patch.delenv(name)
        patch.setenv(
            "GIT_CONFIG_GLOBAL", os.path.expanduser("~/.gitconfig")
        )  # may say that this checkout is to be trusted
        patch.setenv("HOME", str(home))
        patch.setenv("CUBOID_CACHE", str(home / "cache"))
        yield


@pytest.fixture
def beside_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory holds `text.txt`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "text.txt").write_text("All that is gold does not glitter, not all those who wander are lost. " * 60)


@pytest.fixture
def verify(beside_a_text: None, capfd: pytest.CaptureFixture[str]) -> "Verify":
    from verifying import verifier

    return verifier(capfd)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that want the machine come first: later, everything else would wait for them."""
    items.sort(key=lambda item: item.get_closest_marker("alone") is None)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around the timer of pytest-timeout: waiting is not the test's fault
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool | None, bool | None]:
    """Under pytest-xdist, a test marked `alone` waits until the other workers rest, and they wait for it."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    with ExitStack() as stack:
        if run:
            turn = Path(tempfile.gettempdir(), f"cuboid-tests-{run}")
            stack.enter_context(_turn(turn, alone=item.get_closest_marker("alone") is not None))
        return (yield)


@contextmanager
def _turn(path: Path, *, alone: bool) -> Iterator[None]:
    """Many hold `path` together, or one alone; who waits for it stands in a queue, so that nobody waits for ever."""
    with path.with_suffix(".queue").open("a") as queue, path.with_suffix(".machine").open("a") as machine:
        fcntl.flock(queue, fcntl.LOCK_EX)
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        try:
            yield
        finally:  # closing would not do where a forked process that still ends holds the file too
            fcntl.flock(machine, fcntl.LOCK_UN)
