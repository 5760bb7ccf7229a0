"""The memory that each rank of a run will need, before any rank starts: from the recipe and the model's shapes alone.

One rank of each pipeline coordinate stands for all of its data and tensor ranks; it is the first, whose shards are the
largest. The schedule is gone through action by action, with what `footprint` has counted of each of the rank's stages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cuboid.parallel.layout import Coordinate
from cuboid.parallel.mesh import imagine
from cuboid.parallel.schedules import Action, order
from cuboid.parallel.simulation import UNITS, simulate
from cuboid.trainer.assemble import layers_of_stages, stages_of_rank
from cuboid.trainer.check_mesh import virtual_stages
from cuboid.trainer.footprint import Footprint, footprint
from cuboid.trainer.model import Blueprint, draw_blueprint, estimate_costs, parameter_shapes
from cuboid.trainer.model_config import config_of
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.recipe_preference import ADAPTER

_LONG_BYTES = 8
_OF_A_TOKEN = 3
"""Numbers of a token in a batch: its id, its label, its position."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes that a rank of this pipeline coordinate holds in the fullest moment of a step."""

    pipeline: int
    stages: tuple[int, ...]
    parameters: int
    optimizer: int
    gathered: int
    """Whole layers and copies in the type that computes."""
    gradients: int
    activations: int
    """Of all microbatches that are between their forward and their backward."""
    messages: int
    """The batch, and buffers for what other stages send."""
    working: int
    """What the action under way takes beside."""
    states: int
    """Parameters, moments and gradients, all sharded: no choice of microbatches makes a run need less."""

    @property
    def total(self) -> int:
        parts = self.parameters, self.optimizer, self.gathered, self.gradients, self.activations
        return sum(parts) + self.messages + self.working

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total}


def predict(recipe: Recipe) -> list[RankMemory]:
    """By pipeline coordinate. To be called in a process that starts no ranks: torch keeps facts of process groups in
    its caches, and ranks that are forked would find those of groups that never were.

    Args:
        recipe: that has passed `check`.

    Raises:
        NotPredicted: it asks for something that is not counted yet.
    """
    if reason := _not_counted(recipe):
        raise NotPredicted(reason)
    layout, blueprint = recipe.layout, adapted_blueprint(recipe)
    if blueprint.anatomy.experts:
        raise NotPredicted("what a mixture's experts hold depends on the tokens that come to them")
    split = layers_of_stages(recipe, blueprint)  # before anything is cut out, divided or packed
    found = []
    for pipeline, actions in enumerate(schedule_of(recipe)):
        with imagine(layout, rank=layout.rank(Coordinate(pipeline, 0, 0))) as block:
            indices = stages_of_rank(recipe, block)
            parts = {index: footprint(recipe, block, blueprint, split[index]) for index in indices}
        found.append(_fullest(recipe, pipeline, parts, actions))
    return found


class NotPredicted(Exception):
    """Of this recipe the memory is not counted; in words."""


def _not_counted(recipe: Recipe) -> str | None:
    if recipe.parallel.engine == "deepspeed":
        return "the deepspeed engine keeps buffers of its own"
    if recipe.distill is not None:
        return "the teacher is not counted"
    if recipe.preference is not None and recipe.preference.reference != ADAPTER:
        return "the reference is not counted"
    return None


def schedule_of(recipe: Recipe) -> list[list[Action]]:
    """What each pipeline rank does in a step."""
    return order(
        recipe.parallel.schedule,
        pipeline=recipe.layout.pipeline,
        virtual_stages=virtual_stages(recipe),
        microbatches=recipe.parallel.microbatches,
    )


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What stands on a stage."""

    index: int
    pipeline: int
    first_layer: int
    last_layer: int
    parameters: int
    """Numbers of the whole stage, over all of its tensor and data ranks."""
    cost: float
    """Share of a microbatch's FLOPs (`estimate_costs`)."""


def stages(recipe: Recipe) -> list[StagePlan]:
    """Every stage, in order."""
    blueprint = adapted_blueprint(recipe)
    split, costs = layers_of_stages(recipe, blueprint), _costs(recipe, blueprint)
    anatomy, sizes = blueprint.anatomy, [0] * len(split)
    stage_of = {layer: index for index, layers in enumerate(split) for layer in layers}
    prefix, ahead = f"{anatomy.base}.{anatomy.layers}.", (anatomy.embedding, anatomy.positions)
    for name, shape in parameter_shapes(blueprint).items():
        if name.startswith(prefix):
            index = stage_of[int(name.removeprefix(prefix).partition(".")[0])]
        else:
            index = 0 if name.removeprefix(f"{anatomy.base}.").partition(".")[0] in ahead else -1
        sizes[index] += shape.numel()
    if anatomy.tied and len(split) > 1:  # a head of its own
        sizes[-1] += blueprint.model.get_parameter(anatomy.embedding_weight).numel()
    place = {action.stage: rank for rank, actions in enumerate(schedule_of(recipe)) for action in actions}
    return [
        StagePlan(
            index=index,
            pipeline=place[index],
            first_layer=layers[0],
            last_layer=layers[-1],
            parameters=size,
            cost=cost / sum(costs),
        )
        for index, (layers, size, cost) in enumerate(zip(split, sizes, costs, strict=True))
    ]


def expected_bubble(recipe: Recipe) -> float:
    """Idle share of a step by the stages' estimated costs, if messages took no time."""
    costs = _costs(recipe, adapted_blueprint(recipe))
    return simulate(schedule_of(recipe), lambda action: UNITS[action.kind] * costs[action.stage]).bubble


def _costs(recipe: Recipe, blueprint: Blueprint) -> list[float]:
    size, length = recipe.batch_plan.microbatch_size, recipe.data.sequence_length
    costs = estimate_costs(blueprint, sequences=size, sequence_length=length)
    return costs.of(layers_of_stages(recipe, blueprint))


def adapted_blueprint(recipe: Recipe) -> Blueprint:
    """The model that is trained, with adapters where the recipe has them; no file of weights is read."""
    blueprint = draw_blueprint(config_of(recipe), attention=recipe.model.attention, compute=recipe.precision.compute)
    if recipe.lora is None:
        return blueprint
    from cuboid.trainer.adapters import settings_of, with_adapters

    return with_adapters(blueprint, settings_of(recipe.lora))


def _fullest(recipe: Recipe, pipeline: int, parts: Mapping[int, Footprint], actions: list[Action]) -> RankMemory:
    """Go through a step: a forward adds what a microbatch holds, a backward (its weight part) takes it away."""
    held: Counter[int] = Counter()
    begun: set[int] = set()
    """Stages whose gradients are there."""
    fullest, at = -1, (0, 0, 0)
    for action in actions:
        if action.kind == "R":
            continue
        stage = parts[action.stage]
        activations = sum(parts[index].held * count for index, count in held.items())
        gradients = sum(parts[index].gradients for index in begun)
        if action.kind == "F":
            beside = stage.forward
            held[action.stage] += 1
        else:
            beside = (stage.backward if action.stage in begun else stage.first_backward) - stage.held
        if activations + gradients + beside > fullest:
            own = min(beside, stage.held) if action.kind == "F" else 0
            fullest, at = activations + gradients + beside, (activations + own, gradients, beside - own)
        if action.kind in "BW":
            held[action.stage] -= 1
        if action.kind in "BIW":
            begun.add(action.stage)
    total = {name: sum(getattr(stage, name) for stage in parts.values()) for name in ("parameters", "optimizer")}
    rows = recipe.batch_plan.microbatch_size * recipe.parallel.microbatches
    batch = _OF_A_TOKEN * _LONG_BYTES * rows * recipe.data.sequence_length
    return RankMemory(
        pipeline=pipeline,
        stages=tuple(parts),
        **total,
        gathered=sum(stage.gathered for stage in parts.values()),
        activations=at[0],
        gradients=at[1],
        working=at[2],
        messages=batch + sum(stage.messages for stage in parts.values()),
        states=sum(total.values()) + sum(stage.sharded_gradients for stage in parts.values()),
    )
