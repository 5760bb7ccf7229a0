"""Distillation: the loss against a teacher's logits, over a vocabulary that may be divided over the tensor axis.

Shapes: N = B x T tokens, V vocabulary, v = V / ranks.
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
    maximum = scores.amax(-1, keepdim=True)
    if group.size() > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    scores = scores - maximum
    sums = scores.exp().sum(-1, keepdim=True)
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    return scores - sums.log()


class DistillationLoss(SummedCrossEntropy):
    """(1 - weight) x cross entropy + weight x temperature^2 x KL(teacher || student), over the tokens that are
    predicted. The square keeps the size of the gradients (Hinton et al. 2015, section 2.1). Without a teacher's logits,
    as in evaluation, the cross entropy alone.
    """

    def __init__(self, group: ProcessGroup, *, temperature: float, weight: float) -> None:
        super().__init__(group)
        self.temperature, self.weight = temperature, weight

    def __call__(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        """Of logits and teacher's logits [B, T, v] and labels [B, T], a scalar."""
        from_labels = super().__call__(logits, labels)
        if teacher_logits is None:
            return from_labels
        total = _VocabularyParallelDivergence.apply(
            logits.flatten(0, 1),
            teacher_logits.flatten(0, 1),
            labels.flatten() != IGNORE,
            self.temperature,
            self.group,
            self.chunk_tokens,
        )
        from_teacher = total * self.temperature**2 / self.num_valid_tokens
        return (1 - self.weight) * from_labels + self.weight * from_teacher


class LogitsKept:
    """The loss object of a pipeline that only runs forward: it keeps the logits of each microbatch, whose ``rows`` are
    numbered."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        self._kept[int(rows[0])] = logits.detach()
        return logits.new_zeros(())

    def take(self) -> Tensor:
        """[rows, T, v] of all microbatches, in the order of their rows."""
        kept = torch.cat([self._kept[first] for first in sorted(self._kept)])
        self._kept.clear()
        return kept
