"""Quantization-aware training: linear layers that compute with rounded weights, on any mesh.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
section 3. What a layer computes with is rounded anew in each forward, its parameters stay as they are, and
the gradient passes the rounding as if it were none (Bengio, Leonard and Courville 2013, "Estimating or Propagating
Gradients Through Stochastic Neurons", section 4, the straight-through estimator).

Shapes: F outputs and D inputs of a linear on this rank, R rank of an adapter, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Partial

from cuboid.parallel.local import local_parameters
from cuboid.parallel.tensor import adapted

Round = Callable[[Tensor], Tensor]
"""Values [..., D] -> those that stay of them, float32; each row (or group of its columns) for itself."""


@dataclass(frozen=True)
class Rounding:
    """How a linear layer is rounded."""

    weight: Round
    """Of a matrix [F, D]."""
    by_row: bool
    """Whether a row shares a scale; else groups of neighbouring inputs do, of which no rank has one in part."""
    inputs: Round | None = None
    """Of what the layer reads, [B, T, D], a token a row; None: as it is."""


class FakeQuantization:
    """Makes the linears of stages compute with rounded weights, from the step ``start_step`` on.

    Args:
        group: of the tensor axis, whose ranks may share rows.
    """

    def __init__(self, rounding: Rounding, group: ProcessGroup, *, start_step: int) -> None:
        self.rounding, self.group, self.start_step = rounding, group, start_step
        self.is_on = start_step == 1

    def begin(self, step: int) -> None:
        """Before the step of this number, on every rank: what is computed from here on is rounded, or is not yet."""
        self.is_on = step >= self.start_step

    def apply(self, model: nn.Module, *, head: str) -> None:
        """Change the linears of a model or stage in place, all but the head, which exports leave alone too."""
        for name, linear in linears(model, head=head):
            if name.endswith(".base_layer"):
                self._take_over(model.get_submodule(name.removesuffix(".base_layer")), linear)
            else:
                self._wrap(linear)

    def _take_over(self, layer: Any, base: nn.Linear) -> None:
        """A linear with an adapter (peft's) computes with the sum of both, rounded: W + scaling B A, [F, D], is what
        stands in the merged model, and what an export rounds."""
        (down,), (up,) = layer.lora_A.values(), layer.lora_B.values()
        (scaling,) = layer.scaling.values()

        def product() -> Tensor:
            # of a divided matrix each rank's rows or columns give a part of the gradient of the whole A or B
            with local_parameters(down, Partial()), local_parameters(up, Partial()):
                return (up.weight @ down.weight) * scaling  # [F, R] x [R, D]

        self._wrap(base, product)
        layer.forward = lambda x_BTD: base(x_BTD)

    def _wrap(self, linear: nn.Linear, adapter: Callable[[], Tensor] | None = None) -> None:
        def forward(x_BTD: Tensor) -> Tensor:
            weight_FD = linear.weight if adapter is None else linear.weight + adapter()
            if not self.is_on:
                return F.linear(x_BTD, weight_FD, linear.bias)
            rounding, is_cut = self.rounding, weight_FD.shape[1] < linear.in_features
            weight_FD = _StraightThrough.apply(weight_FD, self._whole(rounding.weight, is_cut and rounding.by_row))
            if rounding.inputs is not None:
                x_BTD = _StraightThrough.apply(x_BTD, self._whole(rounding.inputs, is_cut))
            return F.linear(x_BTD, weight_FD, linear.bias)

        linear.forward = forward  # type: ignore[method-assign, assignment]

    def _whole(self, round_: Round, is_cut: bool) -> Round:
        """The rounding of rows [..., D] that tensor ranks may share: a row's scale depends on its extremes alone, so
        that each rank appends those of the whole row as two more columns."""

        def rounded(x: Tensor) -> Tensor:
            extremes = torch.stack([x.amax(-1), -x.amin(-1)], dim=-1)
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.group)
            extremes[..., 1].neg_()
            return round_(torch.cat([x, extremes], dim=-1))[..., :-2]

        return rounded if is_cut else round_


def linears(model: nn.Module, *, head: str) -> Iterator[tuple[str, nn.Linear]]:
    """The linears that are rounded, by name: all but the head and the matrices of adapters."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and adapted(name) != head and ".lora_" not in name:
            yield name, module


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Round) -> Tensor:
        return rounded(x.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
