"""The block of ranks against the batch and the schedule. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec

from cuboid.parallel.errors import FieldError, UserError, one_of
from cuboid.parallel.layout import divisors
from cuboid.parallel.schedules import SCHEDULES
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.version import torch_version

_TORCH_FOR_A_V = (2, 13)


def mesh_errors(recipe: Recipe) -> Iterator[UserError]:
    """Groups of data ranks, the batch among them, and what the schedule asks for."""
    yield from _shard_errors(recipe)
    try:
        assert recipe.batch_plan
    except FieldError as error:
        yield error
    yield from _schedule_errors(recipe)


def _shard_errors(recipe: Recipe) -> Iterator[UserError]:
    shard, data = recipe.parallel.shard, recipe.layout.data
    if not isinstance(shard, bool) and data % shard:
        constraint = f"does not divide parallel.data={data} into groups"
        yield FieldError("parallel.shard", shard, constraint, f"use {one_of(divisors(data))}, or true or false")


def _schedule_errors(recipe: Recipe) -> Iterator[UserError]:
    name = recipe.parallel.schedule
    if SCHEDULES[name].looped and recipe.parallel.pipeline == 1:
        constraint = "has nothing to interleave on 1 pipeline rank"
        yield FieldError("parallel.schedule", name, constraint, "use 1f1b, or parallel.pipeline=2 or more")
        return
    if SCHEDULES[name].v_shaped and find_spec("torch") and torch_version() < _TORCH_FOR_A_V:
        # torch 2.11 opens its connections by sending from each stage to the next, also where both stand on one rank
        constraint = f"lays neighbouring stages on one rank, which torch {metadata.version('torch')} cannot start"
        remedy = "use torch 2.13 or newer, or schedule interleaved_zero_bubble"
        yield FieldError("parallel.schedule", name, constraint, remedy)
    if SCHEDULES[name].splits_backward and recipe.parallel.reshard is True:
        # FSDP would free the parameters between the two halves of a backward, and the second read what is not there
        constraint = f"frees parameters that {name} needs again for the weight gradients"
        yield FieldError("parallel.reshard", "true", constraint, "use auto or false")
    if SCHEDULES[name].splits_backward and recipe.parallel.activation_checkpointing != "none":
        # each group of weights is a backward of its own to autograd, and each would compute the layer once more
        constraint = f"would compute a layer again for each of its weights under {name}, whose backwards are split"
        yield FieldError("parallel.activation_checkpointing", "full", constraint, "use none, or another schedule")
    yield from SCHEDULES[name].check(
        pipeline=recipe.parallel.pipeline,
        virtual_stages=virtual_stages(recipe),
        microbatches=recipe.parallel.microbatches,
    )


def virtual_stages(recipe: Recipe) -> int:
    """Stages of each pipeline rank."""
    return recipe.parallel.virtual_stages or SCHEDULES[recipe.parallel.schedule].default_virtual_stages
