"""Made once, memory-mapped by everybody: entries of a cache on disk. Imports no torch.

An entry is a folder with arrays and `facts.json`, written last. It gets its name by one rename when everything is on
disk, so that an entry is whole or not there. Processes that share the file system agree through a file lock; the kernel
frees the lock of a killed one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cuboid.parallel.errors import UserError
from cuboid.trainer.foreign import open_plain, read_json

Facts = dict[str, Any]

_LOCK_POLL_SECONDS = 0.1
_WAIT_TOLD_SECONDS = 10.0


def cached(entry: Path, write: Callable[[Path], Facts]) -> Facts:
    """The facts of an entry that is there, or that ``write`` makes now while other processes that ask for it wait.

    Args:
        entry: the folder; its name tells all that its content depends on.
        write: fills a folder with arrays and returns facts, among them ``bytes``: the size of each file.

    Raises:
        UserError: what ``write`` raises, or the cache folder cannot be written.
    """
    if facts := facts_of(entry):
        return facts
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _lock(entry.with_suffix(".lock")):
            facts = facts_of(entry)
            if facts is None:
                _build(entry, write)
                facts = facts_of(entry)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"the cache of token files {entry.parent} cannot be written ({reason}); set CUBOID_CACHE"
        ) from error
    assert facts is not None, f"{entry} was written and cannot be read"
    return facts


def mapped(file: Path, dtype: Any) -> np.ndarray:
    """A file of the cache as an array, read only."""
    # As a plain array: each access through the memmap class would make a new object of it.
    return np.memmap(file, dtype=dtype, mode="r").view(np.ndarray)


def flush(file: Any) -> None:
    """Everything that was written, onto the disk."""
    file.flush()
    os.fsync(file.fileno())


def say(words: str) -> None:
    """A line on standard error."""
    sys.stderr.write(f"cuboid: {words}\n")
    sys.stderr.flush()


def facts_of(entry: Path) -> Facts | None:
    """The entry's facts, or None where there is none that is whole."""
    try:
        facts = read_json(entry / "facts.json")
        sizes = {name: _plain_size(entry, name) for name in facts["bytes"]}
        return facts if sizes == facts["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _plain_size(entry: Path, name: str) -> int:
    """Bytes of a plain file within an entry. Raises ValueError where the name leaves it, OSError where it is none."""
    if Path(name).name != name:
        raise ValueError(f"{name} is not a file of the entry")
    with open_plain(entry / name, follow=False) as file:
        return os.fstat(file.fileno()).st_size


def _build(entry: Path, write: Callable[[Path], Facts]) -> None:
    # We hold the lock: what lies here under a passing name was left by a process that was killed.
    for left in entry.parent.glob(f".{entry.name}.*"):
        shutil.rmtree(left, ignore_errors=True)
    passing = entry.parent / f".{entry.name}.{socket.gethostname()}.{os.getpid()}"
    passing.mkdir()
    try:
        facts = write(passing)
        with open(passing / "facts.json", "w") as file:
            json.dump(facts, file, indent=1)
            flush(file)
        shutil.rmtree(entry, ignore_errors=True)
        os.rename(passing, entry)
    finally:
        shutil.rmtree(passing, ignore_errors=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds the file lock; says whom it waits for. Where there are no locks it goes on: the rename is atomic anyhow."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        started, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told and time.monotonic() - started > _WAIT_TOLD_SECONDS:
                    told = True
                    holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace")
                    say(f"waiting for {holder or 'another process'}, which prepares the data ({path})")
                time.sleep(_LOCK_POLL_SECONDS)
            except OSError:
                break
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)
