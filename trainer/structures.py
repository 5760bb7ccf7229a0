"""What of a model goes as a whole (heads, channels, layers): which weights each unit has, and the config without some.

A config has one number of heads and one width for all layers, so that each layer loses as many.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cuboid.parallel.errors import FieldError, one_of
from cuboid.parallel.structures import Cut
from cuboid.trainer.depth import shallower
from cuboid.trainer.recipe import PruneSettings

if TYPE_CHECKING:
    from cuboid.trainer.model_config import PretrainedConfig

FAMILIES = ("gemma2", "gemma3_text", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")
"""Families whose layers have the modules below, and whose residual stream passes by a layer that writes nothing."""
_MODULES: Mapping[str, Mapping[str, int]] = {
    "heads": {"self_attn.q_proj": 0, "self_attn.k_proj": 0, "self_attn.v_proj": 0, "self_attn.o_proj": 1},
    "channels": {"mlp.gate_proj": 0, "mlp.up_proj": 0, "mlp.down_proj": 1},
}
"""Modules that a unit has a part in: of their rows (0) or columns (1)."""
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
"""Modules by which a layer writes into the residual stream: without them it gives its input."""
_MULTIPLE = 32
_LAYER = re.compile(r"(.*\.layers)\.(\d+)\.(.*)\.(weight|bias)")


@dataclass(frozen=True)
class Structures:
    """The units of a model: ``groups`` groups of ``units`` units, and which parameters they are made of."""

    method: str
    groups: int
    """Layers; 1 where the units are the layers."""
    units: int
    cuts: Mapping[str, Cut]
    """By the parameter's global name."""
    counts: Sequence[int]
    """How many units a group may lose, from 0 on."""

    def count(self, ratio: float) -> int:
        """The most of them that are at most this share."""
        return max(count for count in self.counts if count <= ratio * self.units + 1e-6)

    def rest(self, shapes: Mapping[str, Sequence[int]], gone: Tensor) -> dict[str, Rest]:
        """What the parameters of a whole model become without the units that are ``gone``, bool [groups, units]."""
        left = (~gone).flatten()
        if self.method == "layers":
            numbers = {int(layer): number for number, layer in enumerate(left.nonzero())}
            return dict(_renumbered(shapes, numbers))
        whole = {name: Rest(name, tuple(shape)) for name, shape in shapes.items()}
        return whole | {name: _less(name, shapes[name], cut, left) for name, cut in self.cuts.items()}


@dataclass(frozen=True)
class Rest:
    """A parameter of a model that has lost units: what it is of the parameter ``name`` of the whole one."""

    name: str
    shape: tuple[int, ...]
    dim: int = 0
    rows: Tensor | None = None
    """Indices along ``dim``; None: all."""

    def of(self, whole: Tensor) -> Tensor:
        return whole if self.rows is None else whole.index_select(self.dim, self.rows)


def _renumbered(shapes: Mapping[str, Sequence[int]], numbers: Mapping[int, int]) -> Iterator[tuple[str, Rest]]:
    for name, shape in shapes.items():
        found = _LAYER.fullmatch(name)
        if found is None:
            yield name, Rest(name, tuple(shape))
        elif (number := numbers.get(int(found[2]))) is not None:
            yield f"{found[1]}.{number}.{found[3]}.{found[4]}", Rest(name, tuple(shape))


def _less(name: str, shape: Sequence[int], cut: Cut, left: Tensor) -> Rest:
    rows = left[cut.units(slice(0, shape[cut.dim]))].nonzero().flatten()
    less = [len(rows) if dim == cut.dim else size for dim, size in enumerate(shape)]
    return Rest(name, tuple(less), cut.dim, rows)


def structures(config: PretrainedConfig, settings: PruneSettings, shapes: Mapping[str, Sequence[int]]) -> Structures:
    """The units of the model with this config and parameters of these shapes, by global name.

    Raises:
        FieldError: the model has no such units, or its config cannot say that some are missing.
    """
    method, layers = settings.method, config.num_hidden_layers
    if config.model_type not in FAMILIES:
        constraint = f"does not know which weights these are in this {config.model_type}"
        raise FieldError("prune.method", method, constraint, f"use magnitude, or a model of {one_of(list(FAMILIES))}")
    if method == "layers":
        cuts = dict(_cuts(shapes, dict.fromkeys(_WRITERS, 0), units=1))
        return Structures(method, 1, layers, cuts, range(layers))
    units = config.num_key_value_heads if method == "heads" else config.intermediate_size
    cuts = dict(_cuts(shapes, _MODULES[method], units=units))
    multiple = settings.multiple or _MULTIPLE
    if method == "channels":
        counts = [gone for gone in range(units) if gone == 0 or (units - gone) % multiple == 0]
    else:
        counts = [gone for gone in range(units) if gone == 0 or _has_config(config, method, range(units - gone))]
    return Structures(method, layers, units, cuts, counts)


def _cuts(shapes: Mapping[str, Sequence[int]], modules: Mapping[str, int], *, units: int) -> Iterator[tuple[str, Cut]]:
    """Of each parameter of these modules in a layer; a bias is one of rows, and that of a module which is divided by
    columns belongs to no unit."""
    for name, shape in shapes.items():
        found = _LAYER.fullmatch(name)
        if found is None or found[3] not in modules:
            continue
        dim = modules[found[3]]
        if found[4] == "weight" or dim == 0:
            yield name, Cut(dim, shape[dim] // units, int(found[2]) * units)


def _has_config(config: PretrainedConfig, method: str, kept: Sequence[int]) -> bool:
    try:
        smaller_config(config, method, kept)
    except Exception:  # each class refuses sizes in its own way
        return False
    return True


def smaller_config(config: PretrainedConfig, method: str, kept: Sequence[int]) -> PretrainedConfig:
    """The config of a model that has lost units; raises ValueError (or what its class raises) where there is none.

    Args:
        kept: the units that a group still has; which ones they are matters for layers alone.
    """
    values: dict[str, Any] = config.to_dict()
    if method == "heads":
        group = config.num_attention_heads // config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # else the family would divide hidden_size by the new number
        values |= {"num_attention_heads": group * len(kept), "num_key_value_heads": len(kept), "head_dim": width}
    elif method == "channels":
        values |= {"intermediate_size": len(kept)}
    smaller = type(config).from_dict(values)
    return shallower(smaller, kept) if method == "layers" else smaller
