"""Ranks of an earlier start end once a newer one has begun, so that never two groups write into one run's folder.
Imports no torch.

Where the head of a cluster is lost, or the way to it, the ranks of other nodes train on until Ray notices, a minute
later. So each start of a group writes a name of its own into the folder, and its ranks look whether it still stands
there (a fencing token: M. Kleppmann, Designing Data-Intensive Applications, chapter 8).
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from pathlib import Path
from threading import Thread

from cuboid.parallel.whereabouts import FOLDER

NAME = "CUBOID_GROUP"
"""The variable in which a rank keeps the name of its start."""
_LOOK_SECONDS = 1.0
"""Between two looks. The newer ranks take longer than this for their imports, before they write anything."""


def begin(folder: Path) -> str:
    """From now on the ranks of every earlier start end; the name of the new one."""
    path, group = _path(folder), uuid.uuid4().hex
    path.parent.mkdir(mode=0o700, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(group)
    os.replace(new, path)
    return group


def join(folder: Path, group: str) -> None:
    """This process is a rank of that start: it ends within seconds of a newer one, without an event of its own."""
    os.environ[NAME] = group

    def look() -> None:
        while not is_overtaken(folder):
            time.sleep(_LOOK_SECONDS)
        print("a newer start of this run has begun: this rank ends", file=sys.stderr, flush=True)
        os._exit(1)

    Thread(target=look, name="fence", daemon=True).start()


def is_overtaken(folder: Path) -> bool:
    """Whether a newer start than this process's has begun; never where it has joined none."""
    try:
        newest = _path(folder).read_text()
    except OSError:  # a folder that cannot be read tells nothing
        return False
    return os.environ.get(NAME, newest) != newest


def _path(folder: Path) -> Path:
    return folder / FOLDER / "group"
