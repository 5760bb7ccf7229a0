"""The folder of a run: made, gone on with, or moved aside, and held by one command at a time. Imports no torch."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from cuboid.parallel.errors import UserError, UserErrors
from cuboid.trainer.copies import open_store
from cuboid.trainer.inspection import listing
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.recipe_file import dump_recipe
from cuboid.trainer.recipe_yaml import parse_file
from cuboid.trainer.resume import differences
from cuboid.trainer.runlog import RunLog

Mode = Literal["auto", "resume", "fresh"]
"""auto goes on where there is a checkpoint; resume insists on one; fresh moves the old folder aside."""

RECIPE = "recipe.yaml"
_LOCK = ".lock"


def run_folder(recipe: Recipe) -> Path:
    """Where the recipe's run lies, absolute."""
    return Path(recipe.runs).expanduser().absolute() / recipe.name


def newest_step(folder: Path) -> int | None:
    """Step of the newest whole checkpoint of a run; its content is checked when it is loaded."""
    return next((int(row["step"]) for row in listing(folder) if not row["fault"]), None)


@contextmanager
def open_run_folder(recipe: Recipe, mode: Mode) -> Iterator[Path]:
    """The run's folder with its resolved ``recipe.yaml``, held until the end of the block.

    Raises:
        UserError: another command holds it; it is another run's; there is nothing to resume; it cannot be written.
    """
    folder = run_folder(recipe)
    with ExitStack() as stack:
        try:
            if mode == "fresh":
                _move_aside(folder)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_held(folder))
            _check_continues(folder, recipe)
            _settle_copies(folder, recipe, anew=mode == "fresh")
            if mode == "resume" and newest_step(folder) is None:
                remedy = "leave --resume out to begin"
                raise UserError(f"there is nothing to resume: {folder} holds no whole checkpoint; {remedy}")
            _write(folder / RECIPE, dump_recipe(recipe))
        except OSError as error:
            raise UserError(f"the run's folder {folder} cannot be written: {error.strerror}") from error
        yield folder


def _move_aside(folder: Path) -> None:
    """``runs/name`` becomes ``runs/name.1``, or the next number that is free."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    with _held(folder):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(aside)


def _settle_copies(folder: Path, recipe: Recipe, *, anew: bool) -> None:
    """Where the run's own folder holds no checkpoint, the newest copy takes its place; of a run that begins ``anew``,
    older copies are moved aside as its folder was.

    Raises:
        UserError: the place of the copies does not answer, or none is whole: what to begin with cannot be known.
    """
    store = open_store(recipe)
    if store is None or newest_step(folder) is not None:
        return
    _write(folder / RECIPE, dump_recipe(recipe))  # what is brought lies in a run's folder, and not just anywhere
    try:
        if anew:
            store.move_aside()
        elif found := store.fetch(folder / "checkpoints", event=RunLog(folder).event):
            print(f"{folder} holds no checkpoint: {found.name} comes from its copy in {store.url}", flush=True)
    except UserError:
        raise
    except Exception as error:  # the client of a store may raise anything
        remedy = "see that it can be reached, or leave checkpoint.copy_to out"
        raise UserError(f"the copies in {store.url} cannot be read: {error}; {remedy}") from error


def _check_continues(folder: Path, recipe: Recipe) -> None:
    remedy = f"--fresh begins anew and moves {folder} aside; another name=... leaves it where it is"
    stored = folder / RECIPE
    if stored.exists():
        wrong = differences(parse_file(stored.read_text("utf-8"), str(stored)).data, recipe)
        if wrong:
            raise UserErrors([*wrong, UserError(f"{folder} holds a run of another recipe: {remedy}")])
    elif any(entry.name != _LOCK for entry in folder.iterdir()):
        raise UserError(f"{folder} is not empty and not a run's folder; {remedy}")


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Holds the folder against other commands; forked ranks hold it with us, so that none is ever overtaken."""
    with open(folder / _LOCK, "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another command"
            raise UserError(f"{folder} is in use by {holder}; stop it first, or give another name=...") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        lock.flush()
        yield


def _write(path: Path, text: str) -> None:
    """Atomically: a reader sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)
