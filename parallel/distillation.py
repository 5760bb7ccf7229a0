"""Distillation: the loss against a teacher's logits, over a vocabulary that may be divided over the tensor axis.

Shapes: N = B x T tokens, V vocabulary, v = V / ranks, k the teacher's likeliest tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cuboid.parallel.loss import IGNORE, SummedCrossEntropy


class _VocabularyParallelDivergence(torch.autograd.Function):
    """Sum over tokens of KL(teacher || student) of the softmax at a temperature (Hinton et al. 2015, "Distilling the
    Knowledge in a Neural Network", section 2). Only maxima and sums travel, never logits.

    Works chunk by chunk like the cross entropy; the gradient takes the student's dtype, the teacher gets none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_Nv: Tensor,
        teacher_Nv: Tensor,
        valid_N: Tensor,
        temperature: float,
        group: ProcessGroup,
        chunk: int,
    ) -> Tensor:
        grad_Nv = torch.empty_like(student_Nv)
        total = student_Nv.new_zeros((), dtype=torch.float32)
        for start in range(0, len(valid_N), chunk):
            rows = slice(start, start + chunk)
            both = torch.stack([student_Nv[rows].float(), teacher_Nv[rows].float()]) / temperature
            student, teacher = _log_softmax(both, group)
            probabilities = teacher.exp()
            valid = valid_N[rows].unsqueeze(-1)
            total += (probabilities * (teacher - student)).masked_fill_(~valid, 0).sum()
            grad_Nv[rows] = student.exp_().sub_(probabilities).masked_fill_(~valid, 0) / temperature
        if group.size() > 1:
            dist.all_reduce(total, group=group)
        ctx.save_for_backward(grad_Nv)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (grad_Nv,) = ctx.saved_tensors
        return grad_Nv * grad.to(grad_Nv.dtype), None, None, None, None, None


def _log_softmax(scores: Tensor, group: ProcessGroup) -> Tensor:
    """Over the last dimension [..., v] of all ranks together."""
    maximum, sums = _maximum_and_sum(scores, group)
    return scores - maximum - sums.log()


def _log_sum_exp(scores: Tensor, group: ProcessGroup) -> Tensor:
    """[..., 1], over the last dimension [..., v] of all ranks together."""
    maximum, sums = _maximum_and_sum(scores, group)
    return maximum + sums.log()


def _maximum_and_sum(scores: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """The largest score, and the sum of exponentials of scores less it; [..., 1] each."""
    maximum = scores.amax(-1, keepdim=True)
    if group.size() > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    sums = (scores - maximum).exp().sum(-1, keepdim=True)
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    return maximum, sums


class _LargestDivergence(torch.autograd.Function):
    """The same of what is left of both distributions when all but k tokens become one: sum over those k and the one of
    p (log p - log q), p of the teacher and q of the student. To become one can only bring two distributions nearer, so
    that it is at most the whole divergence (Cover and Thomas 2006, "Elements of Information Theory", theorem 2.7.1).
    Of k alone, made to add up to 1, the student would learn that nothing else ever comes (Anshumann et al. 2025,
    "Sparse Logit Sampling").

    The gradient at the student's score s_j is q_j - p_j for one of the k, and q_j - p_rest q_j / q_rest for the others.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_Nv: Tensor,
        teacher_Nk1: Tensor,
        ids_Nk: Tensor,
        valid_N: Tensor,
        temperature: float,
        group: ProcessGroup,
        chunk: int,
    ) -> Tensor:
        grad_Nv = torch.empty_like(student_Nv)
        total = student_Nv.new_zeros((), dtype=torch.float32)
        width = student_Nv.shape[-1]
        for start in range(0, len(valid_N), chunk):
            rows = slice(start, start + chunk)
            student = _log_softmax(student_Nv[rows].float() / temperature, group)
            teacher, teacher_rest = teacher_Nk1[rows].split([ids_Nk.shape[-1], 1], -1)
            column = _own_column(ids_Nk[rows], width, group)
            is_large, here = _marked(column, width), column < width
            rest = _log_sum_exp(student.masked_fill(is_large, -torch.inf), group)
            valid = valid_N[rows].unsqueeze(-1)
            terms = teacher.exp() * (teacher - student.gather(-1, column.clamp(max=width - 1)))
            total += terms.masked_fill_(~(here & valid), 0).sum()
            if group.rank() == 0:  # all ranks know the one in which the others lie
                total += (teacher_rest.exp() * (teacher_rest - rest)).masked_fill_(~valid, 0).sum()
            wanted = (teacher_rest + student - rest).exp_().masked_fill_(is_large, 0)
            wanted = torch.nn.functional.pad(wanted, (0, 1))  # a column for what is another rank's
            wanted = wanted.scatter_(-1, column, teacher.exp())[..., :width] * valid
            grad_Nv[rows] = (student.exp_() * valid - wanted) / temperature
        if group.size() > 1:
            dist.all_reduce(total, group=group)
        ctx.save_for_backward(grad_Nv)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        (grad_Nv,) = ctx.saved_tensors
        return grad_Nv * grad.to(grad_Nv.dtype), None, None, None, None, None, None


def _own_column(ids: Tensor, width: int, group: ProcessGroup) -> Tensor:
    """Where these tokens stand in this rank's part of the vocabulary; ``width``, one beyond it, for another rank's."""
    column = ids.long() - width * group.rank()
    return column.masked_fill((column < 0) | (column >= width), width)


def _marked(column: Tensor, width: int) -> Tensor:
    """[N, v]: which of this rank's tokens are among those at ``column`` [N, k]."""
    marks = torch.zeros(*column.shape[:-1], width + 1, dtype=torch.bool, device=column.device)
    return marks.scatter_(-1, column, True)[..., :width]


def largest(logits_Nv: Tensor, *, k: int, temperature: float, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Of the k likeliest tokens of all ranks together, and after them of all others as one, the log-probability at this
    temperature, float32 [N, k + 1]; and the ids of the k, int32 [N, k]. The same on every rank; only k numbers of each
    rank and token travel."""
    log_probabilities = _log_softmax(logits_Nv.float() / temperature, group)
    width = logits_Nv.shape[-1]
    values, ids = log_probabilities.topk(min(k, width))
    ids = ids + width * group.rank()
    if group.size() > 1:
        values, places = _gathered(values, group).topk(k)
        ids = _gathered(ids, group).gather(-1, places)
    is_large = _marked(_own_column(ids, width, group), width)
    rest = _log_sum_exp(log_probabilities.masked_fill_(is_large, -torch.inf), group)
    return torch.cat([values, rest], -1), ids.int()


def _gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    """[..., n] -> [..., n x ranks]"""
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, -1)


class DistillationLoss(SummedCrossEntropy):
    """(1 - weight) x cross entropy + weight x temperature^2 x KL(teacher || student), over the tokens that are
    predicted. The square keeps the size of the gradients (Hinton et al. 2015, section 2.1). Without a teacher, as in
    evaluation, the cross entropy alone.
    """

    def __init__(self, group: ProcessGroup, *, temperature: float, weight: float) -> None:
        super().__init__(group)
        self.temperature, self.weight = temperature, weight

    def __call__(
        self, logits: Tensor, labels: Tensor, teacher: Tensor | None = None, teacher_ids: Tensor | None = None
    ) -> Tensor:
        """Of logits [B, T, v] and labels [B, T], a scalar. ``teacher``: its logits [B, T, v], or with the ids of its
        likeliest tokens [B, T, k] what `largest` gives of them [B, T, k + 1]."""
        from_labels = super().__call__(logits, labels)
        if teacher is None:
            return from_labels
        scores, taught = logits.flatten(0, 1), teacher.flatten(0, 1)
        options = labels.flatten() != IGNORE, self.temperature, self.group, self.chunk_tokens
        if teacher_ids is None:
            total = _VocabularyParallelDivergence.apply(scores, taught, *options)
        else:
            total = _LargestDivergence.apply(scores, taught, teacher_ids.flatten(0, 1), *options)
        from_teacher = total * self.temperature**2 / self.num_valid_tokens
        return (1 - self.weight) * from_labels + self.weight * from_teacher


class LogitsKept:
    """The loss object of a pipeline that only runs forward: it keeps the logits of each microbatch, whose ``rows`` are
    numbered."""

    def __init__(self) -> None:
        self._kept: dict[int, dict[str, Tensor]] = {}

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        self._kept[int(rows[0])] = self.of(logits.detach())
        return logits.new_zeros(())

    def of(self, logits: Tensor) -> dict[str, Tensor]:
        """What `DistillationLoss` takes of a microbatch's logits [B, T, v]."""
        return {"teacher": logits}

    def take(self) -> dict[str, Tensor]:
        """[rows, T, ...] of all microbatches, in the order of their rows."""
        kept = [self._kept[first] for first in sorted(self._kept)]
        self._kept.clear()
        return {name: torch.cat([part[name] for part in kept]) for name in kept[0]}


class LargestKept(LogitsKept):
    """Keeps of each microbatch what `largest` gives."""

    def __init__(self, group: ProcessGroup, *, k: int, temperature: float, chunk_tokens: int = 1024) -> None:
        super().__init__()
        self._group, self._k, self._temperature, self._chunk = group, k, temperature, chunk_tokens

    def of(self, logits: Tensor) -> dict[str, Tensor]:
        parts = [
            largest(rows, k=self._k, temperature=self._temperature, group=self._group)
            for rows in logits.flatten(0, 1).split(self._chunk)
        ]
        values, ids = (torch.cat(column).unflatten(0, logits.shape[:2]) for column in zip(*parts, strict=True))
        return {"teacher": values, "teacher_ids": ids}
