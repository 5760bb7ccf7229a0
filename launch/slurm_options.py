"""The options of `cuboid slurm`, as one value. Imports no torch; typer alone, for what help says of each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import typer

from cuboid.launch.recipe_options import Overrides, RecipeName


class Launcher(StrEnum):
    """What starts the ranks of a job."""

    local = "local"
    ray = "ray"


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What a job asks Slurm for. None stands for an option that was not given: the cluster's own default."""

    recipe: RecipeName
    overrides: Overrides = None
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")]
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each node, one for each rank; 0: CPUs.")] = 0
    cpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="CPUs of each node, which others may share; default: whole nodes.")
    ] = None
    time: Annotated[str | None, typer.Option(help="The job's time limit, as 12:00:00.")] = None
    partition: Annotated[str | None, typer.Option(help="The partition, a queue.")] = None
    account: Annotated[str | None, typer.Option(help="Who is charged.")] = None
    qos: Annotated[str | None, typer.Option(help="The quality of service.")] = None
    save_seconds: Annotated[
        int, typer.Option(min=10, help="How long before its time limit the job saves and goes back into the queue.")
    ] = 120
    max_requeues: Annotated[int, typer.Option(min=0, help="How often it goes back into the queue by itself.")] = 100
    launcher: Annotated[
        Launcher, typer.Option(help="local: srun starts the ranks; ray: a Ray cluster on the job's nodes does.")
    ] = Launcher.local
    submit: Annotated[bool, typer.Option("--submit", help="Hand the script to sbatch too.")] = False
