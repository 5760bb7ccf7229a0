"""What balancing the experts of a mixture means, for one process: written out sequence by sequence.

`verify` judges `parallel.expert` by it, and shares no line with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cuboid.parallel.loss import IGNORE
from cuboid.trainer.recipe import MoeSettings


class PlainBalance:
    """Listens to the routers of a transformers model, drops choices beyond an expert's capacity, and gives the loss."""

    def __init__(self, model: nn.Module, settings: MoeSettings) -> None:
        self._settings = settings
        self._routed: list[tuple[nn.Module, Tensor, Tensor]] = []
        self._biases: dict[nn.Module, list[float]] = {}
        self._loads: dict[nn.Module, list[int]] = {}
        self._routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
        self._sequences = 0
        for router in self._routers:
            router.register_forward_hook(self._heard)
            experts = len(router.get_parameter("weight"))
            self._biases[router], self._loads[router] = [0.0] * experts, [0] * experts

    def begin(self, sequences: int) -> None:
        """Before a forward of so many sequences."""
        self._routed, self._sequences = [], sequences

    def loss(self, labels: Tensor, count: int) -> Tensor:
        """After it: the losses of all sequences, each weighted by its predicted tokens of ``count``; a mean over
        layers."""
        total = torch.zeros(())
        for router, logits, chosen in self._routed:
            experts = logits.shape[-1]
            for sequence, row in enumerate(labels):
                own, choices = logits[sequence].float(), chosen[sequence].flatten()
                loads = torch.stack([(choices == expert).sum() for expert in range(experts)]) / len(own)
                aux_loss = experts * (loads * own.softmax(-1).mean(0)).sum()
                z_loss = own.logsumexp(-1).square().mean()
                weight = (row != IGNORE).sum() / count
                for expert in choices.tolist() if weight else ():
                    self._loads[router][expert] += 1
                total = total + weight * (self._settings.aux_loss * aux_loss + self._settings.z_loss * z_loss)
        return total / max(len(self._routers), 1)

    def end_step(self) -> None:
        """After all forwards of a step: the biases follow its loads."""
        for router, loads in self._loads.items():
            for expert, load in enumerate(loads):
                side = sum(loads) / len(loads) - load
                self._biases[router][expert] += self._settings.bias_update * ((side > 0) - (side < 0))
            self._loads[router] = [0] * len(loads)

    def _heard(self, router: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, weights, chosen = output
        if any(self._biases[router]):
            probabilities = logits.float().softmax(-1)
            chosen = (probabilities + torch.tensor(self._biases[router])).topk(chosen.shape[-1]).indices
            normalised = weights.sum(-1).sub(1).abs().max() < 1e-3
            weights = probabilities.gather(-1, chosen)
            weights = weights / weights.sum(-1, keepdim=True) if normalised else weights
        by_sequence = chosen.view(self._sequences, -1, chosen.shape[-1])
        self._routed.append((router, logits.view(self._sequences, -1, logits.shape[-1]), by_sequence))
        factor = self._settings.capacity_factor
        if factor is None:
            return logits, weights, chosen
        kept = torch.zeros_like(by_sequence)
        for sequence, choices in enumerate(by_sequence):
            taken = [0] * logits.shape[-1]
            for token, own in enumerate(choices.tolist()):
                for choice, expert in enumerate(own):
                    if taken[expert] < factor * choices.numel() / logits.shape[-1]:
                        taken[expert] += 1
                        kept[sequence, token, choice] = 1
        return logits, weights * kept.view_as(chosen), chosen
