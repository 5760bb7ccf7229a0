"""Where a Hugging Face folder keeps what the model holds fused: experts, one by one. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class _ExpertNames:
    """A family's names in its files: of the block that `mlp` is in memory, and of each part of a fused matrix."""

    block: str
    parts: Mapping[str, tuple[str, ...]]


_QWEN = _ExpertNames("mlp", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)})
_EXPERTS = {
    "mixtral": _ExpertNames("block_sparse_moe", {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}),
    "qwen3_moe": _QWEN,
    "olmoe": _QWEN,
}


@dataclass(frozen=True)
class Tile:
    """A tensor of a folder, and the box of a model's tensor that it is."""

    key: str
    box: tuple[slice, ...]
    is_expert: bool = False
    """Then the file's tensor is without the box's first dimension, which is 1."""

    @property
    def shape(self) -> list[int]:
        """In the file."""
        sizes = [part.stop - part.start for part in self.box]
        return sizes[1:] if self.is_expert else sizes


def tiles(family: str, name: str, shape: Sequence[int], *, dense: bool = False) -> list[Tile]:
    """What a folder of this family keeps in place of the model's tensor ``name``, in order; ``dense``: what a folder of
    the dense family keeps of which each expert is a copy."""
    names = _QWEN if dense else _EXPERTS.get(family)
    block, _, matrix = name.partition(".mlp.experts.")
    if names is None or not matrix:
        key = name if names is None else name.replace(".mlp.", f".{names.block}.")
        return [Tile(key, tuple(slice(0, size) for size in shape))]
    parts = names.parts[matrix]
    rows = shape[1] // len(parts)
    return [
        Tile(
            f"{block}.mlp.{part}.weight" if dense else f"{block}.{names.block}.experts.{expert}.{part}.weight",
            (slice(expert, expert + 1), slice(index * rows, (index + 1) * rows), slice(0, shape[2])),
            is_expert=True,
        )
        for expert in range(shape[0])
        for index, part in enumerate(parts)
    ]
