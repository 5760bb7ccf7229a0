"""The recipe's `faults`: what is done about a step whose numbers are not to be trusted. Imports no torch."""

from __future__ import annotations

from typing import Literal

from cuboid.trainer.recipe_fields import Count, CountOrZero, Factor, Settings

Answer = Literal["stop", "skip", "rewind"]


class FaultSettings(Settings):
    """What is done about a step whose numbers are not to be trusted. It is judged before its update, so that the
    parameters are untouched. stop: the run ends; skip: the step updates nothing, and the next one follows; rewind: back
    to the newest checkpoint, and when that step comes again it updates nothing."""

    not_finite: Answer = "stop"
    """A loss or gradient norm that is NaN or infinite."""
    spike: Answer | None = None
    """A loss or gradient norm above spike_factor times its median; null: not looked for."""
    spike_factor: Factor = 10.0
    """How many times the median of the newest steps is a spike."""
    window: Count = 100
    """Steps whose median counts, and within which faults are counted."""
    max_faults: CountOrZero = 3
    """Faults within the window that are answered; the next one stops the run."""
    replicas: Literal["stop", "rewind"] = "rewind"
    """Ranks that hold the same parameter, or the same state of the optimizer, and no longer the same bits. No step is
    left out then, and the run stops where no checkpoint was saved before."""
    replicas_every: CountOrZero = 10
    """Steps between two comparisons of what several ranks hold, besides one after each checkpoint; 0: none."""
    shrink_microbatch: bool = False
    """After a rank has run out of memory the run begins again with smaller microbatches, and more of them: the numbers
    stay the same. Without, it begins again as it was."""
