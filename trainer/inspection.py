"""Checkpoints looked at from outside: verify, newest, listing, inspect, resolve. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from io import BufferedReader
from pathlib import Path
from typing import Any

from cuboid.trainer.manifest import (
    BEST,
    FACTS,
    LATEST,
    MANIFEST,
    CheckpointError,
    Manifest,
    incomplete,
    marked,
    open_file,
    read_json,
    read_manifest,
    steps,
    what_instead,
)
from cuboid.trainer.tensor_table import prefix_mark, read_table

_BLOCK_BYTES = 1 << 22


def resolve(path: Path, *, whole: bool = True) -> Path:
    """The checkpoint that ``path`` means: itself, ``latest``, or the newest of a run's or a checkpoints folder; with
    ``whole`` the newest one that no file is missing in.

    Raises:
        CheckpointError: there is none; a pickle is named as one.
    """
    path = Path(path).absolute()
    if path.name in (LATEST, BEST) and (named := marked(path.parent, path.name)):
        return named
    for folder in (path, path / "checkpoints"):
        if (folder / MANIFEST).exists():
            return folder
        for candidate in steps(folder).values():
            if not whole or not incomplete(candidate):
                return candidate
    raise CheckpointError(f"{path} {what_instead(path)}")


def verify(path: Path, *, share: slice = slice(None), threads: int | None = None) -> list[str]:
    """Check every byte of the checkpoint at ``path``; what is wrong with it, one line a fault, empty if nothing is.

    ``share`` picks some of its files (largest first), so that ranks can divide the work: ``slice(rank, None, world)``.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    names = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))[share]
    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        return [fault for fault in pool.map(lambda name: _fault(path, name, manifest), names) if fault]


def newest(folder: Path, *, refused: Callable[[Path, list[str]], None] | None = None) -> Path | None:
    """The newest checkpoint of which every byte is right, or None. ``refused`` hears of each one that is not."""
    for path in steps(folder).values():
        faults = verify(path)
        if not faults:
            return path
        if refused:
            refused(path, faults)
    return None


def best(path: Path) -> Path:
    """The checkpoint of a run's or checkpoints folder that had the lowest loss on held-out text.

    Raises:
        CheckpointError: none is marked.
    """
    for folder in (Path(path) / "checkpoints", Path(path)):
        if named := marked(folder, BEST):
            return named
    raise CheckpointError(f"{path} marks no checkpoint as the best; a run with checkpoint.best=eval_loss does")


def listing(folder: Path) -> list[dict[str, Any]]:
    """A row for each checkpoint of a run's or checkpoints folder, newest first: step, path, bytes, time (seconds since
    1970), latest, best, fault. Sizes are checked, contents are not."""
    folder = Path(folder)
    if (folder / "checkpoints").is_dir():
        folder /= "checkpoints"
    rows = []
    for step, path in steps(folder).items():
        fault = incomplete(path)
        manifest = Manifest(step, 0.0, {}) if fault else read_manifest(path)
        row = {"step": step, "path": path, "bytes": manifest.bytes, "time": manifest.time}
        marks = {mark: path == marked(folder, mark) for mark in (LATEST, BEST)}
        rows.append({**row, **marks, "fault": fault})
    return rows


def inspect(path: Path) -> dict[str, Any]:
    """What is in a checkpoint: path, step, time, bytes, files, tensors (dtype and shape by name) and facts. Its JSON is
    checked, its tensors are not read.

    Raises:
        CheckpointError: it is not a whole checkpoint.
    """
    path = resolve(path)
    if fault := incomplete(path):
        raise CheckpointError(fault)
    manifest = read_manifest(path)
    table = read_table(path, manifest)
    return {
        "path": path,
        "step": manifest.step,
        "time": manifest.time,
        "bytes": manifest.bytes,
        "files": {name: asdict(record) for name, record in manifest.files.items()},
        "tensors": {name: {"dtype": record.dtype, "shape": list(record.shape)} for name, record in table.items()},
        "facts": read_json(path, FACTS, manifest.files[FACTS]),
    }


def _fault(path: Path, name: str, manifest: Manifest) -> str:
    record = manifest.files[name]
    try:
        with open_file(path, name) as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.size:
                return f"{path}: {name} has {size} bytes instead of {record.size}"
            if hashlib.file_digest(file, "sha256").hexdigest() == record.sha256:
                return ""
            inside = _changed_part(path, name, file, manifest) if name.endswith(".safetensors") else ""
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{path}: {name} cannot be read ({error.strerror})"
    return f"{path}: {name} is not what its manifest says (SHA-256 differs{inside})"


def _changed_part(path: Path, name: str, file: BufferedReader, manifest: Manifest) -> str:
    """Where in a changed file the change begins, in words; nothing where tensors.json cannot say it."""
    if incomplete(path):
        return ""
    try:
        table = read_table(path, manifest)
    except CheckpointError:
        return ""
    inside = [(chunk, tensor) for tensor, record in table.items() for chunk in record.chunks if chunk.file == name]
    sha = hashlib.sha256()
    file.seek(0)
    for chunk, tensor in sorted(inside, key=lambda pair: pair[0].start):
        _update(sha, file, chunk.start - file.tell())
        if prefix_mark(sha) != chunk.before:
            return ", in its header"
        _update(sha, file, chunk.bytes)
        if prefix_mark(sha) != chunk.after:
            return f", first in tensor {tensor}"
    return ""


def _update(sha: Any, file: BufferedReader, size: int) -> None:
    while size > 0 and (block := file.read(min(size, _BLOCK_BYTES))):
        sha.update(block)
        size -= len(block)
