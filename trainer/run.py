"""What a rank holds of a run while it lasts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cuboid.parallel.mesh import Block
from cuboid.trainer.checkpoint import Checkpointer
from cuboid.trainer.data import Dataset, Mixture
from cuboid.trainer.engine import Engine
from cuboid.trainer.faults import Watch
from cuboid.trainer.manifest import incomplete, steps
from cuboid.trainer.publish import mark_best
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.recorder import Recorder
from cuboid.trainer.restore import read_facts


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

    @property
    def is_best(self) -> bool:
        """Whether the recipe wants the lowest loss on held-out text to be kept, and this step has it."""
        return self.recipe.checkpoint.best is not None and self.evaluated is not None and self.evaluated < self.best

    def best_saved(self) -> float:
        """The lowest loss on held-out text of the checkpoints up to ``step``, whose own facts tell it; rank 0 lets
        ``best`` name the one that has it. Infinite where none has. All ranks ask together."""
        found = [math.inf]
        if self.block.rank == 0 and self.recipe.checkpoint.best is not None:
            folder = self.checkpointer.folder
            whole = [path for step, path in steps(folder).items() if step <= self.step and not incomplete(path)]
            losses = {path: read_facts(path).get("eval_loss") for path in whole}
            known = {path: loss for path, loss in losses.items() if loss is not None}
            lowest = min(known, key=lambda path: (known[path], path), default=None)
            mark_best(folder, lowest)
            found = [known[lowest]] if lowest else found
        dist.broadcast_object_list(found, src=0)
        return found[0]
