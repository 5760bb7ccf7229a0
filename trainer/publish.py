"""A checkpoint's folder as it is made: written durably, published by a rename, kept, cleaned. Imports no torch.

A file is on the disk before a name says so, and nothing that a name says is ever changed in place: killed at any
moment, every ``step-...`` folder is whole, and what is not begins with ``.partial-``.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from cuboid.trainer.manifest import (
    BEST,
    LATEST,
    MANIFEST,
    PARTIAL,
    REFUSED,
    FileRecord,
    Manifest,
    encode_manifest,
    incomplete,
    marked,
    step_name,
    steps,
)

_BLOCK_BYTES = 32 << 20


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Write a new file and wait until the disk has it.

    Raises:
        OSError: with the file's name; what was written of it stays.
    """
    view, written = memoryview(content), 0
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            while written < len(view):
                count = os.write(descriptor, view[written : written + _BLOCK_BYTES])
                if hasattr(os, "posix_fadvise"):  # lets the disk begin at once, so that fsync finds little left to do
                    os.posix_fadvise(descriptor, written, count, os.POSIX_FADV_DONTNEED)
                written += count
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: Path, content: bytes) -> FileRecord:
    """`write_durably`, and what the manifest says of it."""
    write_durably(path, content)
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's names."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that keeps names by itself
            raise
    finally:
        os.close(descriptor)


def publish(partial: Path, folder: Path, *, step: int, files: Mapping[str, FileRecord], best: bool = False) -> Path:
    """Turn ``partial``, whose files are written, into ``folder/step-...``: manifest, rename, ``latest``, and ``best``
    where it is that, in this order.

    Raises:
        OSError: the disk refused; the folder's other checkpoints and ``latest`` are as before.
    """
    for name, record in files.items():
        if not (partial / name).is_file() or (partial / name).stat().st_size != record.size:
            raise OSError(f"{name} is not seen whole from the first rank; is {folder} shared by all nodes?")
    write_durably(partial / MANIFEST, encode_manifest(Manifest(step, round(time.time(), 3), files)))
    sync_folder(partial)
    path = folder / step_name(step)
    # before the renames: they need no space, a new file does
    marks = {mark: _new_mark(folder, mark, path) for mark in ([LATEST, BEST] if best else [LATEST])}
    given_up = folder / f"{PARTIAL}{path.name}-{os.getpid()}"
    if os.path.lexists(path):  # of a continuation that was given up, since this run was resumed from before it
        os.rename(path, given_up)
    os.rename(partial, path)
    sync_folder(folder)
    for mark, new in marks.items():
        os.replace(new, folder / mark)
        sync_folder(folder)
    discard(given_up)
    return path


def adopt(partial: Path, folder: Path, *, step: int) -> Path:
    """Give a whole checkpoint that came from elsewhere its name, and let ``latest`` name it; its new path."""
    path = folder / step_name(step)
    os.rename(partial, path)
    sync_folder(folder)
    os.replace(_new_mark(folder, LATEST, path), folder / LATEST)
    sync_folder(folder)
    return path


def mark_best(folder: Path, path: Path | None) -> None:
    """Let ``best`` name the checkpoint at ``path``, or none: what a save did that was killed before its last rename,
    or what one said whose steps were given up."""
    if path == marked(folder, BEST):
        return
    if path is None:
        (folder / BEST).unlink(missing_ok=True)
    else:
        os.replace(_new_mark(folder, BEST, path), folder / BEST)
    sync_folder(folder)


def _new_mark(folder: Path, mark: str, path: Path) -> Path:
    """A file that will be ``latest`` or ``best`` by a rename."""
    new = folder / f"{PARTIAL}{mark}-{os.getpid()}"
    new.unlink(missing_ok=True)
    write_durably(new, f"{path.name}\n".encode())
    return new


def retain(folder: Path, *, keep: int, newest: int, in_use: Collection[Path] = ()) -> list[Path]:
    """Remove all but the ``keep`` newest whole checkpoints up to step ``newest``, which always stays as ``best`` does
    and those ``in_use`` do; what was removed.

    A folder that is not whole neither counts nor is removed: somebody may want to look at it.
    """
    whole = [path for step, path in steps(folder).items() if step <= newest and not incomplete(path)]
    removed = [path for path in whole[max(keep, 1) :] if path != marked(folder, BEST) and path not in in_use]
    for path in removed:
        _remove(path)
    return removed


def set_aside(path: Path) -> Path:
    """Rename a broken checkpoint so that it is neither tried, counted nor overwritten again; its new path."""
    number, aside = 0, path.with_name(path.name + REFUSED)
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}{REFUSED}.{number}")
    os.rename(path, aside)
    return aside


def clean(folder: Path) -> list[Path]:
    """Remove what killed saves left in a checkpoints folder (one process calls this, before ranks save)."""
    leftovers = [Path(folder) / name for name in sorted(os.listdir(folder)) if name.startswith(PARTIAL)]
    for path in leftovers:
        discard(path)
    return leftovers


def discard(path: Path) -> None:
    """Remove a partial folder or file as far as the disk allows; what stays is tried again at the next start."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    # Renamed first: killed half-way, it is a leftover and not a checkpoint that looks broken.
    gone = path.with_name(f"{PARTIAL}{path.name}-{os.getpid()}")
    os.rename(path, gone)
    discard(gone)
