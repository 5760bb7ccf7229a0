"""When how much is pruned: the course of a run's sparsity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cuboid.parallel.pruning import Pruning
from cuboid.parallel.structures import StructuredPruning
from cuboid.trainer.recipe import PruneSettings
from cuboid.trainer.structures import Structures


@dataclass(frozen=True)
class Pruner:
    """Prunes single weights of this rank by the settings' course."""

    settings: PruneSettings
    pruning: Pruning

    def prune(self, step: int, influence: Callable[[], Tensor]) -> float | None:
        """Before the step of this number (from 1); see `Engine.prune`."""
        if not is_due(self.settings, step):
            return None
        if self.settings.method == "2:4":
            return self.pruning.two_of_four()
        return self.pruning.smallest(ratio_before(self.settings, step))

    def resume_at(self, step: int) -> None:
        """After ``step`` updates: what was pruned before stands as zeros in the weights."""
        self.pruning.begun = step >= self.settings.begin_step


@dataclass(frozen=True)
class StructurePruner:
    """Prunes heads, channels or layers by the settings' course."""

    settings: PruneSettings
    structures: Structures
    pruning: StructuredPruning

    def prune(self, step: int, influence: Callable[[], Tensor]) -> float | None:
        """As `Pruner.prune`; ``influence`` [layers] of the model as it is now, for which text has to be read."""
        if not is_due(self.settings, step):
            return None
        scores = influence().view(1, -1) if self.settings.method == "layers" else self.pruning.squares()
        return self.pruning.remove(scores, self.structures.count(ratio_before(self.settings, step)))

    def resume_at(self, step: int) -> None:
        if step >= self.settings.begin_step:
            self.pruning.resume()


def is_due(settings: PruneSettings, step: int) -> bool:
    """Whether something is pruned before this step; before ``end_step`` always."""
    begin, end = settings.begin_step, settings.last_step
    return begin <= step <= end and ((step - begin) % settings.every == 0 or step == end)


def ratio_before(settings: PruneSettings, step: int) -> float:
    """The share that is pruned before this step: fast at first, while much is superfluous (Zhu and Gupta 2017, "To
    prune, or not to prune", equation 1, which begins at a sparsity of 0 one step earlier)."""
    begin, end = settings.begin_step, settings.last_step
    left = (end - step) / (end - begin + 1)
    return settings.ratio * (1.0 - left**3)
