"""Summed cross entropy over a vocabulary that may be divided over the tensor axis.

The loss of a step is a sum over tokens divided once by the number of valid tokens of the whole global batch, so that no
mean of means can enter. Shapes: N = B x T tokens, V vocabulary, v = V / ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

IGNORE = -100
"""The label of a token that is not predicted."""


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats a token; infinite where no float holds it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class _VocabularyParallelCrossEntropy(torch.autograd.Function):
    """Shoeybi et al. 2019, "Megatron-LM", section 3: only maxima, sums and target logits travel, never logits.

    Works chunk by chunk, so that float32 copies of the logits exist for ``chunk`` tokens only; the gradient takes the
    logits' own dtype. Gives the loss of each token, 0 where none is predicted.
    """

    @staticmethod
    def forward(ctx: Any, logits_Nv: Tensor, labels_N: Tensor, group: ProcessGroup, chunk: int) -> Tensor:
        grad_Nv = torch.empty_like(logits_Nv)
        losses_N = logits_Nv.new_zeros(len(labels_N), dtype=torch.float32)
        for start in range(0, len(labels_N), chunk):
            rows = slice(start, start + chunk)
            losses_N[rows] = _cross_entropy_chunk(logits_Nv[rows], labels_N[rows], grad_Nv[rows], group)
        ctx.save_for_backward(grad_Nv)
        return losses_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_Nv,) = ctx.saved_tensors
        return grad_Nv * grad_N.to(grad_Nv.dtype).unsqueeze(-1), None, None, None


def _cross_entropy_chunk(logits_Nv: Tensor, labels_N: Tensor, grad_Nv: Tensor, group: ProcessGroup) -> Tensor:
    """The losses of some tokens [N]; writes d(their sum)/d(logits) into ``grad_Nv``."""
    valid = labels_N != IGNORE
    width = logits_Nv.shape[-1]
    local = labels_N - width * group.rank()
    here = valid & (local >= 0) & (local < width)
    column = local.masked_fill(~here, 0).unsqueeze(-1)

    scores = logits_Nv.float()
    maximum = scores.amax(-1, keepdim=True)
    if group.size() > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    scores = scores - maximum
    target = scores.gather(-1, column).squeeze(-1).masked_fill(~here, 0)
    exponentials = scores.exp_()
    both = torch.stack([exponentials.sum(-1), target])
    if group.size() > 1:
        dist.all_reduce(both, group=group)
    sums, target = both
    probabilities = exponentials.div_(sums.unsqueeze(-1))
    probabilities.scatter_add_(-1, column, -here.to(probabilities.dtype).unsqueeze(-1))
    grad_Nv.copy_(probabilities.mul_(valid.unsqueeze(-1)))
    return (sums.log() - target) * valid


class SummedCrossEntropy:
    """The loss object of a pipeline: sum over the tokens of a microbatch, divided by the step's global token count.

    ``num_valid_tokens`` is set before each step: a count over all data ranks and all microbatches, decided before the
    first microbatch runs.
    """

    def __init__(self, group: ProcessGroup, *, chunk_tokens: int = 1024) -> None:
        self.group, self.chunk_tokens = group, chunk_tokens
        self.num_valid_tokens: float = 0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of logits [B, T, v] and labels [B, T], a scalar."""
        assert self.num_valid_tokens > 0, "the step's token count must be set first"
        return self.of_tokens(logits, labels).sum() / self.num_valid_tokens

    def of_tokens(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[B, T]: minus the log probability of each label, 0 where none is predicted."""
        losses_N = _VocabularyParallelCrossEntropy.apply(
            logits.flatten(0, 1), labels.flatten(), self.group, self.chunk_tokens
        )
        return losses_N.view(labels.shape)


class Attach(torch.autograd.Function):
    """``x`` as it is, with a loss whose gradient joins in the backward. ``record`` runs there: once for each
    microbatch, also where the forward is computed twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, record: Any) -> Tensor:
        ctx.record, ctx.like = record, loss.detach()
        return x.clone()  # no view: torch detaches what a stage gives in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.record()
        return grad, torch.ones_like(ctx.like), None
