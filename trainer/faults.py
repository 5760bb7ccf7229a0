"""Which steps are not to be trusted, and what the recipe's `faults` says about each: the same on every rank.

A step is judged between its gradients and its update, by numbers that all ranks share already. What was found and left
out stands in every checkpoint, so that a run that goes on decides alike.

Skipping a step by its loss or gradient norm: OLMo's SkipStepOptimizer
(https://github.com/allenai/OLMo-core/blob/main/src/olmo_core/optim/skip_step_optimizer.py). Going back to a checkpoint
and past the batch: Chowdhery et al. 2022, "PaLM", section 5.1.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from cuboid.trainer.engine import Engine, StepResult, Untrusted
from cuboid.trainer.recipe_faults import FaultSettings
from cuboid.trainer.replicas import PRIME, Replicas

_FEWEST = 10
"""Steps without which a median says nothing (or the whole window, where that is shorter)."""


class Spike(Untrusted):
    """A loss or gradient norm far above that of the steps before."""

    kind = "spike"


class LeftOut(Untrusted):
    """A step that was found before the run went back, and updates nothing now."""

    kind = "left_out"


class ReplicasDiffer(Untrusted):
    """Ranks hold different bits of what should be the same."""

    kind = "replicas"


class Watch:
    """Judges every step of a run; each rank has one and asks it the same questions.

    Args:
        replicas: what is compared between ranks; None: nothing is.
    """

    def __init__(self, settings: FaultSettings, engine: Engine, replicas: Replicas | None) -> None:
        self.skipped: set[int] = set()
        """Steps that updated nothing, and such as the run has gone back before."""
        self._settings, self._engine, self._replicas = settings, engine, replicas
        self._found: list[int] = []
        self._recent: deque[tuple[float, float]] = deque(maxlen=settings.window)

    def share(self, step: int, *, saved: int) -> float:
        """What this rank tells with the step of this number about the replicas after the step before.

        Besides each n-th step one after each checkpoint is compared, so that all checkpoints but the newest are known
        to be sound, and that one is known in the next step.
        """
        every = self._settings.replicas_every
        due = every > 0 and ((step - 1) % every == 0 or step - 1 == saved)
        return self._replicas.share() if self._replicas and due else 0.0

    def judge(self, step: int, result: StepResult) -> None:
        """Before the update; the second number that was told is the sum of all ranks' `share`.

        Raises:
            Untrusted: nothing should be learned from the step; on every rank at once.
        """
        if result.told[1] % PRIME:
            self._compare_replicas(result)
        try:
            self._engine.refuse_not_finite(result)
            if step in self.skipped:
                raise LeftOut("it was left out before the run went back", result)
            self._refuse_spike(result)
        except Untrusted:
            self._compare_replicas(result)  # a flipped bit may lie behind the number
            raise
        self._recent.append((result.loss, result.grad_norm))

    def answer(self, step: int, error: Untrusted) -> Literal["stop", "skip", "rewind"]:
        """What is to be done about it: as the recipe says, and stop after too many."""
        if isinstance(error, LeftOut) or (step in self.skipped and not isinstance(error, ReplicasDiffer)):
            return "skip"
        answers = {"not_finite": self._settings.not_finite, "spike": self._settings.spike}
        answer = answers.get(error.kind, self._settings.replicas)
        assert answer is not None, "what is not looked for is not found"
        self._found = [*(earlier for earlier in self._found if earlier > step - self._settings.window), step]
        if len(self._found) > self._settings.max_faults:
            return "stop"
        if not isinstance(error, ReplicasDiffer) and answer != "stop":
            self.skipped.add(step)
        return answer

    @property
    def earlier(self) -> list[int]:
        """The steps whose faults were answered within the window, before the newest one."""
        return self._found[:-1]

    def facts(self) -> dict[str, Any]:
        """What stands in a checkpoint."""
        return {"skipped": sorted(self.skipped), "found": self._found, "recent": list(self._recent)}

    def resume(self, facts: Mapping[str, Any]) -> None:
        """Go on from what `facts` gave; what was found since is not forgotten where the run goes back."""
        self.skipped |= set(facts["skipped"])
        self._found = self._found or list(facts["found"])
        self._recent.clear()
        self._recent.extend((loss, norm) for loss, norm in facts["recent"])

    def num_skipped(self, step: int) -> int:
        """How many of the first ``step`` steps updated nothing."""
        return sum(skipped <= step for skipped in self.skipped)

    def _refuse_spike(self, result: StepResult) -> None:
        settings = self._settings
        if settings.spike is None or len(self._recent) < min(_FEWEST, settings.window):
            return
        losses, norms = zip(*self._recent, strict=True)
        for name, value, before in (("loss", result.loss, losses), ("gradient norm", result.grad_norm, norms)):
            median = statistics.median(before)
            if value > settings.spike_factor * median:
                times = f"{value / median:.3g} times" if median else "above"
                raise Spike(f"the {name} is {value:.4g}, {times} the median of the last {len(before)} steps", result)

    def _compare_replicas(self, result: StepResult) -> None:
        if self._replicas and (found := self._replicas.differences()):
            more = f" (and {len(found) - 1} such tensors more)" if len(found) > 1 else ""
            raise ReplicasDiffer(f"{found[0]}{more}", result)
