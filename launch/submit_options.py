"""The options of `cuboid submit`, as one value. Imports no torch; typer alone, for what help says of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from cuboid.launch.recipe_options import Overrides, RecipeName

ADDRESS = typer.Option(
    envvar="RAY_API_SERVER_ADDRESS", help="URL of the cluster's job API (its dashboard), as http://localhost:8265."
)
INSECURE = typer.Option(
    "--insecure",
    help="Also a cluster without token authentication on a network, where anyone can run code.",
)


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """What is sent, where to, and how it begins there."""

    recipe: RecipeName
    overrides: Overrides = None
    address: Annotated[str, ADDRESS]
    resume: Annotated[
        bool | None,
        typer.Option("--resume/--fresh", help="As of `cuboid train`, for the run's folder there.", show_default=False),
    ] = None
    insecure: Annotated[bool, INSECURE] = False
    detach: Annotated[bool, typer.Option("--detach", help="Return once the job is there; do not follow it.")] = False
