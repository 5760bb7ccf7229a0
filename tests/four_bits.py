"""What a model in one process, and a mesh that is compared with it, hold of frozen matrices in 4 bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from cuboid.parallel.nf4 import frozen_linears, packed, unpacked
from cuboid.trainer.weights import CopyInto


@torch.no_grad()
def round_frozen(layers: nn.Module) -> None:
    """Give each frozen linear the numbers that 4 bits stand for."""
    for linear in frozen_linears(layers).values():
        linear.weight.copy_(unpacked(packed(linear.weight)))


def cut_out_of(weights: Mapping[str, torch.Tensor]) -> CopyInto:
    """Of a matrix that is held in 4 bits its blocks, of all else the numbers."""

    def copy_into(name: str, part: tuple[slice, ...], target: torch.Tensor) -> None:
        target.copy_((packed(weights[name]) if target.dtype is torch.uint8 else weights[name])[part])

    return copy_into
