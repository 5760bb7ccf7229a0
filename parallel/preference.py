"""Preference tuning: a loss of pairs of answers against a reference model, over a vocabulary that may be divided.

A sequence holds whole pairs: its documents, told by positions that begin at 0, are in turn an answer that was chosen
and the one that was rejected, each behind the prompt. So both are in one microbatch, whatever the mesh.

Shapes: B sequences, T tokens, P pairs that a sequence holds at most, v vocabulary / ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from cuboid.parallel.distillation import LogitsKept
from cuboid.parallel.loss import IGNORE, SummedCrossEntropy

NUM_SUMS = 6
"""Numbers that `PreferenceLoss.take` gives: pairs; of the chosen and of the rejected answers the rewards, then the log
probabilities; pairs whose chosen answer has the larger reward."""


def answers(labels: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of labels and positions [B, T]: which predicted tokens belong to which answer [B, P, 2, T], the chosen one first;
    and which pairs are there [B, P]: both answers have such tokens. What fills a sequence up predicts nothing."""
    documents = (position_ids == 0).cumsum(1) - 1
    most = int(documents.max()) + 1 if len(documents) else 0
    numbers = torch.arange(most + most % 2, device=labels.device).view(1, -1, 2, 1)
    members = (documents[:, None, None] == numbers) & (labels != IGNORE)[:, None, None]
    return members, members.any(-1).all(-1)


class PreferenceLoss(SummedCrossEntropy):
    """The loss object of a pipeline: a sum over a microbatch's pairs, divided by the step's global number of pairs.

    With r the log ratio of an answer's probabilities under policy and reference, and d = r(chosen) - r(rejected):

    - sigmoid: -log sigmoid(beta d) (Rafailov et al. 2023, "Direct Preference Optimization", equation 7); with
      ``label_smoothing`` e, the share of pairs that may be the wrong way round, (1 - e) of it and e of
      -log sigmoid(-beta d) (Mitchell 2023, "A note on DPO with noisy preferences").
    - ipo: (d - 1 / (2 beta))^2 (Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human
      Preferences", equation 17), r being a mean over an answer's tokens, as its authors and TRL compute it.

    ``num_pairs`` is set before each step, as ``num_valid_tokens`` is without preferences.
    """

    def __init__(self, group: ProcessGroup, *, beta: float, kind: str, label_smoothing: float) -> None:
        super().__init__(group)
        self.beta, self.kind, self.label_smoothing = beta, kind, label_smoothing
        self.num_pairs: float = 0
        self._sums = torch.zeros(NUM_SUMS, dtype=torch.float64)

    def __call__(self, logits: Tensor, labels: Tensor, position_ids: Tensor, reference: Tensor) -> Tensor:  # type: ignore[override]
        """Of logits [B, T, v], labels, positions and the reference's log probabilities of the labels [B, T], a
        scalar."""
        assert self.num_pairs > 0, "the step's number of pairs must be set first"
        members, pairs = answers(labels, position_ids)
        policy = -self.of_tokens(logits, labels)
        # subtracted token by token: sums over an answer are large, and their difference would keep their rounding
        ratios = ((policy - reference)[:, None, None] * members).sum(-1)
        if self.kind == "ipo":
            ratios = ratios / members.sum(-1).clamp(min=1)
        losses = self._of_pairs(ratios[..., 0] - ratios[..., 1])
        self._note(self.beta * ratios.detach(), (policy.detach()[:, None, None] * members).sum(-1), pairs)
        return losses.masked_fill(~pairs, 0).sum() / self.num_pairs

    def count(self, labels: Tensor, position_ids: Tensor) -> Tensor:
        """Pairs of these rows."""
        return answers(labels, position_ids)[1].sum()

    def take(self) -> Tensor:
        """Sums over the pairs since the last call, float64 on the CPU; counting begins anew."""
        taken, self._sums = self._sums.cpu(), torch.zeros_like(self._sums)
        return taken

    def _of_pairs(self, differences: Tensor) -> Tensor:
        if self.kind == "ipo":
            return (differences - 1 / (2 * self.beta)) ** 2
        right, wrong = F.logsigmoid(self.beta * differences), F.logsigmoid(-self.beta * differences)
        return -(1 - self.label_smoothing) * right - self.label_smoothing * wrong

    def _note(self, rewards: Tensor, log_probabilities: Tensor, pairs: Tensor) -> None:
        """Of rewards and log probabilities [B, P, 2]; a tie is half right, as chance would be."""
        right = (1 + (rewards[..., 0] - rewards[..., 1]).sign()) / 2
        numbers = [rewards[..., 0], rewards[..., 1], log_probabilities[..., 0], log_probabilities[..., 1], right]
        sums = torch.stack([torch.ones_like(right), *numbers]).double().masked_fill(~pairs, 0).sum((1, 2))
        self._sums = self._sums.to(sums.device) + sums


class LogProbabilitiesKept(LogitsKept):
    """The same of a reference model: of each microbatch's logits it keeps the log probabilities of the labels."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self._cross_entropy = SummedCrossEntropy(group)

    def __call__(self, logits: Tensor, rows: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return super().__call__(-self._cross_entropy.of_tokens(logits, labels), rows)

    def of(self, logits: Tensor) -> dict[str, Tensor]:
        """What `PreferenceLoss` takes: by now the log probabilities, [B, T]."""
        return {"reference": logits}
