"""What cannot be trained with rounded weights, in words. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from math import gcd
from typing import TYPE_CHECKING

from cuboid.parallel.errors import FieldError, one_of
from cuboid.parallel.layout import divisors
from cuboid.trainer.recipe import Recipe

if TYPE_CHECKING:
    from cuboid.trainer.model import Blueprint

_SMALLEST_GROUP = 8


def quantize_errors(recipe: Recipe, *, runs_here: bool) -> Iterator[FieldError]:
    """Every field that does not go with rounding, whatever the model.

    Args:
        runs_here: ranks start on this machine, so that the package must be there.
    """
    if (settings := recipe.quantize) is None:
        return
    if runs_here and find_spec("torchao") is None:
        yield FieldError(
            "quantize", "{...}", "needs the package torchao", "pip install 'cuboid[quantize]', or use null"
        )
    if settings.inputs_together is None and settings.group_size is not None:
        constraint = f"says nothing of quantize.scheme={settings.scheme}, where a whole row shares a scale"
        yield FieldError("quantize.group_size", settings.group_size, constraint, "use null, or int4")
    if settings.start_step > recipe.train.steps:
        constraint = f"is after the last of train.steps={recipe.train.steps}"
        yield FieldError("quantize.start_step", settings.start_step, constraint, f"use at most {recipe.train.steps}")
    if settings.start_step > 1 and recipe.checkpoint.best is not None:
        constraint = "would compare losses in full precision with rounded ones, of before and after "
        constraint += f"quantize.start_step={settings.start_step}"
        yield FieldError("checkpoint.best", recipe.checkpoint.best, constraint, "use null, or quantize.start_step=1")
    if settings.scheme == "float8" and recipe.prune is not None:
        constraint = "divides a row by its largest magnitude, and prune may leave nothing of one"
        yield FieldError("quantize.scheme", "float8", constraint, "use int8 or int4, or prune=null")
    if recipe.lora is not None and recipe.lora.dora:
        yield FieldError("lora.dora", "true", "is not yet proven with quantize", "use false, or quantize=null")
    if recipe.lora is not None and recipe.lora.target_parameters:
        constraint = "are adapters of experts, which quantize leaves as they are: not yet proven together"
        targets = ", ".join(recipe.lora.target_parameters)
        yield FieldError("lora.target_parameters", targets, constraint, "use null, or quantize=null")
    if recipe.prune is not None and recipe.prune.is_structured:
        constraint = "leaves out inputs that share scales with others, or whole layers: not yet proven with quantize"
        remedy = "use magnitude or 2:4, or prune first and train its export with quantize"
        yield FieldError("prune.method", recipe.prune.method, constraint, remedy)
    if recipe.lora is not None and recipe.lora.base is not None:
        constraint = "is rounded once already, beside what quantize rounds at each step"
        yield FieldError("lora.base", recipe.lora.base, constraint, "use null, or quantize=null")
    if recipe.lora is not None and recipe.lora.dropout > 0:
        constraint = "drops inputs of the adapter alone, and what is rounded is its sum with the matrix (quantize)"
        yield FieldError("lora.dropout", recipe.lora.dropout, constraint, "use 0.0")


def group_errors(recipe: Recipe, blueprint: Blueprint) -> Iterator[FieldError]:
    """Groups that a linear's inputs, or a tensor rank's part of them, do not divide into; and a model without linears.

    Args:
        blueprint: of the model without adapters, which a tensor plan divides.
    """
    from cuboid.trainer.model import local_inputs

    if (settings := recipe.quantize) is None:
        return
    sizes, family, tensor = (
        local_inputs(blueprint, recipe.parallel.tensor),
        blueprint.config.model_type,
        recipe.parallel.tensor,
    )
    if not sizes:
        yield FieldError(
            "quantize", "{...}", f"rounds linear layers, and {family} keeps its matrices in others", "use null"
        )
    together = settings.inputs_together
    if together is None or not (uneven := {name: size for name, size in sizes.items() if size % together}):
        return
    fits = [size for size in divisors(gcd(*sizes.values())) if size >= _SMALLEST_GROUP]
    words = ", ".join(f"{name} ({size})" for name, size in sorted(uneven.items()))
    where = f" on each of parallel.tensor={tensor} ranks" if tensor > 1 else ""
    constraint = f"does not divide the inputs{where} of {words}"
    remedy = f"use {one_of(fits)}" if fits else "use scheme int8"
    yield FieldError("quantize.group_size", together, constraint, remedy)
