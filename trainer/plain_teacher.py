"""A teacher's share of the loss in one process, from whole models: what a mesh is compared with.

Shapes: B sequences, T tokens, V vocabulary, R relation heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cuboid.parallel.loss import IGNORE
from cuboid.trainer.data import Batch
from cuboid.trainer.model import Blueprint
from cuboid.trainer.plans import PROJECTIONS
from cuboid.trainer.recipe_distill import DistillSettings

_HIDDEN = -1e9
"""The score of what a token does not attend to: far below all others, and finite."""


class PlainTeacher:
    """The loss of `distillation.DistillationLoss` with the terms of `layer_terms`.

    Args:
        student: the model that is trained, and what it is made of.
        teacher: the same of the teacher.
        logits: those of the teacher [B, T, V] for a batch.
    """

    def __init__(
        self,
        settings: DistillSettings,
        student: tuple[nn.Module, Blueprint],
        teacher: tuple[nn.Module, Blueprint],
        logits: Callable[[Batch], Tensor],
    ) -> None:
        self._settings, self._student, self._logits = settings, student[1], logits
        self._layers = [_Layers(*student, settings), _Layers(*teacher, settings)]

    def loss(self, batch: Batch, logits: Tensor, from_labels: Tensor) -> Tensor:
        """The summed loss, of the student's logits [B, T, V] as it last ran and its summed loss on the labels."""
        settings, predicted = self._settings, batch.labels != IGNORE
        both = (logits, self._logits(batch))
        student, wanted = (F.log_softmax(each / settings.temperature, -1) for each in both)
        if settings.top_k is not None:
            ids = wanted.topk(settings.top_k).indices
            student, wanted = (_with_rest(each, ids) for each in (student, wanted))
        divergence = F.kl_div(student, wanted, log_target=True, reduction="none").sum(-1)[predicted].sum()
        loss = (1 - settings.weight) * from_labels + settings.weight * settings.temperature**2 * divergence
        if settings.hidden:
            loss = loss + settings.hidden * self._hidden_states()[predicted].sum()
        if settings.attention:
            loss = loss + settings.attention * self._relations(batch)[predicted].sum()
        return loss

    def _hidden_states(self) -> Tensor:
        """[B, T]: how far the layers' outputs are from the teacher's, a mean over layers."""
        pairs = [self._pair(at, "") for at in range(len(self._layers[0]))]
        if self._settings.hidden_loss == "mse":
            apart = [F.mse_loss(*pair, reduction="none").mean(-1) for pair in pairs]
        else:
            apart = [1 - F.cosine_similarity(*pair, dim=-1) for pair in pairs]
        return torch.stack(apart).mean(0)

    def _relations(self, batch: Batch) -> Tensor:
        """[B, T]: how far relations to the tokens that each attends to are from the teacher's, a mean over layers."""
        layers, heads = self._settings.relations(self._student.config)
        apart = []
        for at in layers:
            hidden = ~self._attends(batch.position_ids, at).unsqueeze(1)
            for name in PROJECTIONS:
                relations = []
                for x in self._pair(at, name):
                    by_head = x.unflatten(-1, (heads, -1)).transpose(1, 2)
                    scores = by_head @ by_head.mT / math.sqrt(by_head.shape[-1])
                    relations.append(scores.masked_fill(hidden, _HIDDEN).log_softmax(-1))
                student, teacher = relations
                apart.append(F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean(1))
        return torch.stack(apart).sum(0) / len(layers)

    def _attends(self, positions: Tensor, layer: int) -> Tensor:
        """[B, T, T]: to which tokens each does in this layer of the student."""
        documents, places = (positions == 0).cumsum(1), torch.arange(positions.shape[1])
        back = places[:, None] - places
        attends = (documents[:, :, None] == documents[:, None]) & (back >= 0)
        if self._student.anatomy.layer_kinds[layer] == "sliding_attention":
            attends &= back < self._student.config.sliding_window
        return attends

    def _pair(self, layer: int, name: str) -> tuple[Tensor, Tensor]:
        ours, theirs = self._layers
        return ours.given[layer, name], theirs.given[(layer + 1) * len(theirs) // len(ours) - 1, name]


class _Layers:
    """What the layers of a whole model gave when it last ran."""

    def __init__(self, model: nn.Module, blueprint: Blueprint, settings: DistillSettings) -> None:
        names = blueprint.anatomy
        self._layers = list(model.get_submodule(f"{names.base}.{names.layers}").children())
        self.given: dict[tuple[int, str], Tensor] = {}
        """By layer and name within it, the layer's own with none: [B, T, features]."""
        outputs: Sequence[str] = [*[""] * (settings.hidden > 0), *(PROJECTIONS if settings.attention else ())]
        for index, layer in enumerate(self._layers):
            for name in outputs:
                layer.get_submodule(name).register_forward_hook(self._keep(index, name))

    def __len__(self) -> int:
        return len(self._layers)

    def _keep(self, index: int, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _, __, output: self.given.__setitem__((index, name), output.float())


def _with_rest(log_probabilities: Tensor, ids: Tensor) -> Tensor:
    """Of these tokens, and of all others together."""
    rest = log_probabilities.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probabilities.gather(-1, ids), rest], -1)
