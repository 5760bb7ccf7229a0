"""The options of `cuboid drill`, as one value. Imports no torch; typer alone, for what help says of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from cuboid.launch.recipe_options import Overrides, RecipeName


@dataclass(frozen=True, kw_only=True)
class DrillOptions:
    """Which recipe is disturbed, and how. None stands for an option that was not given."""

    recipe: RecipeName
    overrides: Overrides = None
    faults: Annotated[
        str,
        typer.Option(
            help="KIND, KIND@RANK or KIND@RANK:STEP, separated by commas; kinds: kill, segv, exit, raise, stop "
            "(SIGSTOP), hang (holds the interpreter) and slow. A rank or step that is not given is drawn."
        ),
    ] = "kill"
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="Faults a minute at random moments until the run ends, each one of --faults; else once each."
        ),
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0
    against: Annotated[
        Path | None, typer.Option(help="An undisturbed run of the same recipe to compare with; default: one is run.")
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of the table.")] = False
