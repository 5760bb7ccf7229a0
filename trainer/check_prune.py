"""What cannot be pruned, in words. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING

from cuboid.parallel.errors import FieldError
from cuboid.trainer.recipe import Recipe

if TYPE_CHECKING:
    from cuboid.trainer.model import Blueprint
    from cuboid.trainer.model_config import PretrainedConfig

_TRANSPOSED = ("gpt2",)
"""Families whose weights are [in, out]."""


def prune_errors(recipe: Recipe) -> Iterator[FieldError]:
    """Every field of the pruning that does not go with another."""
    if (settings := recipe.prune) is None:
        return
    if settings.last_step < settings.begin_step:
        constraint = f"is before prune.begin_step={settings.begin_step}"
        yield FieldError("prune.end_step", settings.end_step, constraint, f"use {settings.begin_step} or more, or null")
    elif settings.last_step > recipe.train.steps:
        field, value = "begin_step" if settings.end_step is None else "end_step", settings.last_step
        constraint = f"is after the last of train.steps={recipe.train.steps}"
        yield FieldError(f"prune.{field}", value, constraint, f"use at most {recipe.train.steps}")
    if settings.method == "2:4":
        if settings.ratio != 0.5:
            yield FieldError("prune.ratio", settings.ratio, "is not the share of two in four", "use 0.5, or magnitude")
        if settings.last_step != settings.begin_step:
            constraint = "lets a share grow that prune.method=2:4 fixes"
            yield FieldError("prune.end_step", settings.end_step, constraint, "use null, or magnitude")
    if settings.multiple is not None and settings.method != "channels":
        constraint = f"says nothing of prune.method={settings.method}"
        yield FieldError("prune.multiple", settings.multiple, constraint, "use null, or channels")
    if settings.modules is not None and settings.is_structured:
        constraint = f"names single modules, and prune.method={settings.method} takes what works together"
        yield FieldError("prune.modules", ", ".join(settings.modules), constraint, "use null, or magnitude")
    if recipe.lora is not None:
        yield FieldError("prune", "{...}", "would change weights that lora leaves frozen", "use null, or lora=null")
    if recipe.parallel.engine == "deepspeed":
        constraint = "updates parameters where no zero can be kept"
        yield FieldError("parallel.engine", "deepspeed", f"{constraint} (prune)", "use native")


def prunable_errors(
    recipe: Recipe, config: PretrainedConfig, found: Mapping[str, Sequence[int]], all_: Mapping[str, Sequence[int]]
) -> Iterator[FieldError]:
    """What the model's own weights forbid.

    Args:
        found: name and shape [out, in] of what would be pruned.
        all_: of what could be, whatever `prune.modules` says.
    """
    from cuboid.trainer.model_config import num_experts

    settings, tensor = recipe.prune, recipe.parallel.tensor
    assert settings is not None
    if num_experts(config):
        yield FieldError("prune", "{...}", f"cannot prune the experts of this {config.model_type} yet", "use null")
        return
    there = {name.split(".")[-2] for name in all_}
    if unknown := [name for name in settings.modules or () if name not in there]:
        constraint = f"names no linear module in the layers of this {config.model_type}"
        yield FieldError("prune.modules", ", ".join(unknown), constraint, f"use some of {', '.join(sorted(there))}")
    if settings.method != "2:4":
        return
    sizes = {(name.split(".")[-2], inputs) for name, (_, inputs) in found.items()}
    if config.model_type in _TRANSPOSED:
        constraint = f"needs weights [out, in], and this {config.model_type} has them the other way round"
        yield FieldError("prune.method", "2:4", constraint, "use magnitude")
    elif uneven := sorted((name, inputs) for name, inputs in sizes if inputs % (4 * tensor)):
        words = ", ".join(f"{name} ({inputs})" for name, inputs in uneven)
        constraint = f"needs inputs in fours on each tensor rank (of {tensor}), unlike those of {words}"
        rest = sorted(there - {name for name, _ in uneven})
        remedy = f"use magnitude, or prune.modules of {', '.join(rest)}" if rest else "use magnitude"
        yield FieldError("prune.method", "2:4", constraint, remedy)


def structure_errors(recipe: Recipe, blueprint: Blueprint) -> Iterator[FieldError]:
    """Which heads, channels or layers the model cannot lose, or too few of them for the ratio."""
    from cuboid.trainer.compact import fits
    from cuboid.trainer.model import parameter_shapes
    from cuboid.trainer.model_config import num_experts
    from cuboid.trainer.structures import structures

    settings, config = recipe.prune, blueprint.config
    if settings is None or not settings.is_structured or num_experts(config):
        return
    shapes = parameter_shapes(blueprint)
    try:
        units = structures(config, settings, shapes)
    except FieldError as error:
        yield error
        return
    words = {"heads": f"key-value heads of this {config.model_type}", "channels": "channels of a layer"}
    what = f"the {units.units} {words.get(units.method, units.method)}"
    if len(units.counts) == 1:
        constraint = f"finds no smaller config, whatever it takes of {what}"
        yield FieldError("prune.method", units.method, constraint, "use magnitude")
    elif (count := units.count(settings.ratio)) == 0:
        least = units.counts[1]
        constraint = f"takes none of {what}, of which at least {least} must go at once"
        yield FieldError("prune.ratio", settings.ratio, constraint, f"use {ceil(1000 * least / units.units) / 1000:g}")
    elif not fits(config, units, shapes, count):
        constraint = f"cannot take heads of this {config.model_type}, whose norms read all heads at once"
        yield FieldError("prune.method", units.method, constraint, "use channels or layers")
