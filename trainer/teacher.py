"""The teacher of a distillation: a frozen model over the same ranks as the student."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cuboid.parallel.distillation import LogitsKept
from cuboid.parallel.pipeline import Pipeline


@dataclass(frozen=True)
class Teacher:
    """``pipeline`` has the student's schedule, so that both have their last stage on the same rank."""

    pipeline: Pipeline
    kept: LogitsKept

    def logits(self, input_ids: Tensor, position_ids: Tensor) -> Tensor | None:
        """[rows, T, v] for ids and positions [rows, T] on the rank with the last stage, and None elsewhere."""
        rows = torch.arange(len(input_ids))
        ends = self.pipeline
        ends.evaluate(
            input_ids if ends.is_first else None, {"rows": rows} if ends.is_last else None, position_ids=position_ids
        )
        return self.kept.take() if ends.is_last else None
