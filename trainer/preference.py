"""The reference of preference tuning: another model over the same ranks, or the trained one without its adapters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from cuboid.parallel.pipeline import Pipeline
from cuboid.parallel.preference import LogProbabilitiesKept, PreferenceLoss
from cuboid.trainer.data import Batch


@dataclass(frozen=True)
class Preferences:
    """What a model makes of the pairs of a step or an evaluation: means over pairs, the same on every rank.

    An answer's reward is beta x log(policy / reference), its log probability that of all its tokens.
    """

    pairs: int
    reward_chosen: float
    reward_rejected: float
    accuracy: float
    """Share of pairs whose chosen answer has the larger reward; a tie counts half."""
    log_probability_chosen: float
    log_probability_rejected: float

    @classmethod
    def of(cls, sums: Tensor) -> Preferences:
        """From what `PreferenceLoss.take` gave, summed over all ranks."""
        pairs = round(sums[0].item())
        chosen, rejected, log_chosen, log_rejected, right = (sums[1:] / max(pairs, 1)).tolist()
        return cls(pairs, chosen, rejected, right, log_chosen, log_rejected)

    def record(self) -> dict[str, float]:
        """The fields of ``metrics.jsonl``."""
        return {
            "pairs": self.pairs,
            "reward_chosen": self.reward_chosen,
            "reward_rejected": self.reward_rejected,
            "reward_margin": self.reward_chosen - self.reward_rejected,
            "accuracy": self.accuracy,
            "log_probability_chosen": self.log_probability_chosen,
            "log_probability_rejected": self.log_probability_rejected,
        }


@dataclass(frozen=True, kw_only=True)
class Preference:
    """What an engine needs for pairs beside its own pipeline.

    ``reference`` has the schedule of the trained model, so that both have their last stage on the same rank.
    """

    loss: PreferenceLoss
    reference: Pipeline
    kept: LogProbabilitiesKept
    beneath: Callable[[], AbstractContextManager[None]]
    """Within it the reference's stages are the reference: those of the trained model, without their adapters."""

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """What the loss takes beside the logits and labels of ``batch``, [rows, T] each, on the rank with the last
        stage; nothing elsewhere. All ranks ask together."""
        ends = self.reference
        targets = {"labels": batch.labels, "rows": torch.arange(len(batch.labels))} if ends.is_last else None
        with self.beneath():
            ends.evaluate(batch.input_ids if ends.is_first else None, targets, position_ids=batch.position_ids)
        return {"position_ids": batch.position_ids, **self.kept.take()} if ends.is_last else {}
