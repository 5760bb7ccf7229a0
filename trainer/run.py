"""What a rank holds of a run while it lasts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuboid.parallel.mesh import Block
from cuboid.trainer.checkpoint import Checkpointer
from cuboid.trainer.data import Dataset, Mixture
from cuboid.trainer.engine import Engine
from cuboid.trainer.faults import Watch
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.recorder import Recorder


@dataclass(kw_only=True)
class Run:
    """Of one rank; the loop moves it on."""

    recipe: Recipe
    folder: Path
    block: Block
    model_config: dict[str, Any]
    adapter: dict[str, Any] | None
    """Of an adapter run: what is trained, and the fingerprint of the frozen rest."""
    teacher: str | None
    """Fingerprint of the weights that teach."""
    versions: dict[str, str]
    """Of what computes; on rank 0."""
    chat_template: str | None
    """The Jinja that the recipe names in place of the tokenizer's own: it may be a file, and files change."""
    dataset: Dataset | Mixture
    held_out: Dataset | Mixture | None
    """What evaluation reads."""
    engine: Engine
    watch: Watch
    recorder: Recorder
    checkpointer: Checkpointer
    step: int = 0
    """Completed updates, and steps that were skipped."""
    saved: int = 0
    """Step of the newest checkpoint that was begun."""
    evaluated: float | None = None
    """The loss on held-out text after ``step``, where it was evaluated."""
    best: float = math.inf
    """The lowest such loss of a step that was saved before ``step``."""
