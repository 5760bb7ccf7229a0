"""Ranks as Ray Train's workers, on a local cluster of the run's own, a given one, or that of a submitted job.

The driver's side. It imports no Ray, which reads its settings from the environment while it is imported (`ray_group`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cuboid.launch import slurm_ray
from cuboid.launch.failures import Ending
from cuboid.launch.supervise import drive
from cuboid.launch.worker import Train
from cuboid.trainer.recipe import Recipe

IN_JOB = "slurm"
"""As `launch.address`: a cluster on the nodes of the Slurm job in which the command runs."""

_SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of a recipe are the command's
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # what a rank prints goes to its own file, once
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # how soon a dead rank is noticed
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "50",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_OWN_CLUSTER = {
    # Ray's switch for laptops: every port of the cluster is bound to the loopback address alone. Without it raylet,
    # object store and the agent's HTTP server listen to the network, whatever _node_ip_address says.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away
    "RAY_prestart_worker_first_driver": "0",  # Ray Train's workers are never taken from those
}


def launch(recipe: Recipe, folder: Path, *, train: Train | None = None) -> int:
    """Run the recipe on Ray; returns the command's exit code.

    Args:
        recipe: resolved.
        folder: the run's folder, on storage that every node sees.
        train: what each rank runs; the training loop unless something else is launched.

    Raises:
        UserError: the run's folder cannot be written.
    """
    folder = folder.absolute()
    return drive(recipe, folder, partial(_host, recipe, folder, train))


def _host(recipe: Recipe, folder: Path, train: Train | None) -> Ending:
    address = recipe.launch.address or os.environ.get("RAY_ADDRESS")
    if address == "local":
        address = None
    for name, value in (_SETTINGS if address else _SETTINGS | _OWN_CLUSTER).items():
        os.environ.setdefault(name, value)
    storage = folder / ".ray"
    try:
        if address == IN_JOB:
            with slurm_ray.cluster(folder) as (head, nodes):
                return _run(recipe, folder, storage, head, train, nodes)
        return _run(recipe, folder, storage, address, train)
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _run(
    recipe: Recipe, folder: Path, storage: Path, address: str | None, train: Train | None, nodes: Sequence[str] = ()
) -> Ending:
    from cuboid.launch.ray_group import Group

    return Group(recipe, folder, storage=storage).run(address, train, nodes)
