"""A teacher's share of the loss as one process computes it, written down token by token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import HIDDEN_WEIGHT, TEACHING, Case
from torch import nn
from transformers import AutoModelForCausalLM


class PlainTeacher:
    """transformers' own model of the case's teacher, and where they are compared the hidden states of both."""

    def __init__(self, case: Case, student: nn.Module) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(case.teacher)
        self._top_k, self._hidden = case.top_k, case.hidden
        self._states = [_watched(model) for model in (student, self.model)]

    def add_to(
        self, from_labels: torch.Tensor, logits: torch.Tensor, wanted: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """Both models have just run: the summed loss, with the teacher's share."""
        share = TEACHING["weight"]
        loss = (1 - share) * from_labels + share * divergence(logits, wanted, valid, self._top_k)
        if self._hidden is None:
            return loss
        ours, theirs = self._states
        every, rest = divmod(len(theirs), len(ours))
        assert rest == 0, "each of the student's layers ends where one of the teacher's does"
        apart = 0.0
        for layer, found in enumerate(ours):
            s, t = found[valid], theirs[every * (layer + 1) - 1][valid]
            cosine = (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))
            apart += ((s - t) ** 2).mean(-1).sum() if self._hidden == "mse" else (1 - cosine).sum()
        return loss + HIDDEN_WEIGHT / len(ours) * apart


def _watched(model: nn.Module) -> list[torch.Tensor]:
    """What each layer of a Llama or Qwen3 gives, whenever the model runs."""
    states = [torch.empty(0) for _ in model.model.layers]
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _, __, given, index=index: states.__setitem__(index, given))
    return states


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
