"""Pruning of divided parameters by magnitude: every mesh zeroes the same weights.

What is pruned is what is zero. There is no mask beside the weights that could be lost or differ: once pruning has
begun, a zero stays zero, in the optimizer, in a checkpoint and in an export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cuboid.parallel.gradients import local, local_gradient, replicas
from cuboid.parallel.mesh import Block

_HALF = 1 << 16
"""Numbers of 16 bits: an order is found in two looks at the weights, each at one half of their bits."""


class Pruning:
    """Zeroes weights among ``parameters`` of all ranks together.

    Args:
        parameters: those of this rank that are pruned, float32, [out, in]; other stages have theirs.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], block: Block) -> None:
        self.parameters, self.block = parameters, block
        self.begun = False

    @torch.no_grad()
    def smallest(self, ratio: float) -> float:
        """Zero the share ``ratio`` that is smallest by magnitude, over all parameters together (Han et al. 2015,
        "Learning both Weights and Connections", with one threshold). Returns the share that is zero now: more where
        several weights are as large as the threshold.

        The order of floats that are not negative is that of their bits, so that counting finds the threshold exactly,
        and counts do not depend on how the weights are divided.
        """
        self.begun = True
        upper = self._counts(lambda bits: bits >> 16)
        total = upper.sum()
        rank = int(ratio * total)  # of the largest weight that goes, from 1
        if rank > 0:
            high, before = _find(upper, rank)
            high_and_low = self._counts(lambda bits: bits[bits >> 16 == high] & (_HALF - 1))
            low, _ = _find(high_and_low, rank - before)
            threshold = torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32).item()
            for parameter in self.parameters:
                weight = local(parameter)
                weight.masked_fill_(weight.abs() <= threshold, 0.0)
        return (self._counts(lambda bits: bits.clamp(max=1))[0] / total).item()

    @torch.no_grad()
    def two_of_four(self) -> float:
        """Of each four weights that meet neighbouring inputs, zero the two that are smallest by magnitude (Mishra et
        al. 2021, "Accelerating Sparse Deep Neural Networks", section 3). Returns the share that is zero now."""
        self.begun = True
        for parameter in self.parameters:
            weight = local(parameter)
            fours = weight.view(weight.numel() // 4, 4)
            fours.scatter_(1, fours.abs().argsort(dim=1, stable=True)[:, :2], 0.0)
        counts = self._counts(lambda bits: bits.clamp(max=1))
        return (counts[0] / counts.sum()).item()

    def mask_gradients(self) -> None:
        """Before the norm: what is pruned has no gradient."""
        if self.begun:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    local_gradient(parameter).masked_fill_(local(parameter) == 0, 0.0)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around the optimizer's update, which moves zeros too, by the moments of earlier gradients."""
        if not self.begun:
            yield
            return
        zeros = [local(parameter) == 0 for parameter in self.parameters]
        yield
        with torch.no_grad():
            for parameter, zero in zip(self.parameters, zeros, strict=True):
                local(parameter).masked_fill_(zero, 0.0)

    def _counts(self, key: Callable[[Tensor], Tensor]) -> Tensor:
        """How many weights of all ranks have each key from 0 to 2^16 - 1 of their magnitude's bits, float64."""
        counts = torch.zeros(_HALF, dtype=torch.float64, device=self.block.device)
        ranks = self.block.layout.data * self.block.layout.tensor
        for parameter in self.parameters:
            bits = local(parameter).abs().view(torch.int32).flatten()
            # what several ranks hold counts once
            counts += torch.bincount(key(bits), minlength=_HALF) / replicas(parameter, ranks)
        dist.all_reduce(counts)
        return counts.round().cpu()


def _find(counts: Tensor, rank: int) -> tuple[int, int]:
    """The key of the weight with this rank (from 1), and how many have smaller keys."""
    cumulative = counts.cumsum(0)
    key = int(torch.searchsorted(cumulative, rank))
    return key, int(cumulative[key] - counts[key])
