"""Every test's environment: a home and a cache of its own, and no tracker to upload to."""

import os
from collections.abc import Iterator

import pytest


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
