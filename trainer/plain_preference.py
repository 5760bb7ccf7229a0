"""Preference tuning in one process, pair by pair: what a mesh is compared with.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from cuboid.parallel.loss import IGNORE
from cuboid.trainer.data import Batch
from cuboid.trainer.recipe_preference import PreferenceSettings


def pairs(batch: Batch) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(row, the predicted tokens of the chosen answer, those of the rejected one) of each pair; int64, their places."""
    for row, (labels, positions) in enumerate(zip(batch.labels, batch.position_ids, strict=True)):
        begins = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        documents = [first + (labels[first:stop] != IGNORE).nonzero().flatten() for first, stop in pairwise(begins)]
        for chosen, rejected in zip(documents[::2], documents[1::2], strict=False):
            if len(chosen) and len(rejected):
                yield row, chosen, rejected


class PlainPreference:
    """The losses of `preference.PreferenceLoss`, from whole logits.

    Args:
        reference: the reference model's logits [B, T, V] of a batch.
    """

    def __init__(self, settings: PreferenceSettings, reference: Callable[[Batch], Tensor]) -> None:
        self._settings, self._reference = settings, reference

    def loss(self, batch: Batch, logits: Tensor) -> Tensor:
        """The sum over the pairs of the batch; ``logits`` [B, T, V] are of the model that is trained."""
        with torch.no_grad():
            reference = self._reference(batch)
        total = logits.sum() * 0.0  # of no pair at all
        for row, *answers in pairs(batch):
            ratios = []
            for places in answers:
                wanted = batch.labels[row, places].unsqueeze(-1)
                both = (F.log_softmax(scores[row, places], -1).gather(-1, wanted) for scores in (logits, reference))
                policy, other = both
                ratios.append((policy - other).mean() if self._settings.loss == "ipo" else (policy - other).sum())
            total = total + self._of_pair(ratios[0] - ratios[1])
        return total

    def _of_pair(self, difference: Tensor) -> Tensor:
        beta, smoothing = self._settings.beta, self._settings.label_smoothing
        if self._settings.loss == "ipo":
            return (difference - 0.5 / beta) ** 2
        return (1 - smoothing) * F.softplus(-beta * difference) + smoothing * F.softplus(beta * difference)
