"""The `train` command: recipe, checks, run folder, launcher, and at the end where everything lies.

The checks import torch and transformers into this process. The launcher forks from it, so that local ranks find them
loaded and nothing of that time is lost.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cuboid.launch import worker
from cuboid.launch.failures import STOPPED, shown
from cuboid.launch.memory import predicted_beside
from cuboid.launch.ray_cluster import IN_JOB
from cuboid.launch.run_folder import newest_step, open_run_folder
from cuboid.launch.submitted import tell_version, was_sent
from cuboid.parallel.errors import UserError
from cuboid.trainer.check import Devices, check, local_devices, resolve_devices, runs_elsewhere
from cuboid.trainer.check_engine import compile_notice
from cuboid.trainer.inspection import listing
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.recipe_file import read_recipe
from cuboid.trainer.runlog import METRICS, read_events

Check = Callable[[Recipe, Devices | None], None]


def train(name: str, overrides: Sequence[str], *, resume: bool | None) -> int:
    """Run a recipe; returns the command's exit code.

    Args:
        name: a file or a shipped recipe's bare name.
        overrides: ``section.key=value`` each.
        resume: True insists on a checkpoint to go on from, False moves the old folder aside, None goes on if it can.

    Raises:
        UserError: everything that is wrong with the recipe, the machine or the run's folder, before any rank starts.
    """
    tell_version()
    recipe = checked_recipe(name, overrides)
    with open_run_folder(recipe, "auto" if resume is None else "resume" if resume else "fresh") as folder:
        done = newest_step(folder)
        if done is not None and done >= recipe.train.steps:
            print(f"{recipe.name} is complete; train.steps={2 * done} goes on, --fresh begins anew")
            code = 0
        else:
            with predicted_beside(recipe, folder):
                code = _launch(recipe, folder)
        if code == 0:
            print("\n".join(closing_lines(recipe, folder)))
        elif code in STOPPED.values() and not was_sent() and not _in_slurm_job(recipe):
            # the batch script of a Slurm job says or does it; a sent job goes on by being submitted again
            print(f"go on with: {this_command()} {shlex.join(['train', name, *overrides])}")
    return code


def closing_lines(recipe: Recipe, folder: Path) -> list[str]:
    """Where the results of a run that is done lie, and the command that comes next."""
    pages = [event["page"] for event in read_events(folder) if event.get("page")]
    picture = max(folder.glob("timeline/*.png"), default=None)
    newest = next((row["path"] for row in listing(folder) if not row["fault"]), None)
    places = {
        "metrics": shown(folder / METRICS),
        "timeline": shown(picture) if picture else None,
        "tracker": pages[-1] if pages else None,
        "checkpoint": shown(newest) if newest else None,
        "next": None,
    }
    if newest:
        in_no_folder = recipe.model.pretrained is None or recipe.model.layers is not None
        whole = recipe.lora is not None and (recipe.lora.only_merged or in_no_folder)
        kind = "hf" if recipe.lora is None else "merged" if whole else "adapter"
        kind = recipe.quantize.scheme if recipe.quantize else kind
        target = shlex.join(["--to", kind, "--out", f"{recipe.name}-{kind}"])
        places["next"] = f"{this_command()} export {shlex.quote(shown(folder))} {target}"
    return [f"{what:<12}{where}" for what, where in places.items() if where]


def this_command() -> str:
    """The running command in words that work when they are typed again: its path, unless the bare name finds it."""
    script, found = Path(sys.argv[0]), shutil.which("cuboid")
    if script.name != "cuboid":  # python -m
        return f"{shlex.quote(shown(Path(sys.executable)))} -m cuboid.launch.cli"
    if found and os.path.realpath(found) == os.path.realpath(script):
        return "cuboid"
    path = shown(script)
    return shlex.quote(path if os.sep in path else os.path.join(os.curdir, path))


def checked_recipe(name: str, overrides: Sequence[str], *, check: Check = check, elsewhere: bool = False) -> Recipe:
    """The resolved recipe; raises UserErrors with the file and line of each field that is wrong by ``check``.
    ``elsewhere``: it is not meant for this machine, whatever it says itself."""
    source = read_recipe(name, overrides)
    recipe = source.recipe()
    try:
        _settle_environment(recipe)
        devices = None if elsewhere or runs_elsewhere(recipe.launch) else local_devices(recipe.launch)
        recipe = resolve_devices(recipe, devices)
        check(recipe, devices)
    except UserError as error:
        raise source.located(error) from None
    return recipe


def _launch(recipe: Recipe, folder: Path) -> int:
    if not runs_elsewhere(recipe.launch) and (notice := compile_notice(recipe)):
        print(notice)
    if recipe.launch.launcher == "local":
        from cuboid.launch import local

        return local.launch(recipe, folder)
    if recipe.launch.launcher == "slurm":
        from cuboid.launch import slurm_step

        return slurm_step.launch(recipe, folder)
    from cuboid.launch import ray_cluster

    return ray_cluster.launch(recipe, folder)


def _in_slurm_job(recipe: Recipe) -> bool:
    return recipe.launch.launcher == "slurm" or recipe.launch.address == IN_JOB


def _settle_environment(recipe: Recipe) -> None:
    """What torch reads when it is first imported and forked ranks keep: see `local`."""
    ranks = None if recipe.parallel.data == "auto" else recipe.layout.world_size
    os.environ["OMP_NUM_THREADS"] = worker.threads(ranks) if ranks else os.environ.get("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
