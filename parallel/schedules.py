"""Which stage stands on which pipeline rank, in what order each rank acts, and how long that takes. Imports no torch.

Words: a pipeline of p ranks and v stages a rank has n = p v stages; a step runs m microbatches through all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from cuboid.parallel.errors import FieldError, UserError, one_of


@dataclass(frozen=True, slots=True)
class Action:
    """One piece of work of one rank.

    ``kind`` is F (forward, with the loss on the last stage), B (full backward), I (input gradient alone), W (weight
    gradient alone) or R (reduction of the stage's gradients over the data axis, once a step, ``microbatch`` -1).
    """

    kind: str
    stage: int
    microbatch: int


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """What a schedule is called, what it needs, and which step of the project offers it."""

    name: str
    torch_name: str
    default_virtual_stages: int = 1
    splits_backward: bool = False
    v_shaped: bool = False
    offered: bool = True

    @property
    def looped(self) -> bool:
        """Whether a rank holds several stages."""
        return self.default_virtual_stages > 1

    def check(self, *, pipeline: int, virtual_stages: int, microbatches: int) -> list[UserError]:
        """Every reason why this schedule cannot run so, each with the values that would work; empty where it can."""
        return [FieldError(*reason) for reason in self._reasons(pipeline, virtual_stages, microbatches)]

    def _reasons(self, p: int, v: int, m: int) -> Iterator[tuple[str, object, str, str]]:
        if not self.offered:
            offered = one_of([spec.name for spec in SCHEDULES.values() if spec.offered])
            yield "parallel.schedule", self.name, "is not offered yet", f"use {offered}"
            return
        if self.looped and v < 2:
            constraint = f"is too few for {self.name}, which interleaves the stages of a rank"
            yield "parallel.virtual_stages", v, constraint, "use 2 or more, or schedule 1f1b"
        if not self.looped and v != 1:
            constraint = f"is too many for {self.name}, which has one stage a rank"
            yield "parallel.virtual_stages", v, constraint, "use 1 or null, or schedule interleaved_1f1b"
        if m < 1:
            yield "parallel.microbatches", m, "is no number of microbatches", "use 1 or more"
        elif self.name == "1f1b" and m < p:  # torch's Schedule1F1B refuses it
            constraint = f"is fewer than the {p} stages that 1f1b keeps busy"
            yield "parallel.microbatches", m, constraint, f"use {p} or more, or schedule gpipe"
        elif self.name == "interleaved_1f1b" and not _rounds_are_even(p, m):
            below = next(fewer for fewer in range(m - 1, 0, -1) if _rounds_are_even(p, fewer))
            above = next(more for more in range(m + 1, 2 * m + p) if _rounds_are_even(p, more))
            constraint = f"does not divide into {m // p} equal rounds over {p} pipeline ranks"
            yield "parallel.microbatches", m, constraint, f"use {below} or {above}; any multiple of {p} works"


def _rounds_are_even(pipeline: int, microbatches: int) -> bool:
    """What torch's ScheduleInterleaved1F1B asks for: max(1, m // p) rounds of equally many microbatches."""
    return microbatches % max(1, microbatches // pipeline) == 0


SCHEDULES: Mapping[str, ScheduleSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            ScheduleSpec(name="gpipe", torch_name="GPipe"),
            ScheduleSpec(name="1f1b", torch_name="1F1B"),
            ScheduleSpec(name="interleaved_1f1b", torch_name="Interleaved1F1B", default_virtual_stages=2),
            ScheduleSpec(name="looped_bfs", torch_name="LoopedBFS", default_virtual_stages=2, offered=False),
            ScheduleSpec(
                name="interleaved_zero_bubble",
                torch_name="InterleavedZeroBubble",
                default_virtual_stages=2,
                splits_backward=True,
                offered=False,
            ),
            ScheduleSpec(
                name="zbv",
                torch_name="ZBVZeroBubble",
                default_virtual_stages=2,
                splits_backward=True,
                v_shaped=True,
                offered=False,
            ),
            ScheduleSpec(
                name="dualpipe_v",
                torch_name="DualPipeV",
                default_virtual_stages=2,
                splits_backward=True,
                v_shaped=True,
                offered=False,
            ),
        )
    }
)


def stage_indices(schedule: str, *, pipeline: int, rank: int, virtual_stages: int) -> tuple[int, ...]:
    """The stages on pipeline rank ``rank``, in the order in which a microbatch passes through them.

    Looped: rank, rank + p, rank + 2p, ... V-shaped schedules turn round at the end, so that the first rank also holds
    the last stage.
    """
    if SCHEDULES[schedule].v_shaped:
        assert virtual_stages == 2, f"{schedule} is a V of 2 stages a rank, not {virtual_stages}"
        return (rank, 2 * pipeline - 1 - rank)
    return tuple(rank + turn * pipeline for turn in range(virtual_stages))


def order(schedule: str, *, pipeline: int, virtual_stages: int, microbatches: int) -> list[list[Action]]:
    """What each pipeline rank does, in order; the same as torch executes (`Schedule1F1B.pipeline_order`, which is only
    drawn, is wrong for the last rank in torch 2.13). A stage's R follows its last backward."""
    spec = SCHEDULES[schedule]
    sizes = {"pipeline": pipeline, "virtual_stages": virtual_stages, "microbatches": microbatches}
    assert not spec.check(**sizes), f"{schedule} cannot run with {sizes}"
    by_rank = []
    for rank in range(pipeline):
        stages = stage_indices(schedule, pipeline=pipeline, rank=rank, virtual_stages=virtual_stages)
        # all microbatches of a round pass through one stage of the rank before the next stage takes them
        per_round = microbatches // max(1, microbatches // pipeline) if spec.looped else microbatches
        forward = [Action("F", stage, m) for stage, m in _rounds(stages, per_round, microbatches)]
        backward = [Action("B", stage, m) for stage, m in _rounds(stages[::-1], per_round, microbatches)]
        if schedule == "gpipe":
            warmup = len(forward)
        elif schedule == "1f1b":
            warmup = pipeline - 1 - rank
        else:
            # Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", section 2.2
            warmup = (virtual_stages - 1) * per_round + 2 * (pipeline - 1 - rank)
        by_rank.append(_with_reductions(_one_forward_one_backward(forward, backward, min(warmup, len(forward)))))
    return by_rank


def _rounds(stages: Sequence[int], per_round: int, microbatches: int) -> list[tuple[int, int]]:
    starts = range(0, microbatches, per_round)
    return [(stage, m) for start in starts for stage in stages for m in range(start, start + per_round)]


def _one_forward_one_backward(forward: list[Action], backward: list[Action], warmup: int) -> list[Action]:
    steady = [action for pair in zip(forward[warmup:], backward, strict=False) for action in pair]
    return forward[:warmup] + steady + backward[len(forward) - warmup :]


def _with_reductions(actions: list[Action]) -> list[Action]:
    last = {action.stage: index for index, action in enumerate(actions) if action.kind in "BW"}
    reductions = {index: Action("R", stage, -1) for stage, index in last.items()}
    return [a for index, action in enumerate(actions) for a in (action, reductions.get(index)) if a is not None]


def ideal_bubble(schedule: str, *, pipeline: int, virtual_stages: int, microbatches: int) -> float:
    """Idle share of the wall time where all forwards take equally long, all backwards too, and messages no time.

    With m >= p microbatches (p - 1) / (v m + p - 1), v = 1 for GPipe and 1F1B: Huang et al. 2019, "GPipe", section
    2.3; Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", section 2.2 (given
    there as a share of the busy time, (p - 1) / (v m)). With fewer, a rank waits for the first microbatch to come
    round again, and the wall is v p + m - 1 forwards and backwards long.
    """
    sizes = {"pipeline": pipeline, "virtual_stages": virtual_stages, "microbatches": microbatches}
    assert not SCHEDULES[schedule].check(**sizes), f"{schedule} cannot run with {sizes}"
    wall = virtual_stages * max(microbatches, pipeline) + min(microbatches, pipeline) - 1
    return 1 - virtual_stages * microbatches / wall


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
    done: dict[tuple[bool, int, int], float] = {}
    waiting: dict[tuple[bool, int, int], int] = {}
    clock = list(ready) if ready is not None else [0.0] * len(order)
    starts: list[list[float]] = [[] for _ in order]
    stops: list[list[float]] = [[] for _ in order]
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
            starts[rank].append(start)
            stops[rank].append(stop)
            if action.kind in "FBI":
                key = (action.kind == "F", action.stage, action.microbatch)
                done[key] = stop
                if key in waiting:
                    runnable.append(waiting.pop(key))
    if waiting:
        raise ValueError(f"the order of actions waits for itself: {sorted(waiting)}")
    return Simulation(order, starts, stops)


def _needed(action: Action, last: int) -> tuple[bool, int, int] | None:
    """The (is forward, stage, microbatch) of another stage that ``action`` waits for."""
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
