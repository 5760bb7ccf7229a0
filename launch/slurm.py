"""`cuboid slurm`: a batch script that a person can read, and its way to sbatch. Imports no torch."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

from cuboid.launch.failures import shown
from cuboid.launch.placement import ranks_per_node
from cuboid.launch.ray_cluster import IN_JOB
from cuboid.launch.run_folder import run_folder
from cuboid.launch.slurm_options import Launcher, SlurmOptions
from cuboid.launch.training import checked_recipe, this_command
from cuboid.parallel.errors import RunFailed, UserError
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.version import version

_BODY = """
set -uo pipefail
cd {directory} || exit 2

{command} &
run=$!

# USR1 comes {save_seconds} s before the time limit: the run saves at its next step's edge, ends with 85, and goes
# on from there when the job has been in the queue again. TERM comes from scancel, and from preemption and a
# lost node, where Slurm itself puts the job back.
requeues=$(({max_requeues} - ${{SLURM_RESTART_COUNT:-0}}))
trap 'kill -USR1 "$run"' USR1
trap 'requeues=0; kill -USR1 "$run"' TERM
while kill -0 "$run" 2>/dev/null; do wait "$run"; done # a signal ends wait, not the run
wait "$run"
code=$?
[ "$code" = 138 ] && code=85 # USR1 came before the run could listen, so that nothing was done

if [ "$code" = 85 ] && [ "$requeues" -gt 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
elif [ "$code" = 85 ]; then
  echo "unless Slurm puts it back itself, the job goes on with: sbatch {script}"
fi
exit "$code"
"""
_SETTLED = {"launch.launcher": "--launcher", "launch.address": "--launcher", "launch.device": "--gpus-per-node"}
_STARTS = {
    Launcher.local: ["launch.launcher=slurm"],
    Launcher.ray: ["launch.launcher=ray", f"launch.address={IN_JOB}"],
}
_EARLY_SECONDS = 60
"""By so much Slurm may send the signal before its time (sbatch's manual, --signal)."""
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")


def slurm(options: SlurmOptions) -> None:
    """Write the script beside the run, and submit it if that is asked for.

    Raises:
        UserError: the recipe is wrong; its ranks do not fit the nodes; there is no sbatch, or it refuses.
    """
    recipe = checked_recipe(options.recipe, _overrides(options))
    _check_fits(recipe, options)
    path = run_folder(recipe).with_name(f"{recipe.name}.sbatch")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script(recipe, path, options), "utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    print(f"wrote {shown(path)}")
    if not options.submit:
        print(f"submit it with: sbatch {shlex.quote(shown(path))}")
        return
    print(f"{_submitted(path)}; what it prints: {shown(_output(path, '<job>'))}")


def _overrides(options: SlurmOptions) -> list[str]:
    for settled, by in _SETTLED.items():
        if given := [text for text in options.overrides or () if text.partition("=")[0] == settled]:
            raise UserError(f"{given[0]}: {settled} is settled by the job ({by}); leave it out")
    device = "cuda" if options.gpus_per_node else "cpu"
    return [*(options.overrides or ()), *_STARTS[options.launcher], f"launch.device={device}"]


def _check_fits(recipe: Recipe, options: SlurmOptions) -> None:
    ranks, nodes, gpus = recipe.layout.world_size, options.nodes, options.gpus_per_node
    own = ranks_per_node(recipe.layout, nodes)
    if gpus and gpus != own:
        remedy = f"use --gpus-per-node {own}, or another parallel.data"
        raise UserError(f"--nodes {nodes} --gpus-per-node {gpus}: {nodes * gpus} GPUs for {ranks} ranks; {remedy}")
    if options.time is not None and _seconds(options.time) <= options.save_seconds + _EARLY_SECONDS:
        early = f"--save-seconds {options.save_seconds} and the minute by which Slurm may be early"
        raise UserError(f"--time {options.time} leaves no time to train before {early}; give more time")


def _seconds(limit: str) -> int:
    """Of a time limit in sbatch's forms: minutes, m:s, h:m:s, days-h, days-h:m, days-h:m:s."""
    found = _TIME.fullmatch(limit)
    if found is None:
        raise UserError(f"--time {limit} is no time; use minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    parts = [int(part) for part in found["clock"].split(":")]
    if found["days"] is None and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(found["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def script(recipe: Recipe, path: Path, options: SlurmOptions) -> str:
    """The batch script at ``path``: what it asks for, and one command that runs, saves in time, and goes back into the
    queue."""
    command = ["train", options.recipe, *_overrides(options)]
    body = _BODY.format(
        directory=shlex.quote(os.getcwd()),
        save_seconds=options.save_seconds,
        command=f"{this_command()} {shlex.join(command)}",
        max_requeues=options.max_requeues,
        script=shlex.quote(shown(path)),
    )
    head = ["#!/bin/bash", f"# {recipe.name}, by cuboid {version()}"]
    return "\n".join([*head, *(f"#SBATCH --{line}" for line in _asked(recipe, path, options))]) + "\n" + body


def _asked(recipe: Recipe, path: Path, options: SlurmOptions) -> Iterator[str]:
    yield f"job-name={recipe.name}"
    yield f"nodes={options.nodes}"
    yield "ntasks-per-node=1"
    yield f"cpus-per-task={options.cpus_per_node}" if options.cpus_per_node else "exclusive"
    if options.gpus_per_node:
        yield f"gpus-per-node={options.gpus_per_node}"
    for name in ("time", "partition", "account", "qos"):
        if (value := getattr(options, name)) is not None:
            yield f"{name}={value}"
    yield f"output={shlex.quote(str(_output(path, '%j')))}"
    yield "open-mode=append"
    yield "requeue"
    yield f"signal=B:USR1@{options.save_seconds}"


def _output(path: Path, job: str) -> Path:
    """What the job of a script prints goes here, all its turns in one file."""
    return path.with_name(f"{path.stem}-{job}.txt")


def _submitted(path: Path) -> str:
    try:
        done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError:
        raise UserError("--submit: there is no sbatch here; run it on the cluster's login node") from None
    except subprocess.TimeoutExpired:
        raise RunFailed("sbatch does not answer within a minute; the script is written") from None
    if done.returncode:
        raise UserError(f"sbatch refuses the job: {done.stderr.strip()}")
    return done.stdout.strip()
