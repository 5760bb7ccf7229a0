"""What one stage holds on one rank: of its parameters for the whole run, of a microbatch while it passes.

The stage is the one that `assemble` makes, on `meta`: a microbatch runs through it forward and backward, and what lives
of its tensors is counted. So whatever a family, an adapter or recomputation keeps is counted, and not told by a formula
for each. What FSDP would add to the stage is put beside it here: gathered layers and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cuboid.parallel.gradients import local, local_gradient
from cuboid.parallel.live_bytes import FusedAttention, LiveBytes
from cuboid.parallel.loss import SummedCrossEntropy
from cuboid.parallel.mesh import Block
from cuboid.parallel.stages import Masks, Stage, apply_activation_checkpointing
from cuboid.trainer.assemble import divided_stage, microbatch_shapes, reshards_after_forward, stages_of_rank
from cuboid.trainer.model import DTYPES, Blueprint
from cuboid.trainer.parts import make_quantization
from cuboid.trainer.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one stage on one rank. What a microbatch takes counts from what stood before it."""

    parameters: int
    """Held for the whole run: this rank's shard, frozen ones included."""
    optimizer: int
    """Two moments of what is trained."""
    sharded_gradients: int
    """What is left of the gradients for the update."""
    gathered: int
    """Whole parameters of the stage, in the type that computes, from the step's first forward to its last backward."""
    gradients: int
    """From the first backward on: whole, and added up over the microbatches."""
    held: int
    """By a microbatch between its forward and its backward."""
    forward: int
    """Most while a microbatch goes forward, what it then holds included."""
    first_backward: int
    """Most while the first one goes back, with the gradients as they come and what it holds."""
    backward: int
    """The same of a later one, whose gradients are added to those that are there (and not counted here)."""
    messages: int
    """Buffers for what neighbouring stages send, of all microbatches."""


def footprint(recipe: Recipe, block: Block, blueprint: Blueprint, layers: Sequence[int]) -> Footprint:
    """Of the stage with these layers, cut out of ``blueprint``, on the rank of ``block`` (`mesh.imagine`); of a model
    without experts."""
    plainly = recipe.model_copy(
        update={"parallel": recipe.parallel.model_copy(update={"activation_checkpointing": "none"})}
    )
    stage = divided_stage(plainly, block, blueprint, layers, quantization=make_quantization(recipe, block))
    for layer in stage.layers.values():
        layer.forward = partial(_with_fused_attention, layer.forward)
    if recipe.parallel.activation_checkpointing == "full":  # around it, so that what is computed again is as fused
        apply_activation_checkpointing(stage)
    units = _units(recipe, block, stage)
    stored = sum(unit.stored(parameter) for unit in units for parameter in unit.parameters)
    # a tied head whose embedding stands on this rank too follows that one, and is not updated itself
    follows = blueprint.anatomy.tied and stage.is_last and not stage.is_first and 0 in stages_of_rank(recipe, block)
    spared = stage.get_parameter(blueprint.anatomy.head_weight) if follows else None
    updated = [(unit, p) for unit in units for p in unit.parameters if p.requires_grad and p is not spared]
    trained = sum(unit.stored(parameter) for unit, parameter in updated)
    is_wrapped = block.layout.data > 1 or blueprint.compute != torch.float32
    if blueprint.compute != torch.float32:
        stage.to(blueprint.compute)
        units = _units(recipe, block, stage)
    # what is replicated is never freed within a step
    reshards = is_wrapped and recipe.is_sharded and reshards_after_forward(recipe)
    gradients_in = DTYPES[recipe.precision.reduce] if is_wrapped else torch.float32
    shapes = microbatch_shapes(recipe, blueprint, block)
    stage.masks = partial(_masks, recipe, blueprint)
    loss = SummedCrossEntropy(block.mesh["tensor"].get_group())
    loss.num_valid_tokens = 1
    passing = _Passing(stage, units if reshards else [], gradients_in)
    held, forward, first_backward, backward = passing.count(_inputs(stage, shapes), loss)
    edges = (not stage.is_first) + (not stage.is_last)
    return Footprint(
        parameters=stored,
        optimizer=2 * trained,
        sharded_gradients=trained,
        gathered=sum(unit.whole_bytes for unit in units) if is_wrapped and not reshards else 0,
        gradients=passing.gradient_bytes,
        held=held,
        forward=forward,
        first_backward=first_backward,
        backward=backward,
        messages=edges * recipe.parallel.microbatches * _bytes(shapes["boundary"]),
    )


@dataclass(frozen=True, eq=False)
class _Unit:
    """Parameters that FSDP gathers together."""

    module: nn.Module
    parameters: Sequence[nn.Parameter]
    shards: int
    """Ranks among which each is divided along its first dimension, the last ones filled up."""

    def stored(self, parameter: nn.Parameter) -> int:
        own = local(parameter)
        rows = -(-own.shape[0] // self.shards)
        return rows * own[0].numel() * own.element_size()

    @property
    def whole_bytes(self) -> int:
        return sum(_bytes(local(parameter)) for parameter in self.parameters)


def _units(recipe: Recipe, block: Block, stage: Stage) -> list[_Unit]:
    """As `apply_data_parallel` takes them: layers, and all that is left."""
    shards = block.layout.data // block.layout.replicas if recipe.is_sharded else 1
    units, taken = [], set[nn.Parameter]()
    for module in (*stage.layers.values(), stage):
        own = [parameter for parameter in module.parameters() if parameter not in taken]
        taken.update(own)
        units.append(_Unit(module, own, shards))
    return units


class _Passing:
    """Passes microbatches through a stage on `meta`, and keeps beside it what FSDP would: gradients in their own type,
    and a unit's whole parameters while it computes, where they are freed after a forward."""

    def __init__(self, stage: Stage, freed: Sequence[_Unit], gradients_in: torch.dtype) -> None:
        self._stage, self._gradients_in = stage, gradients_in
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._gathered: dict[_Unit, Tensor] = {}
        for parameter in stage.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._keep_gradient)
        for unit in freed:
            unit.module.register_forward_pre_hook(partial(self._gather, unit))
            unit.module.register_forward_hook(partial(self._computed, unit))

    @property
    def gradient_bytes(self) -> int:
        return sum(map(_bytes, self._gradients.values()))

    def count(self, inputs: Mapping[str, Tensor], loss: SummedCrossEntropy) -> tuple[int, int, int, int]:
        """Bytes: held between forward and backward; at most in a forward; in the first backward; in a later one."""
        found = []
        with LiveBytes([*inputs.values(), *self._stage.parameters(), *self._stage.buffers()]) as live:
            for _ in range(2):
                before = live.peak = live.now
                output = self._forward(inputs)  # which the pipeline holds until the backward
                end = loss(output, inputs["labels"]) if self._stage.is_last else output
                forward, held, live.peak = live.peak - before, live.now - before, live.now
                torch.autograd.backward(end, torch.empty_like(end))
                found.append(live.peak - before)
                del output, end
                self._gathered.clear()
        return held, forward, found[0], found[1]

    def _forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = self._stage(inputs["x"], position_ids=inputs["position_ids"])
        return output

    def _keep_gradient(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        if parameter not in self._gradients:
            self._gradients[parameter] = torch.empty_like(local_gradient(parameter), dtype=self._gradients_in)
        parameter.grad = None

    def _gather(self, unit: _Unit, *_: Any) -> None:
        if unit not in self._gathered:
            arrived = torch.empty(unit.whole_bytes, dtype=torch.uint8, device="meta")
            self._gathered[unit] = torch.empty_like(arrived)  # copied out of what arrived

    def _computed(self, unit: _Unit, module: nn.Module, args: Any, output: Tensor) -> None:
        self._gathered.pop(unit, None)
        if output.requires_grad:
            output.register_hook(partial(self._gather, unit))


def _with_fused_attention(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    with FusedAttention():
        return forward(*args, **kwargs)


def _inputs(stage: Stage, shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a microbatch brings to the stage, on `meta`."""
    batch, tokens = shapes["logits"].shape[:2]
    ids = torch.empty(batch, tokens, dtype=torch.int64, device="meta")
    x = ids if stage.is_first else shapes["boundary"].detach().requires_grad_()
    return {"x": x, "position_ids": ids, "labels": ids}


def _masks(recipe: Recipe, blueprint: Blueprint, position_ids: Tensor) -> Masks:
    """Masks on `meta`, of the kind that documents in a sequence need: to see where they begin takes numbers."""
    batch, tokens = position_ids.shape
    small = blueprint.masks(torch.tensor([range(4) if recipe.data.cross_documents else (0, 1, 0, 1)]))
    own = {kind: mask for kind, mask in small.items() if mask is not None}
    return dict.fromkeys(small) | {
        kind: torch.empty(batch, *mask.shape[1:-2], tokens, tokens, dtype=mask.dtype, device="meta")
        for kind, mask in own.items()
    }


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
