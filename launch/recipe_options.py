"""How every command takes a recipe: its name, and the fields that are given anew. Imports no torch; typer alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def recipe_names(incomplete: str) -> list[str]:
    """Shipped recipes and files here that begin so, for the shell's completion."""
    from cuboid.trainer.recipe_file import shipped_recipes

    files = [str(path) for path in sorted(Path().glob(f"{incomplete}*.yaml"))]
    return [name for name in shipped_recipes() if name.startswith(incomplete)] + files


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or the bare name of a shipped recipe.", autocompletion=recipe_names
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Fields of the recipe, as parallel.tensor=4; a mapping replaces the whole value."
    ),
]
