"""A teacher's share of the loss as one process computes it, written down token by token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import TEACHING


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor, top_k: int | None = None
) -> torch.Tensor:
    """KL(teacher || student) at the temperature, times its square, summed over valid tokens; token by token. Of the
    teacher's likeliest tokens and one more that stands for all others, where ``top_k`` is given."""
    temperature = TEACHING["temperature"]
    student, teacher = (F.softmax(logits[valid].double() / temperature, -1) for logits in (student, teacher))
    if top_k:
        order = teacher.argsort(-1, descending=True)
        student, teacher = (p.gather(-1, order).split([top_k, p.shape[-1] - top_k], -1) for p in (student, teacher))
        student, teacher = (torch.cat([likely, rest.sum(-1, keepdim=True)], -1) for likely, rest in (student, teacher))
    return temperature**2 * (teacher * (teacher.log() - student.log())).sum().float()
