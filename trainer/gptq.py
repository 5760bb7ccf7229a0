"""Weights rounded so that a layer's outputs over a calibration set move little.

GPTQ (Frantar et al. 2022, "GPTQ: Accurate post-training quantization for generative pre-trained transformers",
Algorithm 1).

The weights of one input feature are rounded after those of another, and the features that are still to be rounded make
up for what that did to the outputs. torchao 0.18 has the algorithm for CUDA alone, and for other formats.

Shapes: O outputs, I inputs, G inputs that share a scale, K = I / G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Grid: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Scale and zero point, [O, 1] each, that suit weights [O, G]."""


class Rounded(NamedTuple):
    """A weight is ``(code - zero) * scale``."""

    codes_OI: Tensor
    """int8."""
    scales_OK: Tensor
    zeros_OK: Tensor


def gptq(weight_OI: Tensor, hessian_II: Tensor, *, group_size: int, levels: tuple[int, int], grid: Grid) -> Rounded:
    """Round a linear layer's weight.

    Args:
        hessian_II: X'X of the layer's inputs X, positive definite: half the second derivative of the squared error.
        levels: the lowest and the highest code.
        grid: asked once a group, when its weights have made up for all that was rounded before.
    """
    weight_OI, codes_OI = weight_OI.float().clone(), torch.empty_like(weight_OI, dtype=torch.int8)
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    factor_II = torch.linalg.cholesky(inverse_II, upper=True)
    scales, zeros = [], []
    for start in range(0, weight_OI.shape[1], group_size):
        group, rest = slice(start, start + group_size), slice(start + group_size, None)
        part_OG, factor_GG = weight_OI[:, group], factor_II[group, group]
        scale, zero = grid(part_OG)
        step = scale.float()
        errors_OG = torch.empty_like(part_OG)
        for column in range(group_size):
            wanted_O1 = part_OG[:, column, None]
            code_O1 = ((wanted_O1 * (1 / step)).round() + zero).clamp(*levels)
            error_O1 = (wanted_O1 - (code_O1 - zero) * step) / factor_GG[column, column]
            part_OG[:, column:] -= error_O1 * factor_GG[column, column:]
            codes_OI[:, start + column, None] = code_O1
            errors_OG[:, column, None] = error_O1
        weight_OI[:, rest] -= errors_OG @ factor_II[group, rest]  # once a group: within it all is up to date
        scales.append(scale)
        zeros.append(zero)
    return Rounded(codes_OI, torch.cat(scales, 1), torch.cat(zeros, 1))
