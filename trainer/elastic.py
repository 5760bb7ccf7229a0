"""Data ranks that come and go: with how many a run may go on, and what changes then. Imports no torch.

The global batch and the microbatch stay as they are, and so do the samples of each step: fewer data ranks accumulate
more microbatches each. The sums are the same but for their order.
"""

from __future__ import annotations

from collections.abc import Iterator

from cuboid.parallel.errors import FieldError, UserError, one_of
from cuboid.trainer.check_mesh import mesh_errors
from cuboid.trainer.recipe import Recipe


def sizes(recipe: Recipe) -> list[Recipe]:
    """The recipe with each number of data ranks that it may run with, most of them first; resolved and checked."""
    data, settings = recipe.layout.data, recipe.launch
    fewest, most = settings.min_data or data, settings.max_data or data
    return [found for count in range(most, fewest - 1, -1) if (found := resized(recipe, count))]


def resized(recipe: Recipe, data: int) -> Recipe | None:
    """The recipe on so many data ranks, its batch and microbatches as large as ever; None where that is not even."""
    if data == recipe.parallel.data:
        return recipe
    sequences = data * recipe.batch_plan.microbatch_size
    if recipe.train.global_batch % sequences or data * recipe.parallel.tensor % recipe.parallel.expert:
        return None
    update = {"data": data, "microbatches": recipe.train.global_batch // sequences}
    found = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=update)})
    return None if any(mesh_errors(found)) else found


def elastic_errors(recipe: Recipe) -> Iterator[UserError]:
    """The bounds of an elastic run; of a recipe whose mesh is right."""
    bounds = {name: getattr(recipe.launch, name) for name in ("min_data", "max_data")}
    if not any(bounds.values()) or any(mesh_errors(recipe)):
        return
    data = recipe.layout.data
    for name, bound in bounds.items():
        if bound is None:
            continue
        field, at_least = f"launch.{name}", name == "max_data"
        if recipe.launch.launcher != "ray":
            constraint = f"needs nodes that come and go, and launcher {recipe.launch.launcher} looks for none"
            yield FieldError(field, bound, constraint, "use launch.launcher=ray, or null")
        elif recipe.checkpoint.every == 0:
            yield FieldError(field, bound, "goes on from a checkpoint, and checkpoint.every=0 makes none", "use null")
        elif (bound < data) if at_least else (bound > data):
            less = "less" if at_least else "more"
            yield FieldError(field, bound, f"is {less} than parallel.data={data}", f"use {_fitting(recipe, at_least)}")
        elif resized(recipe, bound) is None:
            batch = f"{recipe.train.global_batch} sequences in microbatches of {recipe.batch_plan.microbatch_size}"
            constraint = f"data ranks cannot share {batch} evenly under this schedule and sharding"
            yield FieldError(field, bound, constraint, f"use {_fitting(recipe, at_least)}")


def _fitting(recipe: Recipe, at_least: bool) -> str:
    data, most = recipe.layout.data, recipe.train.global_batch // recipe.batch_plan.microbatch_size
    counts = range(data, most + 1) if at_least else range(1, data + 1)
    return one_of([count for count in counts if resized(recipe, count)])
