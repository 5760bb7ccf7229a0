"""What a rank computes and holds, looked at from outside: an option that does nothing shows here alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from cuboid.parallel.gradients import local
from cuboid.trainer.engine import Engine


@dataclass(frozen=True)
class Held:
    """A parameter on one rank: in how many parts it says that it is cut, and how much of it is there."""

    parts: dict[str, int]
    """By axis; an axis over which the parameter is whole is left out."""
    numel: int
    whole_numel: int
    is_matrix: bool


@dataclass(frozen=True)
class Work:
    """What a rank did in its first backward and what it holds: an option that does nothing shows here alone."""

    layer_calls: frozenset[int]
    """How often a layer computed, recomputation included; one number where all layers are alike."""
    layer_tokens: frozenset[int]
    """Tokens of the hidden states that enter a layer."""
    boundaries: frozenset[tuple[int, ...]]
    """Shapes [B, T_local, D] of what a stage gives to the next one."""
    logits: frozenset[tuple[int, ...]]
    """Shapes [B, T, V_local] of what the last stage gives to the loss."""
    held: dict[str, Held]


class Watch:
    """Looks on while an engine's stages compute."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._calls = engine, Counter[str]()
        self._tokens, self._boundaries, self._logits = set[int](), set[tuple[int, ...]](), set[tuple[int, ...]]()
        for stage in engine.pipeline.modules.values():
            outputs = self._logits if stage.is_last else self._boundaries
            stage.register_forward_hook(lambda _, args, output, outputs=outputs: outputs.add(tuple(output.shape)))
            for index, layer in stage.layers.items():
                layer.register_forward_pre_hook(lambda _, args: self._tokens.add(args[0].shape[1]))
                # inside of the layer, since a layer that is recomputed is not called again from outside
                layer.mlp.register_forward_pre_hook(lambda _, args, index=index: self._calls.update([index]))

    def work(self) -> Work:
        return Work(
            frozenset(self._calls.values()),
            frozenset(self._tokens),
            frozenset(self._boundaries),
            frozenset(self._logits),
            {name: _held(parameter) for name, parameter in self._engine.parameters},
        )


def _held(parameter: torch.Tensor) -> Held:
    parts: dict[str, int] = {}
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for axis, size, placement in zip(mesh.mesh_dim_names or (), mesh.shape, parameter.placements, strict=True):
            if not placement.is_replicate():
                parts[axis] = size
    return Held(parts, local(parameter).numel(), parameter.numel(), parameter.dim() > 1)
