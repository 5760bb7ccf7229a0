"""Where a run and the copies of its checkpoints may lie, in words. Imports no torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from cuboid.parallel.errors import FieldError, UserError
from cuboid.trainer.copies import open_store
from cuboid.trainer.recipe import Recipe


def folder_errors(recipe: Recipe, *, runs_here: bool) -> Iterator[UserError]:
    """What is wrong with the run's folder and its copies, seen from a machine that is to write them.

    Args:
        runs_here: ranks start on this machine alone; otherwise the path must mean the same place everywhere.
    """
    if not runs_here:
        yield from absolute_errors(recipe)
    if not (wrong := list(copy_errors(recipe))):
        try:
            open_store(recipe)
        except FieldError as error:
            wrong.append(error)
    yield from wrong
    existing = Path(recipe.runs).expanduser() / recipe.name
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        constraint = f"cannot be written: {existing}: {error.strerror}"
        yield FieldError("runs", recipe.runs, constraint, "use a folder that you may write to")


def absolute_errors(recipe: Recipe) -> Iterator[UserError]:
    """What is wrong with these folders for ranks on other machines, which this one may not see."""
    for field, place in (("runs", recipe.runs), ("checkpoint.copy_to", recipe.checkpoint.copy_to)):
        if place is not None and "://" not in place and not Path(place).expanduser().is_absolute():
            constraint = "is relative, and a cluster's nodes and jobs each have a working directory of their own"
            yield FieldError(field, place, constraint, "use an absolute path that every node sees")


def copy_errors(recipe: Recipe) -> Iterator[UserError]:
    """What is wrong with `checkpoint.copy_to` itself."""
    place = recipe.checkpoint.copy_to
    if place is None:
        return
    if recipe.checkpoint.every == 0:
        constraint = "has nothing to copy, since checkpoint.every=0 saves nothing"
        yield FieldError("checkpoint.copy_to", place, constraint, "use null, or another checkpoint.every")
    if urlsplit(place).password is not None:
        remedy = "leave it to the environment, as AWS_SECRET_ACCESS_KEY"
        yield FieldError("checkpoint.copy_to", "[hidden]", "holds a password", remedy)
    if "://" not in place and Path(place).expanduser().absolute() == Path(recipe.runs).expanduser().absolute():
        constraint = "is where the run itself lies (runs)"
        yield FieldError("checkpoint.copy_to", place, constraint, "use another folder, on another disk")
