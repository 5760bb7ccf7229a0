"""What pruning means, for one process: written out with a sort and a mask beside each weight.

`verify` judges `parallel/pruning.py` by it, and shares no line with it but the course of the share.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cuboid.trainer.prune import is_due, ratio_before
from cuboid.trainer.recipe import PruneSettings


class PlainPruning:
    """``weights``, by name, are those that are pruned."""

    def __init__(self, weights: Mapping[str, nn.Parameter], settings: PruneSettings) -> None:
        self._weights, self._settings = weights, settings
        self._masks: dict[str, Tensor] = {}

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """Before the step of this number."""
        if not is_due(self._settings, step):
            return
        if self._settings.method == "2:4":
            for name, weight in self._weights.items():
                smallest = weight.abs().unflatten(1, (-1, 4)).topk(2, largest=False, sorted=False).indices
                fours = torch.ones_like(weight).unflatten(1, (-1, 4)).scatter(-1, smallest, 0)
                self._masks[name] = fours.flatten(1)
        else:
            every = torch.cat([weight.abs().flatten() for weight in self._weights.values()])
            gone = int(ratio_before(self._settings, step) * len(every))
            threshold = every.sort().values[gone - 1] if gone else -1.0
            for name, weight in self._weights.items():
                self._masks[name] = (weight.abs() > threshold).float()
        self.end()

    def mask_gradients(self) -> None:
        for name, mask in self._masks.items():
            gradient = self._weights[name].grad
            assert gradient is not None
            gradient.mul_(mask)

    @torch.no_grad()
    def end(self) -> None:
        """After the optimizer's update."""
        for name, mask in self._masks.items():
            self._weights[name].mul_(mask)
