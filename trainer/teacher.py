"""The teacher of a distillation: a frozen model over the same ranks as the student, or what it said before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cuboid.parallel.distillation import LogitsKept
from cuboid.parallel.layer_terms import LayerTerms
from cuboid.parallel.pipeline import Pipeline
from cuboid.trainer.data import Batch


class Teacher(Protocol):
    """What a step learns from beside the labels."""

    def targets(self, batch: Batch) -> Mapping[str, Tensor]:
        """What `DistillationLoss` takes of the samples [rows, T] of ``batch``, on their device, on the rank with the
        last stage; nothing elsewhere. All ranks ask together."""


@dataclass(frozen=True)
class LiveTeacher:
    """``pipeline`` has the student's schedule, so that both have their last stage on the same rank."""

    pipeline: Pipeline
    kept: LogitsKept
    layer_terms: LayerTerms | None = None
    """Where the student's layers are compared too."""

    def targets(self, batch: Batch) -> Mapping[str, Tensor]:
        ends = self.pipeline
        rows = {"rows": torch.arange(len(batch.labels))}
        ends.evaluate(
            batch.input_ids if ends.is_first else None,
            rows if ends.is_last else None,
            position_ids=batch.position_ids,
            **(rows if self.layer_terms else {}),
        )
        return self.kept.take() if ends.is_last else {}
