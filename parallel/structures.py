"""Pruning of whole structures (heads, channels, layers) of divided parameters: every mesh removes the same ones.

A unit is what goes as a whole: rows of some matrices with their biases, and columns of others. It is removed by setting
all of it to zero, so that nothing changes its shape in training; an export leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cuboid.parallel.gradients import local, local_gradient, replicas
from cuboid.parallel.local import owned_slices
from cuboid.parallel.mesh import Block
from cuboid.parallel.stages import Stage


@dataclass(frozen=True)
class Cut:
    """Which units a parameter's rows (``dim`` 0) or columns (1) belong to: ``size`` neighbours each, from ``first``."""

    dim: int
    size: int
    first: int

    def units(self, rows: slice) -> Tensor:
        """The unit of each of these rows (or columns) of the whole parameter."""
        return self.first + torch.arange(rows.start, rows.stop) // self.size


class StructuredPruning:
    """Removes units of ``parameters``, as many from each of ``groups`` groups of ``units`` units.

    Args:
        parameters: those of this rank that units have a part in, each with its units; other stages have theirs.
    """

    def __init__(
        self, parameters: Sequence[tuple[nn.Parameter, Cut]], *, groups: int, units: int, block: Block
    ) -> None:
        self.block, self.shape = block, (groups, units)
        self._parts = [
            (parameter, cut.dim, cut.units(owned_slices(parameter)[cut.dim]).to(block.device))
            for parameter, cut in parameters
        ]
        self._gone = torch.zeros(groups * units, dtype=torch.bool, device=block.device)
        """The same on every rank; no file holds it, since what is gone is zero."""

    @torch.no_grad()
    def squares(self) -> Tensor:
        """Sum of the squared weights of each unit, [groups, units], the same on every rank. Weights that only work
        together are judged together (Ma et al. 2023, "LLM-Pruner", section 3.1), by their norm (Li et al. 2017,
        "Pruning Filters for Efficient ConvNets", section 3.1)."""
        squares = torch.zeros(len(self._gone), dtype=torch.float64, device=self.block.device)
        ranks = self.block.layout.data * self.block.layout.tensor
        for parameter, dim, units in self._parts:
            weight = local(parameter).movedim(dim, 0)
            weight = weight if weight.dim() == 2 else weight.unsqueeze(1)
            norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)
            squares.index_add_(0, units, norms.square() / replicas(parameter, ranks))
        dist.all_reduce(squares)
        # the order of a sum moves its last bits in float64 alone: what is equal stays equal on every mesh
        return squares.float().view(self.shape)

    @torch.no_grad()
    def remove(self, scores: Tensor, count: int) -> float:
        """Of each group have ``count`` units gone: those that are, and then those with the lowest of ``scores``
        [groups, units], of equal ones the first. Returns the share that is gone now."""
        scores = scores.to(self._gone.device).masked_fill(self._gone.view(self.shape), -torch.inf)
        lowest = scores.argsort(dim=1, stable=True)[:, :count]
        self._gone.view(self.shape).scatter_(1, lowest, True)
        for parameter, dim, units in self._parts:
            self._clear(local(parameter), dim, units)
        return self._gone.double().mean().item()

    def resume(self) -> None:
        """After weights were loaded: what was removed before is zero in them."""
        self._gone = self.squares().flatten() == 0

    def mask_gradients(self) -> None:
        """Before the norm: what is gone has no gradient."""
        for parameter, dim, units in self._parts:
            if parameter.grad is not None:
                self._clear(local_gradient(parameter), dim, units)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around the optimizer's update, which moves zeros too, by the moments of earlier gradients."""
        yield
        with torch.no_grad():
            for parameter, dim, units in self._parts:
                self._clear(local(parameter), dim, units)

    def _clear(self, tensor: Tensor, dim: int, units: Tensor) -> None:
        """Zero what belongs to gone units in this rank's part of a parameter or of its gradient."""
        tensor.movedim(dim, -1).masked_fill_(self._gone[units], 0.0)


@torch.no_grad()
def influence(stages: Iterable[Stage], run: Callable[[], Any], block: Block) -> Tensor:
    """How much each layer changes its input, [layers], the same on every rank: 1 - the mean cosine between what enters
    and what leaves it, over all tokens that ``run`` sends through ``stages`` (Men et al. 2024, "ShortGPT", section 3,
    block influence)."""
    stages = list(stages)
    num_layers = len(stages[0].anatomy.layer_kinds)
    sums = torch.zeros(num_layers, 2, dtype=torch.float64, device=block.device)

    def watch(index: int, layer: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            cosines = F.cosine_similarity(args[0].double(), output.double(), dim=-1)  # [B, t]
            sums[index] += torch.stack([cosines.sum(), cosines.new_tensor(cosines.numel())])

        return layer.register_forward_hook(hook)

    hooks = [watch(int(index), layer) for stage in stages for index, layer in stage.layers.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    # tensor ranks that see the same tokens, without sequence parallelism, add the same to both sums
    dist.all_reduce(sums)
    return 1.0 - sums[:, 0] / sums[:, 1]
