"""How long a schedule takes: the event simulator, the bubble it leaves, and what each rank holds. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cuboid.parallel.schedules import Action, order

UNITS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0, "R": 0.0}
"""How long each kind of action takes, in thirds of a microbatch on a stage."""


def ideal_bubble(schedule: str, *, pipeline: int, virtual_stages: int, microbatches: int) -> float:
    """Idle share of the wall time where F, I and W take equally long, B = I + W, and messages no time.

    For GPipe, 1F1B (v = 1) and the interleaved ones with B this is (p - 1) / (v m + p - 1) with m >= p microbatches,
    whatever a backward takes: Huang et al. 2019, "GPipe", section 2.3; Narayanan et al. 2021, "Efficient Large-Scale
    Language Model Training on GPU Clusters", section 2.2 (given there as a share of the busy time, (p - 1) / (v m)).
    """
    sizes = {"pipeline": pipeline, "virtual_stages": virtual_stages, "microbatches": microbatches}
    return simulate(order(schedule, **sizes), lambda action: UNITS[action.kind]).bubble


@dataclass(frozen=True)
class Simulation:
    """A step as it would run if messages took no time; one list for each pipeline rank."""

    order: Sequence[Sequence[Action]]
    starts: Sequence[Sequence[float]]
    """Seconds at which each action of ``order`` starts."""
    stops: Sequence[Sequence[float]]

    @property
    def wall(self) -> float:
        """Seconds from the first start to the last stop over all ranks."""
        return max(stops[-1] for stops in self.stops) - min(starts[0] for starts in self.starts)

    @property
    def busy(self) -> list[float]:
        """Seconds inside actions, by rank."""
        return [sum(stops) - sum(starts) for starts, stops in zip(self.starts, self.stops, strict=True)]

    @property
    def bubble(self) -> float:
        """Mean over the ranks of idle / wall; 0 where nothing takes any time."""
        wall = self.wall
        return 1 - sum(self.busy) / (len(self.order) * wall) if wall else 0.0


def simulate(
    order: Sequence[Sequence[Action]], seconds: Callable[[Action], float], *, ready: Sequence[float] | None = None
) -> Simulation:
    """Run each rank's actions in order, each as soon as its rank is free and what it needs has been computed.

    F needs the previous stage's F, B and I the next stage's B or I, of the same microbatch; the rest is the order of
    the rank. ``ready`` holds the seconds before which each rank cannot start. Takes time linear in the actions.

    Raises:
        ValueError: the order waits for itself.
    """
    last = max(action.stage for actions in order for action in actions)
    done: dict[_Key, float] = {}
    waiting: dict[_Key, int] = {}
    clock = list(ready) if ready is not None else [0.0] * len(order)
    starts: list[list[float]] = [[] for _ in order]
    stops: list[list[float]] = [[] for _ in order]
    held: list[list[Action]] = [[] for _ in order]
    runnable = list(range(len(order)))
    while runnable:
        rank = runnable.pop()
        for action in order[rank][len(starts[rank]) :]:
            need = _needed(action, last)
            if need is not None and need not in done:
                waiting[need] = rank
                break
            start = clock[rank] if need is None else max(clock[rank], done[need])
            stop = clock[rank] = start + seconds(action)
            sent = [action, *held[rank]]
            held[rank] = sent if action.held else []
            starts[rank].append(start)
            stops[rank].append(stop)
            for key in () if action.held else [_key(result) for result in sent if result.kind in "FBI"]:
                done[key] = stop
                if key in waiting:
                    runnable.append(waiting.pop(key))
    if waiting:
        raise ValueError(f"the order of actions waits for itself: {sorted(waiting)}")
    return Simulation(order, starts, stops)


_Key = tuple[bool, int, int]
"""A result that other stages wait for: whether it is a forward's, the stage, the microbatch."""


def _key(action: Action) -> _Key:
    return action.kind == "F", action.stage, action.microbatch


def _needed(action: Action, last: int) -> _Key | None:
    """The result of another stage that ``action`` waits for."""
    if action.kind == "F" and action.stage > 0:
        return (True, action.stage - 1, action.microbatch)
    if action.kind in "BI" and action.stage < last:
        return (False, action.stage + 1, action.microbatch)
    return None


def in_flight(order: Sequence[Sequence[Action]]) -> list[int]:
    """Most microbatches whose activations a rank holds at once, by rank; each of its stages counts one of its own."""
    peaks = []
    for actions in order:
        held = peak = 0
        for action in actions:
            held += {"F": 1, "B": -1, "W": -1}.get(action.kind, 0)
            peak = max(peak, held)
        peaks.append(peak)
    return peaks
