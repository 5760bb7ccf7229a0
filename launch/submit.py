"""`cuboid submit`, `jobs`, `logs` and `stop`: a run on a Ray cluster, sent and watched from afar. Imports no torch."""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from cuboid.launch.run_folder import run_folder
from cuboid.launch.submit_address import settle_access
from cuboid.launch.submit_options import SubmitOptions
from cuboid.launch.submit_parcel import RECIPE, Parcel, pack
from cuboid.launch.submitted import SENT
from cuboid.launch.training import this_command
from cuboid.parallel.errors import UserError, UserErrors
from cuboid.trainer.check import resolve_devices, settings_errors
from cuboid.trainer.check_folders import absolute_errors, copy_errors
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.recipe_file import read_recipe
from cuboid.trainer.version import version

if TYPE_CHECKING:
    from cuboid.launch.ray_jobs import Jobs

_ON_RAY = ("launch.launcher=ray", "launch.address=null")
_STOP_SECONDS = 600
"""How long a job that is asked to stop may take for its checkpoint before Ray kills it; Ray's own is 3."""


def submit(options: SubmitOptions) -> int:
    """Send a recipe with what it needs, and follow the job; returns its exit code.

    Raises:
        UserError: what is wrong with the recipe and shows here; the files are too large; the address may not be used.
        RunFailed: the cluster does not take the job.
    """
    with tempfile.TemporaryDirectory() as place:
        recipe, parcel = _prepared(options, Path(place, "job"))
        jobs = connect(options.address, insecure=options.insecure)
        job = f"{recipe.name}-{uuid.uuid4().hex[:8]}"
        flag = {None: [], True: ["--resume"], False: ["--fresh"]}[options.resume]
        print(f"sending {_told(parcel)} to {jobs.address}")
        jobs.submit(
            job,
            parcel.folder,
            # exec: Ray signals the shell too, and it would be gone before the run has ended
            f"exec python -m cuboid.launch.cli train {RECIPE} {shlex.join(flag)}".rstrip(),
            environment={"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS), SENT: version()},
            about={"cuboid": version(), "folder": str(run_folder(recipe))},
        )
    print(f"job {job}, cuboid {version()}, run {run_folder(recipe)}", flush=True)
    if options.detach:
        print(_ways_on(jobs, job))
        return 0
    return follow(jobs, job)


def _prepared(options: SubmitOptions, folder: Path) -> tuple[Recipe, Parcel]:
    """The resolved recipe, and all that is sent. What needs the nodes' files or devices to tell, the job checks before
    it starts a rank."""
    source = read_recipe(options.recipe, [*(options.overrides or ()), *_ON_RAY])
    recipe = source.recipe()
    try:
        recipe = resolve_devices(recipe, None)
        errors = [*settings_errors(recipe, runs_here=False), *absolute_errors(recipe), *copy_errors(recipe)]
        if errors:
            raise UserErrors(errors)
        return recipe, pack(recipe, folder)
    except UserError as error:
        raise source.located(error) from None


def connect(address: str, *, insecure: bool) -> Jobs:
    """The jobs of a cluster that may be talked to. Raises UserError for every other one."""
    address = settle_access(address, insecure=insecure)
    from cuboid.launch.ray_jobs import Jobs

    return Jobs(address)


def follow(jobs: Jobs, job: str) -> int:
    """Show what a job prints until it ends; returns its exit code. Ctrl-C leaves it running."""
    from cuboid.launch.ray_jobs import exit_code, why_not_begun

    try:
        ended = jobs.follow(job, _show)
    except KeyboardInterrupt:
        print(f"\n{job} goes on. {_ways_on(jobs, job)}")
        return 130
    if words := why_not_begun(ended):
        print(f"cuboid: the job did not begin: {words}", file=sys.stderr)
    return exit_code(ended)


def print_logs(jobs: Jobs, job: str) -> None:
    """What a job has printed until now."""
    _show(jobs.logs(job))


def print_jobs(jobs: Jobs) -> None:
    """A line for each job of `cuboid submit`, newest first."""
    found = jobs.submitted()
    if not found:
        print(f"no run was submitted to {jobs.address}")
    for job in found:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.start_time or 0) / 1000))
        print(f"{job.submission_id}  {job.status.lower():<9}  {began}  {job.metadata['folder']}")


def stop(jobs: Jobs, job: str) -> None:
    """Stop a job after a checkpoint, and say what became of it."""
    if not jobs.details(job).status.is_terminal():
        print("stopping after a checkpoint", flush=True)
    ended = jobs.stop(job)
    words = [line for line in jobs.logs(job).splitlines() if line.startswith("cuboid: ")]
    print("\n".join([*words[-1:], f"{job}: {ended.status.lower()}"]))


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _ways_on(jobs: Jobs, job: str) -> str:
    command = f"{this_command()} {{}} {job} --address {jobs.address}"
    return f"follow it: {command.format('logs --follow')}\nstop it, with a checkpoint: {command.format('stop')}"


def _told(parcel: Parcel) -> str:
    parts = ", ".join(f"{part} {size / 1e6:.1f} MB" for part, size in parcel.bytes_by_part.items())
    return f"{parcel.bytes / 1e6:.1f} MB ({parts})"
