"""What `faults` needs of other fields, in words. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from cuboid.parallel.errors import FieldError
from cuboid.trainer.recipe import Recipe


def fault_errors(recipe: Recipe) -> Iterator[FieldError]:
    """Answers that the engine cannot give, and rewinding where nothing is saved."""
    for field in ("not_finite", "spike"):
        answer = getattr(recipe.faults, field)
        if answer == "rewind" and not recipe.checkpoint.every:
            constraint = "has nothing to go back to: checkpoint.every=0"
            yield FieldError(f"faults.{field}", answer, constraint, "use skip, or checkpoint.every=1 or more")
        if answer not in (None, "stop") and recipe.parallel.engine == "deepspeed":
            constraint = "goes on without an update, and the deepspeed engine has summed gradients that it keeps"
            yield FieldError(f"faults.{field}", answer, constraint, "use stop, or parallel.engine=native")
