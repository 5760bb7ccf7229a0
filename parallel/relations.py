"""How far the student's attention is from a teacher's, by relations between tokens: a distance for `layer_terms`.

A relation is softmax(x x^T / sqrt(d)) of the queries x of all tokens, cut into relation heads of d features each; so of
keys and of values (Wang et al. 2021, "MiniLMv2", section 3). It needs no attention map, which fused kernels never
make, and two models that have as many relation heads may differ in heads, their width, and all other sizes.

Shapes: B sequences of a microbatch, T tokens, F features of this tensor rank, R its relation heads, d = F / R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RelationDivergence(torch.autograd.Function):
    """Sum over predicted tokens and relation heads of KL(teacher || student).

    Works on some queries at a time, so that [R, T, T] numbers never exist at once; what is kept for the backward is the
    gradient, as large as the student's features.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_BTF: Tensor,
        teacher_BTF: Tensor,
        predicted_BT: Tensor,
        mask: Tensor | None,
        heads: int,
        chunk: int,
    ) -> Tensor:
        student, teacher = _by_head(student_BTF, heads), _by_head(teacher_BTF, heads)
        grad, total = torch.zeros_like(student), student.new_zeros(())
        for start in range(0, predicted_BT.shape[1], chunk):
            stop = min(start + chunk, predicted_BT.shape[1])
            apart = _apart(mask, start, stop, student.device)
            found, wanted = (_log_relations(x, start, stop, apart) for x in (student, teacher))
            counted = predicted_BT[:, None, start:stop, None]
            probabilities = wanted.exp()
            total += (probabilities * (wanted - found)).masked_fill_(apart | ~counted, 0).sum()
            grad_scores = found.exp_().sub_(probabilities).mul_(counted)
            grad[:, :, start:stop] += grad_scores @ student[:, :, :stop]
            grad[:, :, :stop] += grad_scores.mT @ student[:, :, start:stop]
        grad /= student.shape[-1] ** 0.25
        ctx.save_for_backward(grad.transpose(1, 2).flatten(2).to(student_BTF.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (grad_BTF,) = ctx.saved_tensors
        return grad_BTF * grad.to(grad_BTF.dtype), None, None, None, None, None


def _by_head(x_BTF: Tensor, heads: int) -> Tensor:
    """[B, R, T, d] float32, of which products are divided by sqrt(d)."""
    x = x_BTF.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    return x / x.shape[-1] ** 0.25


def _apart(mask: Tensor | None, start: int, stop: int, device: torch.device) -> Tensor:
    """[B or 1, 1, queries, stop]: to which tokens up to the last of them these queries do not attend. ``mask`` as a
    layer takes it: true where it attends, or what is added to its scores, or None for plainly causal."""
    if mask is None:
        return torch.ones(1, 1, stop - start, stop, dtype=torch.bool, device=device).triu(start + 1)
    part = mask[..., start:stop, :stop]
    return ~part if part.dtype == torch.bool else part < 0


def _log_relations(x_BRTd: Tensor, start: int, stop: int, apart: Tensor) -> Tensor:
    """[B, R, queries, stop]"""
    scores = x_BRTd[:, :, start:stop] @ x_BRTd[:, :, :stop].mT
    return scores.masked_fill_(apart, -torch.inf).log_softmax(-1)


def relation_distance(
    student_BTF: Tensor,
    teacher_BTF: Tensor,
    predicted_BT: Tensor,
    mask: Tensor | None,
    *,
    heads: int,
    of_all: int,
    chunk_tokens: int = 128,
) -> Tensor:
    """A mean over all ``of_all`` relation heads, of which this rank has ``heads``, summed over predicted tokens. A
    token's relations, in both models, are to those that the student's layer lets it attend to, by ``mask``."""
    arguments = predicted_BT, mask, heads, chunk_tokens
    return _RelationDivergence.apply(student_BTF, teacher_BTF, *arguments) / of_all
