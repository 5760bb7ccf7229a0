"""DoRA beside a divided linear: y = m / |W + s B A| (W x + s B A x), where |.| takes the length of each row.

Liu et al. 2024, "DoRA", equations 5 and 6; the lengths are constants to backward (section 4.3), so that what the ranks
tell each other of them needs no transpose. Rows that are cut are told by their squares, [D] numbers for each linear.

Shapes: B batch, T tokens, D inputs, F outputs; each of a rank.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Placement

from cuboid.parallel.collectives import gather_features
from cuboid.parallel.local import local_parameters


def apply_lengths(module: Any, group: ProcessGroup, *, cut: bool, gathered: bool, replicated_grad: Placement) -> None:
    """Let peft's `DoraLinearLayer` compute on the parts that the tensor ranks hold, in place.

    Args:
        module: whose ``weight`` is m; rows of its own on each rank, but whole where rows of W are cut.
        cut: each rank has a part of every row of W (a row-parallel linear).
        gathered: the linear gives the outputs of all ranks.
        replicated_grad: what a rank's gradient is of m and of a bias that are whole.
    """

    def forward(
        x: Tensor,
        *,
        lora_A: Any,
        lora_B: Any,
        scaling: float,
        base_layer: Any,
        base_result: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """What is to be added to W x + bias [B, T, F]; ``base_result`` is that, unless dropout has changed x."""
        product = base_layer(x) if base_result is None else base_result
        low_rank = scaling * lora_B(lora_A(x))
        with ExitStack() as stack:
            for part in (module, base_layer, lora_A, lora_B):
                stack.enter_context(local_parameters(part, replicated_grad))
            weight = base_layer.weight.T if module.fan_in_fan_out else base_layer.weight
            lengths = _lengths(weight, scaling, lora_B.weight, lora_A.weight, group=group if cut else None)
            factor, bias = module.weight / lengths, base_layer.bias
        if gathered:
            factor = gather_features(factor.unsqueeze(0), group)
            bias = bias if bias is None else gather_features(bias.unsqueeze(0), group)
        if bias is not None:
            product = product - bias
        return (factor - 1) * product + factor * low_rank

    module.forward = forward


@torch.no_grad()
def _lengths(weight: Tensor, scaling: float, b: Tensor, a: Tensor, *, group: ProcessGroup | None) -> Tensor:
    """Of the rows of W + s B A, [F]; with ``group`` each rank has a part of every row."""
    lengths = torch.linalg.vector_norm(weight + scaling * (b @ a), dim=1, dtype=torch.float32)
    if group is not None:
        squares = lengths.square()
        dist.all_reduce(squares, group=group)
        lengths = squares.sqrt()
    return lengths.to(weight.dtype)
