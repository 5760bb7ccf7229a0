"""Frozen matrices held in 4 bits, and the linear that computes with them: NF4 (Dettmers et al. 2023, "QLoRA", arXiv
2305.14314, section 3).

Of a row of W [F, D] each 64 numbers are a block of 34 bytes: 32 with two numbers each, the earlier one in the high
half, and their scale, the largest of their absolute values, in bfloat16. In all that is 4.25 bits a number. The paper's
second quantization, of 256 scales together, would make it 4.13; here a block needs nothing beside it, so that a rank
makes its own part from the same part of W, and no shard but one that cuts a block can change a number.

Shapes: B batch, T tokens, D inputs, F outputs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 64
"""Numbers that share a scale."""
_HALF = BLOCK // 2
BLOCK_BYTES = _HALF + 2
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The sixteen values, in units of the scale: quantiles of a normal distribution (appendix E)."""


def packed(weight_FD: Tensor) -> Tensor:
    """[F, D] in float32 -> [F, D / 64, 34] of bytes: each number becomes the nearest level of its block."""
    blocks = weight_FD.unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1, keepdim=True).to(torch.bfloat16)
    levels = torch.tensor(LEVELS)
    # in units of the scale as it is kept; a block of zeros stays one
    codes = torch.bucketize(blocks / scales.float().clamp_min(1e-30), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return torch.cat([codes[..., 0::2] << 4 | codes[..., 1::2], scales.view(torch.uint8)], dim=-1)


def unpacked(blocks: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[F, D / 64, 34] of bytes -> [F, D] in ``dtype``: level times scale."""
    scales = blocks[..., _HALF:].contiguous().view(torch.bfloat16).float()
    levels = F.embedding(blocks[..., :_HALF].int(), _pairs(blocks.device)).flatten(-2)
    return levels.mul_(scales).flatten(-2).to(dtype)


def values(tensor: Tensor) -> Tensor:
    """What a whole parameter stands for: itself, or the numbers that its bytes are."""
    return unpacked(tensor) if tensor.dtype is torch.uint8 else tensor


@cache
def _pairs(device: torch.device) -> Tensor:
    """[256, 2]: the two levels of each byte."""
    byte = torch.arange(256)
    return torch.tensor(LEVELS)[torch.stack([byte >> 4, byte & 15], dim=-1)].to(device)


class _Product(torch.autograd.Function):
    """x W^T. Forward and backward each unpack W, which lives no longer than its product."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, blocks: Tensor) -> Tensor:
        ctx.save_for_backward(blocks)
        return F.linear(x_BTD, unpacked(blocks, x_BTD.dtype))

    @staticmethod
    def backward(ctx: Any, grad_BTF: Tensor) -> tuple[Tensor, None]:
        (blocks,) = ctx.saved_tensors
        return grad_BTF @ unpacked(blocks, grad_BTF.dtype), None


class NF4Linear(nn.Module):
    """A linear whose frozen weight is held in blocks, [F, D / 64, 34] of bytes; its bias stays what it is."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        shape = (linear.out_features, linear.in_features // BLOCK, BLOCK_BYTES)
        blocks = torch.empty(shape, dtype=torch.uint8, device=linear.weight.device)
        self.weight = nn.Parameter(blocks, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x_BTD: Tensor) -> Tensor:
        product = _Product.apply(x_BTD, self.weight)
        return product if self.bias is None else product + self.bias


def frozen_linears(layers: nn.Module) -> dict[str, nn.Linear]:
    """Names and modules of the linears within layers whose weight is not trained: what is held in 4 bits."""
    return {
        name: module
        for name, module in layers.named_modules()
        if type(module) is nn.Linear and not module.weight.requires_grad
    }


def hold_in_4_bits(layers: nn.Module) -> None:
    """Put an `NF4Linear` in the place of each linear in ``layers`` that is frozen, its values still to be set."""
    for name, linear in frozen_linears(layers).items():
        layers.set_submodule(name, NF4Linear(linear))
