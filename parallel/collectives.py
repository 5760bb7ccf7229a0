"""The differentiable exchanges of tensor, sequence and expert parallelism, each with its transpose backward.

Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.2 (g and g-bar);
Shoeybi et al. 2019, "Megatron-LM", section 3 (f and g); Lepikhin et al. 2020, "GShard", section 3.2 (dispatch). Shapes:
B batch, T tokens, t = T / ranks, D model, F features, f = F / ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed both and warns at every call of the old names, the only ones that 2.11 has
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def all_gather_tokens(x_BtD: Tensor, group: ProcessGroup) -> Tensor:
    """[B, t, D] on each rank -> [B, T, D] on every rank."""
    ranks, (batch, tokens, *rest) = group.size(), x_BtD.shape
    gathered = x_BtD.new_empty(ranks * batch, tokens, *rest)
    _all_gather(gathered, x_BtD.contiguous(), group=group)
    if batch == 1:  # ranks and tokens are neighbours already
        return gathered.view(1, ranks * tokens, *rest)
    return gathered.view(ranks, batch, tokens, *rest).transpose(0, 1).reshape(batch, ranks * tokens, *rest)


def reduce_scatter_tokens(x_BTD: Tensor, group: ProcessGroup) -> Tensor:
    """Partial sums [B, T, D] on each rank -> this rank's tokens of the sum, [B, t, D]."""
    ranks, (batch, tokens, *rest) = group.size(), x_BTD.shape
    assert tokens % ranks == 0, f"{tokens} tokens do not divide by {ranks} ranks"
    by_rank = x_BTD.reshape(batch, ranks, tokens // ranks, *rest).transpose(0, 1).contiguous()
    summed = x_BTD.new_empty(batch, tokens // ranks, *rest)
    _reduce_scatter(summed, by_rank.view(ranks * batch, tokens // ranks, *rest), group=group)
    return summed


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_tokens(grad, ctx.group), None


class _ReduceScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather_tokens(grad, ctx.group), None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: Sequence[int], receive: Sequence[int], group: ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = (send, receive), group
        return _exchanged(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive = ctx.sizes
        return _exchanged(grad, receive, send, ctx.group), None, None, None


def _exchanged(x: Tensor, send: Sequence[int], receive: Sequence[int], group: ProcessGroup) -> Tensor:
    arrived = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(arrived, x.contiguous(), list(receive), list(send), group=group)
    return arrived


def exchange(x: Tensor, send: Sequence[int], receive: Sequence[int], group: ProcessGroup) -> Tensor:
    """Rows to other ranks: ``send[r]`` of this rank's rows [sum(send), D], in order, go to rank r, and ``receive[r]``
    come from it: [sum(receive), D]."""
    return x if group.size() == 1 else _Exchange.apply(x, send, receive, group)


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTf: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        ranks = group.size()
        gathered = x_BTf.new_empty(ranks * x_BTf.shape[0], *x_BTf.shape[1:])
        _all_gather(gathered, x_BTf.contiguous(), group=group)
        return torch.cat(gathered.chunk(ranks), dim=-1)

    @staticmethod
    def backward(ctx: Any, grad_BTF: Tensor) -> tuple[Tensor, None]:
        by_rank = torch.cat(grad_BTF.chunk(ctx.group.size(), dim=-1))
        summed = by_rank.new_empty(grad_BTF.shape[0], *by_rank.shape[1:])
        _reduce_scatter(summed, by_rank, group=ctx.group)
        return summed, None


def gather_features(x_BTf: Tensor, group: ProcessGroup) -> Tensor:
    """Features [B, T, f] of each rank -> [B, T, F = f ranks] on every rank; backward each rank's part of the gradient
    is added up."""
    return _GatherFeatures.apply(x_BTf, group)


def enter(x: Tensor, group: ProcessGroup, *, sequence: bool) -> Tensor:
    """Into a block whose ranks each hold a part of the features: all tokens forward, summed gradients backward."""
    return _GatherTokens.apply(x, group) if sequence else _SumGradient.apply(x, group)


def leave(x: Tensor, group: ProcessGroup, *, sequence: bool) -> Tensor:
    """Out of such a block: partial sums are added up, and with sequence parallelism each rank keeps its tokens."""
    return _ReduceScatterTokens.apply(x, group) if sequence else _Sum.apply(x, group)
