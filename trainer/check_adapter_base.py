"""What the frozen matrices beside adapters cannot be, in words: in 4 bits, or without a part of them. Imports no
torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from math import gcd
from typing import TYPE_CHECKING

from cuboid.parallel.errors import FieldError, one_of
from cuboid.parallel.layout import divisors
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.version import torch_version

if TYPE_CHECKING:
    from cuboid.trainer.model import Blueprint
    from cuboid.trainer.recipe_lora import LoraSettings

_DRAWN = ("default", "gaussian")
"""Ways to draw A of whatever shape, beside a B of zeros."""
_TORCH_THAT_KEEPS_BYTES = (2, 13)
"""Whose FSDP casts no parameter to the type of activations that is no number."""


def base_errors(recipe: Recipe) -> Iterator[FieldError]:
    """Every field that does not go with `lora.base` or `lora.init`, whatever the model."""
    if recipe.lora is None:
        return
    rank, init = recipe.lora.rank, recipe.lora.init
    if init == "orthogonal" and rank % 2:
        yield FieldError("lora.rank", rank, f"is odd, and lora.init={init} halves it", f"use {rank + 1}")
    if recipe.lora.target_parameters and init not in _DRAWN:
        constraint = "is not offered for fused experts (lora.target_parameters)"
        yield FieldError("lora.init", init, constraint, f"use {one_of(_DRAWN)}")
    if recipe.lora.base is None:
        return
    if recipe.lora.dora:
        constraint = "keeps no rows of numbers, whose lengths lora.dora=true takes at each step"
        yield FieldError("lora.base", recipe.lora.base, constraint, "use null, or lora.dora=false")
    if recipe.parallel.engine == "deepspeed":
        constraint = "is held in bytes, which parallel.engine=deepspeed would take for numbers"
        yield FieldError("lora.base", recipe.lora.base, constraint, "use null, or parallel.engine=native")
    if recipe.precision.compute != "float32" and find_spec("torch") and torch_version() < _TORCH_THAT_KEEPS_BYTES:
        constraint = f"is held in bytes, which torch {metadata.version('torch')} gathers as {recipe.precision.compute}"
        remedy = "use torch 2.13 or newer, or precision.compute=float32"
        yield FieldError("lora.base", recipe.lora.base, constraint, remedy)


def size_errors(recipe: Recipe, settings: LoraSettings, blueprint: Blueprint) -> Iterator[FieldError]:
    """Where the model's matrices are too small for what is taken out of them, or do not divide into blocks."""
    from cuboid.trainer.adapters import with_adapters

    if settings.takes_out:
        targets = [m for m in with_adapters(blueprint, settings).model.modules() if hasattr(m, "lora_A")]
        least = min(min(target.in_features, target.out_features) for target in targets)
        if settings.rank > least:
            constraint = f"is more than lora.init={settings.init} can take out of the smallest target"
            yield FieldError("lora.rank", settings.rank, constraint, f"use at most {least}")
    if settings.base == "nf4":
        yield from _block_errors(recipe, settings, blueprint)


def _block_errors(recipe: Recipe, settings: LoraSettings, blueprint: Blueprint) -> Iterator[FieldError]:
    from cuboid.parallel.nf4 import BLOCK, frozen_linears
    from cuboid.parallel.tensor import Role, adapted, pattern
    from cuboid.trainer.adapters import linears, with_adapters
    from cuboid.trainer.model import tensor_plan

    model, anatomy, tensor = blueprint.model, blueprint.anatomy, recipe.parallel.tensor
    if any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in linears(model, anatomy)):
        constraint = f"rounds rows of inputs, and this {blueprint.config.model_type} has its matrices transposed"
        yield FieldError("lora.base", "nf4", constraint, "use null")
        return
    inputs = {
        pattern(adapted(name)): linear.in_features
        for name, linear in frozen_linears(with_adapters(blueprint, settings).model).items()
        if name.startswith(f"{anatomy.base}.{anatomy.layers}.")
    }
    if uneven := {name: size for name, size in inputs.items() if size % BLOCK}:
        constraint = f"has blocks of {BLOCK} inputs, which do not divide those of {_ends(uneven)}"
        yield FieldError("lora.base", "nf4", constraint, "use null")
    elif tensor > 1:
        with suppress(FieldError):  # a model that cannot be divided at all is told by itself
            plan = tensor_plan(blueprint)
            blocks = {n: size // BLOCK for n, size in inputs.items() if plan.get(n) in (Role.ROW, Role.ROW_CUT)}
            if cut := {name: count for name, count in blocks.items() if count % tensor}:
                constraint = f"does not divide the blocks of {BLOCK} inputs of {_ends(cut)}, held as lora.base=nf4"
                fits = divisors(gcd(*blocks.values()))
                yield FieldError("parallel.tensor", tensor, constraint, f"use {one_of(fits)}, or lora.base=null")


def _ends(sizes: Mapping[str, int]) -> str:
    """``q_proj (576), down_proj (1536)``."""
    return ", ".join(dict.fromkeys(f"{name.rpartition('.')[2]} ({size})" for name, size in sizes.items()))
