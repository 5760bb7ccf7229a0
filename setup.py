"""Writes the git revision into the version (0.1.0+g0554cb0), so that a wheel says what it was built from."""

import re
import subprocess
from pathlib import Path

from setuptools import setup

VERSION = "0.1.0"


def version(root: Path) -> str:
    """The version of the checkout at ``root``, or the one recorded in an unpacked source distribution."""
    recorded = root / "PKG-INFO"
    if recorded.exists():
        return re.search(r"^Version: (.+)$", recorded.read_text(), re.MULTILINE)[1]
    if not (root / ".git").exists():
        return VERSION
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    revision = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    return f"{VERSION}+g{revision.replace('-', '.')}"


setup(version=version(Path(__file__).parent.resolve()))
