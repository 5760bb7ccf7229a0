"""Which cuboid this is, its version with the git revision that it was built from, and which torch. Imports no torch."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path


def version() -> str:
    """``0.1.0+g0554cb0``: of the checkout that it runs from (``.dirty`` with changes), else of the built package."""
    built = metadata.version("cuboid")
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return built
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):  # no git here, or a checkout of somebody else
        return built
    return f"{built.partition('+')[0]}+g{done.stdout.strip().replace('-', '.')}"


def torch_version() -> tuple[int, int]:
    """(2, 13) of the torch that is installed."""
    major, minor, *_ = metadata.version("torch").split(".")
    return int(major), int(minor)
