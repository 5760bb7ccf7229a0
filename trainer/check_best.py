"""What `checkpoint.best` needs of other fields, in words. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from cuboid.parallel.errors import FieldError
from cuboid.trainer.recipe import Recipe


def best_errors(recipe: Recipe) -> Iterator[FieldError]:
    """The best of what is never evaluated, or never saved, cannot be kept."""
    best = recipe.checkpoint.best
    if best is not None and not recipe.train.eval_every:
        constraint = "has nothing to judge by: train.eval_every=0"
        yield FieldError("checkpoint.best", best, constraint, "use train.eval_every=1 or more, or null")
    if best is not None and not recipe.checkpoint.every:
        constraint = "would keep a checkpoint of a run that saves none: checkpoint.every=0"
        yield FieldError("checkpoint.best", best, constraint, "use checkpoint.every=1 or more, or null")
