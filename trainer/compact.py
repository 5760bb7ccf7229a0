"""A checkpoint's weights without the heads, channels or layers that were pruned: smaller tensors, a smaller config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cuboid.trainer.model import draw_blueprint, parameter_shapes
from cuboid.trainer.recipe import PruneSettings
from cuboid.trainer.shards import DTYPES
from cuboid.trainer.structures import Rest, Structures, smaller_config, structures
from cuboid.trainer.tensor_table import TensorRecord

if TYPE_CHECKING:
    from cuboid.trainer.export import Weights
    from cuboid.trainer.model_config import PretrainedConfig


@dataclass(frozen=True)
class Compact:
    """Weights as `export.Weights` gives them, of the smaller model."""

    whole: Weights
    parts: Mapping[str, Rest]
    """By the name in the smaller model."""

    @cached_property
    def records(self) -> dict[str, TensorRecord]:
        return {
            name: replace(self.whole.records[part.name], shape=part.shape, chunks=())
            for name, part in self.parts.items()
        }

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Read the whole of each of ``tensors`` in place."""
        for name, tensor in tensors.items():
            part = self.parts[name]
            tensor.copy_(part.of(_read(self.whole, part.name)))


def compact(weights: Weights, config: PretrainedConfig, settings: PruneSettings) -> tuple[Compact, PretrainedConfig]:
    """The weights and the config without what is zero; the same where nothing is gone yet."""
    shapes = {name: record.shape for name, record in weights.records.items()}
    units = structures(config, settings, shapes)
    gone = _gone(weights, units)
    kept = (~gone[0]).nonzero().flatten().tolist()  # of the first group: of layers, which are one, these very ones
    smaller = smaller_config(config, units.method, kept)
    smaller.architectures, smaller.dtype = config.architectures, config.dtype
    return Compact(weights, units.rest(shapes, gone)), smaller


def fits(config: PretrainedConfig, units: Structures, shapes: Mapping[str, Sequence[int]], count: int) -> bool:
    """Whether the smaller config, where each group has lost ``count`` units, has just what is left of the weights."""
    gone = torch.arange(units.units).expand(units.groups, -1) < count
    smaller = draw_blueprint(smaller_config(config, units.method, range(count, units.units)))
    return {name: part.shape for name, part in units.rest(shapes, gone).items()} == parameter_shapes(smaller)


def _gone(weights: Weights, units: Structures) -> Tensor:
    """Which units are zero, bool [groups, units]: in each group as many, which its config can say."""
    alive = torch.zeros(units.groups * units.units, dtype=torch.bool)
    for name, cut in units.cuts.items():
        weight = _read(weights, name).movedim(cut.dim, 0)
        alive[cut.units(slice(0, len(weight)))[weight.reshape(len(weight), -1).any(1)]] = True
    dead = ~alive.view(units.groups, units.units)
    count = max(count for count in units.counts if count <= int(dead.sum(1).min()))
    return dead & (dead.cumsum(1) <= count)


def _read(weights: Weights, name: str) -> Tensor:
    tensor = torch.empty(weights.records[name].shape, dtype=DTYPES[weights.records[name].dtype])
    weights.fill({name: tensor})
    return tensor
