"""The `train` command: recipe, checks, run folder, launcher, and where everything lies at the end.

The checks import torch and transformers into this process. Ranks that the local launcher forks from it find them there,
and so nothing of that time is lost.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from cuboid.launch import worker
from cuboid.launch.failures import shown
from cuboid.launch.reports import newest_picture
from cuboid.launch.run_folder import RECIPE, Mode, newest_step, open_run_folder
from cuboid.parallel.errors import UserError
from cuboid.trainer.check import check, local_devices, resolve_devices
from cuboid.trainer.inspection import listing
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.recipe_file import read_recipe
from cuboid.trainer.runlog import read_events


def train(name: str, overrides: Sequence[str], *, mode: Mode) -> int:
    """Run a recipe from its file name or shipped name; returns the command's exit code.

    Raises:
        UserError: everything that is wrong with the recipe, the machine or the run's folder, before any rank starts.
    """
    recipe = checked_recipe(name, overrides)
    again = shlex.join(["cuboid", "train", name, *overrides])
    with open_run_folder(recipe, mode) as folder:
        done = newest_step(folder)
        if done is not None and done >= recipe.train.steps:
            print(f"{recipe.name} is complete: its checkpoint stands at step {done} of {recipe.train.steps}")
            print(f"train.steps={2 * done} goes on, --fresh begins anew")
            code = 0
        else:
            code = _launch(recipe, folder)
        if code in (0, 85, 130):
            print("\n".join(closing_lines(recipe, folder, again=again, complete=code == 0)))
    return code


def checked_recipe(name: str, overrides: Sequence[str]) -> Recipe:
    """The resolved recipe; raises UserErrors with the file and line of each field that is wrong."""
    source = read_recipe(name, overrides)
    recipe = source.recipe()
    try:
        _settle_threads(recipe)
        devices = local_devices(recipe.launch)
        recipe = resolve_devices(recipe, devices)
        check(recipe, devices)
    except UserError as error:
        raise source.located(error) from None
    return recipe


def closing_lines(recipe: Recipe, folder: Path, *, again: str, complete: bool) -> list[str]:
    """Where a run's results lie, and the command that comes next."""
    starts = [event for event in read_events(folder) if event["kind"] == "start"]
    picture = newest_picture(folder)
    newest = next((row["path"] for row in listing(folder) if not row["fault"]), None)
    places = {
        "metrics": shown(folder / "metrics.jsonl"),
        "timeline": shown(picture) if picture else None,
        "tracker": starts[-1].get("page") if starts else None,
        "checkpoint": shown(newest) if newest else None,
        "recipe": shown(folder / RECIPE),
    }
    if not complete:
        places["go on"] = again
    elif newest:
        out = shlex.quote(f"{recipe.name}-hf")
        places["next"] = f"cuboid export {shlex.quote(shown(folder))} --to hf --out {out}"
    return [f"{what:<12}{where}" for what, where in places.items() if where]


def _launch(recipe: Recipe, folder: Path) -> int:
    if recipe.launch.launcher == "local":
        from cuboid.launch import local

        return local.launch(recipe, folder)
    from cuboid.launch import ray_cluster

    return ray_cluster.launch(recipe, folder)


def _settle_threads(recipe: Recipe) -> None:
    """torch reads this once, when it is first imported; forked ranks keep it."""
    settings = recipe.parallel
    ranks = 0 if settings.data == "auto" else recipe.layout.world_size
    os.environ["OMP_NUM_THREADS"] = worker.threads(ranks) if ranks else os.environ.get("OMP_NUM_THREADS", "1")
