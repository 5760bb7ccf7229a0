"""Finished checkpoints in a second place: another folder, or an object store. The fsspec door. Imports no torch.

    <checkpoint.copy_to>/<name of the run>/checkpoints/
      latest              one line, the name of the newest whole copy
      best                the same, of the best checkpoint, where there is one
      step-00000020/      as in the run's folder; its manifest comes last and goes first

An object store knows no rename. A copy is whole once it has its manifest, and `verify` tells by every byte.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Condition, Thread

import fsspec

from cuboid.parallel.errors import FieldError
from cuboid.trainer import inspection
from cuboid.trainer.manifest import (
    BEST,
    LATEST,
    MANIFEST,
    PARTIAL,
    CheckpointError,
    marked,
    read_manifest,
    step_name,
    step_of,
)
from cuboid.trainer.publish import adopt, discard
from cuboid.trainer.recipe import Recipe

Event = Callable[..., None]
"""Called as ``event(kind, **fields)``, like `RunLog.event`; also from the copying thread."""


class Store:
    """The copies of one run."""

    def __init__(self, url: str, name: str) -> None:
        """Raises ValueError for a protocol that fsspec does not know, ImportError where its package is missing."""
        self._fs, root = fsspec.url_to_fs(url)
        self.url = f"{url.rstrip('/')}/{name}"
        self._run = f"{root.rstrip('/')}/{name}"
        self._place = f"{self._run}/checkpoints"

    def steps(self) -> list[int]:
        """Of every whole copy up to ``latest``, newest first; those after it belong to a continuation that was given
        up, or are not all here."""
        newest = step_of(self._mark(LATEST) or "")
        if newest is None:
            return []
        found = (step for name in self._names() if (step := step_of(name)) is not None and step <= newest)
        return sorted((step for step in found if self._fs.exists(f"{self._path(step)}/{MANIFEST}")), reverse=True)

    def put(self, path: Path, *, keep: int) -> int:
        """Copy the whole checkpoint at ``path``, and remove all but the ``keep`` newest copies and the best; its bytes.

        Raises:
            OSError: or another error of the store's client; copies of other steps are as they were.
        """
        manifest = read_manifest(path)
        target = self._path(manifest.step)
        self._remove(manifest.step)
        self._fs.makedirs(target, exist_ok=True)
        for name in (*manifest.files, MANIFEST):
            self._fs.put_file(str(path / name), f"{target}/{name}")
        for mark in (BEST, LATEST) if marked(path.parent, BEST) == path else (LATEST,):
            self._fs.pipe_file(f"{self._place}/{mark}", f"{path.name}\n".encode())
        for step in self.steps()[max(keep, 1) :]:
            if step_name(step) != self._mark(BEST):
                self._remove(step)
        return manifest.bytes

    def fetch(self, folder: Path, *, event: Event) -> Path | None:
        """Bring the newest copy of which every byte is right into the checkpoints ``folder``; None where there is none.

        A copy that is not right is told by the event ``checkpoint_copy_refused``, and the one before it is tried.

        Raises:
            CheckpointError: none of them is right: to begin anew is then for the user to say.
        """
        for step in self.steps():
            partial = folder / f"{PARTIAL}{step_name(step)}-{os.getpid()}"
            discard(partial)
            partial.mkdir(parents=True)
            try:
                self._fs.get_file(f"{self._path(step)}/{MANIFEST}", str(partial / MANIFEST))
                for name in read_manifest(partial).files:  # plain names: the manifest has been checked
                    self._fs.get_file(f"{self._path(step)}/{name}", str(partial / name))
                faults = inspection.verify(partial)
            except (CheckpointError, FileNotFoundError) as error:
                faults = [str(error)]
            if not faults:
                return adopt(partial, folder, step=step)
            discard(partial)
            event("checkpoint_copy_refused", path=f"{self.url}/checkpoints/{step_name(step)}", faults=faults)
        if self.steps():
            raise CheckpointError(f"no copy in {self.url} is whole; --fresh moves them aside and begins anew")
        return None

    def move_aside(self) -> None:
        """Give the copies of an earlier run another name, so that this one begins anew."""
        self._fs.invalidate_cache()
        if not self._fs.exists(self._run):
            return
        number = 1
        while self._fs.exists(aside := f"{self._run}.{number}"):
            number += 1
        self._fs.mv(self._run, aside, recursive=True)

    def _path(self, step: int) -> str:
        return f"{self._place}/{step_name(step)}"

    def _names(self) -> list[str]:
        self._fs.invalidate_cache()
        if not self._fs.exists(self._place):
            return []
        return [str(path).rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._place, detail=False)]

    def _mark(self, mark: str) -> str | None:
        try:
            return bytes(self._fs.cat_file(f"{self._place}/{mark}")).decode("ascii", "replace").strip()
        except FileNotFoundError:
            return None

    def _remove(self, step: int) -> None:
        if self._fs.exists(f"{self._path(step)}/{MANIFEST}"):
            self._fs.rm_file(f"{self._path(step)}/{MANIFEST}")
        if self._fs.exists(self._path(step)):
            self._fs.rm(self._path(step), recursive=True)


def open_store(recipe: Recipe) -> Store | None:
    """Where the recipe has copies, None where it has none.

    Raises:
        FieldError: no file system answers to that name here.
    """
    url = recipe.checkpoint.copy_to
    if url is None:
        return None
    try:
        return Store(url, recipe.name)
    except (ImportError, ValueError) as error:  # ImportError's words name the package to install
        remedy = "use an absolute folder, or a URL that fsspec knows, as s3://bucket/folder"
        raise FieldError("checkpoint.copy_to", url, f"cannot be opened: {error}", remedy) from error


def open_copier(recipe: Recipe, *, event: Event) -> Copier | None:
    """What copies the recipe's checkpoints, None where nothing does. Raises FieldError as `open_store`."""
    store = open_store(recipe)
    return None if store is None else Copier(store, keep=recipe.checkpoint.keep, event=event)


class Copier:
    """Copies checkpoints behind the training, one at a time. The newest one waits its turn; one that waited before it
    is left out, so that a slow store never holds the training up.

    A copy that fails does not stop the training: the event ``checkpoint_copy_failed`` says so, and the next checkpoint
    is copied again.

    Args:
        store: where to.
        keep: how many copies stay there.
        event: hears ``checkpoint_copied`` (step, path, bytes, seconds), ``checkpoint_copy_failed`` (step, cause),
            ``checkpoint_copy_left_out`` (step).
    """

    def __init__(self, store: Store, *, keep: int, event: Event) -> None:
        self._store, self._keep, self._event = store, keep, event
        self._changed = Condition()
        self._at_work: Path | None = None
        self._next: Path | None = None

    def add(self, path: Path) -> None:
        """Copy the whole checkpoint at ``path`` soon."""
        with self._changed:
            left_out, self._next = self._next, path
            if self._at_work is None and left_out is None:
                Thread(target=self._work, name="copies", daemon=True).start()
        if left_out is not None:
            self._event("checkpoint_copy_left_out", step=step_of(left_out.name))

    @property
    def in_use(self) -> set[Path]:
        """Checkpoints that must not be removed yet."""
        with self._changed:
            return {path for path in (self._at_work, self._next) if path is not None}

    def wait(self, patience_seconds: float | None = None) -> None:
        """Return when nothing is left to copy, or the patience is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._at_work is None and self._next is None, patience_seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._at_work, self._next = self._next, None
                self._changed.notify_all()
                if self._at_work is None:
                    return
                path = self._at_work
            self._copy(path)

    def _copy(self, path: Path) -> None:
        started, step = time.monotonic(), step_of(path.name)
        try:
            size = self._store.put(path, keep=self._keep)
        except Exception as error:  # a store's client may raise anything; the training must not end by it
            cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            self._event("checkpoint_copy_failed", step=step, cause=f"to {self._store.url}: {cause}")
            return
        seconds = round(time.monotonic() - started, 3)
        self._event("checkpoint_copied", step=step, path=self._store.url, bytes=size, seconds=seconds)
