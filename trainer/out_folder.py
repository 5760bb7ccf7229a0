"""A folder that appears when all of it is written and checked: an export's place. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cuboid.parallel.errors import UserError
from cuboid.trainer.publish import discard, sync_folder


@contextmanager
def new_folder(out: Path, *, source: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside ``out`` to write into: it takes the place of ``out`` when the block ends well, and is removed
    when it does not.

    Args:
        out: with ``overwrite`` it may be a model's folder, which is replaced; otherwise it is new or empty.
        source: what the folder is made of, which must not be replaced by it.

    Raises:
        UserError: ``out`` may not be replaced, or cannot be written.
    """
    place = _free_place(out, source, overwrite=overwrite)
    partial = place.with_name(f".{place.name}.partial")
    try:
        with disk_errors_of(out):
            discard(partial)  # of an export that was killed
            partial.mkdir(parents=True)
        yield partial
        with disk_errors_of(out):
            _put_in_place(partial, place)
    finally:
        discard(partial)


@contextmanager
def disk_errors_of(out: Path) -> Iterator[None]:
    """What the disk refuses, as the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error


def _free_place(out: Path, source: Path, *, overwrite: bool) -> Path:
    out = out.absolute()
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} exists and is not a folder; give another --out")
    if source.absolute().is_relative_to(out) or out.is_relative_to(source.absolute()):
        raise UserError(f"{out} and its source {source} lie inside one another; give another --out")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"{out} is not empty; give another --out, or --overwrite to replace it")
        if not any((out / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise UserError(f"{out} is not empty and not a model's folder (no config.json); remove it yourself")
    return out


def _put_in_place(partial: Path, out: Path) -> None:
    sync_folder(partial)
    replaced = out.with_name(f".{out.name}.replaced")
    discard(replaced)
    if out.exists():
        os.rename(out, replaced)
    os.rename(partial, out)
    sync_folder(out.parent)
    discard(replaced)
