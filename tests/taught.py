"""A teacher's share of the loss as one process computes it, written down token by token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from cases import HIDDEN_WEIGHT, RELATIONS, TEACHING, Case
from torch import nn
from transformers import AutoModelForCausalLM


class PlainTeacher:
    """transformers' own model of the case's teacher, and where they are compared the hidden states of both."""

    def __init__(self, case: Case, student: nn.Module) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(case.teacher)
        self._top_k, self._hidden = case.top_k, case.hidden
        self._states = [_watched(model) for model in (student, self.model)]
        self._relations = RELATIONS.get(case.relations)
        self._window = getattr(student.config, "sliding_window", None) or math.inf

    def add_to(
        self,
        from_labels: torch.Tensor,
        logits: torch.Tensor,
        wanted: torch.Tensor,
        valid: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Both models have just run: the summed loss, with the teacher's share."""
        share = TEACHING["weight"]
        loss = (1 - share) * from_labels + share * divergence(logits, wanted, valid, self._top_k)
        if self._hidden is not None:
            loss = loss + self._hidden_states(valid)
        return loss if self._relations is None else loss + self._related(valid, positions)

    def _hidden_states(self, valid: torch.Tensor) -> torch.Tensor:
        apart = 0.0
        for layer in range(len(self._states[0])):
            s, t = (states["layer"][valid] for states in self._pair(layer))
            cosine = (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))
            apart += ((s - t) ** 2).mean(-1).sum() if self._hidden == "mse" else (1 - cosine).sum()
        return HIDDEN_WEIGHT / len(self._states[0]) * apart

    def _related(self, valid: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Token by token: of each its document's tokens so far, as many as its window holds."""
        layers = self._relations.get("attention_layers", [len(self._states[0]) - 1])
        heads, apart = self._relations.get("relation_heads", 4), 0.0
        for row, token in valid.nonzero().tolist():
            first = token - min(int(positions[row, token]), self._window - 1)
            for layer in layers:
                for name in ("q_proj", "k_proj", "v_proj"):
                    student, teacher = (
                        _relation(states[name][row, first : token + 1].double(), heads) for states in self._pair(layer)
                    )
                    apart += (teacher * (teacher.log() - student.log())).sum() / heads
        return self._relations["attention"] / len(layers) * apart.float()

    def _pair(self, layer: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        ours, theirs = self._states
        every, rest = divmod(len(theirs), len(ours))
        assert rest == 0, "each of the student's layers ends where one of the teacher's does"
        return ours[layer], theirs[every * (layer + 1) - 1]


def _watched(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """What each layer of a Llama or one like it gives, whenever the model runs, and what its projections give."""
    states: list[dict[str, torch.Tensor]] = [{} for _ in model.model.layers]
    for given, layer in zip(states, model.model.layers, strict=True):
        attention = layer.self_attn
        parts = {"layer": layer, "q_proj": attention.q_proj, "k_proj": attention.k_proj, "v_proj": attention.v_proj}
        for name, module in parts.items():
            module.register_forward_hook(lambda _, __, output, given=given, name=name: given.__setitem__(name, output))
    return states


def _relation(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads, n]: of the last of n tokens to all, from their features [n, F]."""
    by_head = x.view(len(x), heads, -1)
    return torch.softmax((by_head * by_head[-1]).sum(-1).T / math.sqrt(by_head.shape[-1]), -1)


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
