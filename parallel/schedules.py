"""Which stage stands on which pipeline rank, and in what order each rank acts. Imports no torch.

Words: a pipeline of p ranks and v stages a rank has n = p v stages; a step runs m microbatches through all of them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from cuboid.parallel.errors import FieldError, UserError


@dataclass(frozen=True, slots=True)
class Action:
    """One piece of work of one rank.

    ``kind`` is F (forward, with the loss on the last stage), B (full backward), I (input gradient alone), W (weight
    gradient alone) or R (reduction of the stage's gradients over the data axis, once a step, ``microbatch`` -1).
    """

    kind: str
    stage: int
    microbatch: int
    held: bool = field(default=False, compare=False)
    """Whether the result is sent only when the rank's next action is done, too: two that overlap are one to torch."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """What a schedule is called and what it needs."""

    name: str
    torch_name: str
    default_virtual_stages: int = 1
    in_rounds: bool = False
    """Whether microbatches pass in rounds of about as many as there are ranks."""
    splits_backward: bool = False
    """Whether some backwards are two actions, I and W."""
    v_shaped: bool = False

    @property
    def looped(self) -> bool:
        """Whether a rank holds several stages."""
        return self.default_virtual_stages > 1

    def check(self, *, pipeline: int, virtual_stages: int, microbatches: int) -> list[UserError]:
        """Every reason why this schedule cannot run so, each with the values that would work; empty where it can."""
        return [FieldError(*reason) for reason in self._reasons(pipeline, virtual_stages, microbatches)]

    def _reasons(self, p: int, v: int, m: int) -> Iterator[tuple[str, object, str, str]]:
        if self.v_shaped and v != 2:
            yield "parallel.virtual_stages", v, f"is not the 2 that {self.name} lays in a V", "use 2 or null"
        elif self.looped and v < 2:
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
        elif self.name == "dualpipe_v" and m < 2 * p:  # torch's ScheduleDualPipeV refuses it
            constraint = f"is fewer than the {2 * p} stages that dualpipe_v keeps busy"
            yield "parallel.microbatches", m, constraint, f"use {2 * p} or more, or schedule zbv"
        elif self.in_rounds and not _rounds_are_even(p, m):
            below = next(fewer for fewer in range(m - 1, 0, -1) if _rounds_are_even(p, fewer))
            above = next(more for more in range(m + 1, 2 * m + p) if _rounds_are_even(p, more))
            constraint = f"does not divide into {m // p} equal rounds over {p} pipeline ranks"
            yield "parallel.microbatches", m, constraint, f"use {below} or {above}; any multiple of {p} works"


def _rounds_are_even(pipeline: int, microbatches: int) -> bool:
    """What torch's interleaved schedules ask for: max(1, m // p) rounds of equally many microbatches."""
    return microbatches % max(1, microbatches // pipeline) == 0


SCHEDULES: Mapping[str, ScheduleSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            ScheduleSpec(name="gpipe", torch_name="GPipe"),
            ScheduleSpec(name="1f1b", torch_name="1F1B"),
            ScheduleSpec(
                name="interleaved_1f1b", torch_name="Interleaved1F1B", default_virtual_stages=2, in_rounds=True
            ),
            ScheduleSpec(name="looped_bfs", torch_name="LoopedBFS", default_virtual_stages=2),
            ScheduleSpec(
                name="interleaved_zero_bubble",
                torch_name="InterleavedZeroBubble",
                default_virtual_stages=2,
                in_rounds=True,
                splits_backward=True,
            ),
            ScheduleSpec(
                name="zbv",
                torch_name="ZBVZeroBubble",
                default_virtual_stages=2,
                splits_backward=True,
                v_shaped=True,
            ),
            ScheduleSpec(
                name="dualpipe_v",
                torch_name="DualPipeV",
                default_virtual_stages=2,
                splits_backward=True,
                v_shaped=True,
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
        by_rank.append(_with_reductions(_ORDERS[schedule](rank, pipeline, microbatches, stages)))
    return by_rank


def _gpipe(rank: int, pipeline: int, microbatches: int, stages: Sequence[int]) -> list[Action]:
    """Huang et al. 2019, "GPipe", section 2.3: all forwards, then all backwards."""
    forward, backward = _passes(stages, microbatches, microbatches)
    return forward + backward


def _1f1b(rank: int, pipeline: int, microbatches: int, stages: Sequence[int]) -> list[Action]:
    """Narayanan et al. 2019, "PipeDream", section 3.2, flushed once a step: as many forwards ahead as there are ranks
    behind, then backwards and forwards in turn."""
    return _alternate(*_passes(stages, microbatches, microbatches), warmup=pipeline - 1 - rank)


def _interleaved_1f1b(rank: int, pipeline: int, microbatches: int, stages: Sequence[int]) -> list[Action]:
    """Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", section 2.2."""
    per_round = _microbatches_per_round(pipeline, microbatches)
    warmup = (len(stages) - 1) * per_round + 2 * (pipeline - 1 - rank)
    return _alternate(*_passes(stages, per_round, microbatches), warmup=warmup)


def _looped_bfs(rank: int, pipeline: int, microbatches: int, stages: Sequence[int]) -> list[Action]:
    """Lamy-Poirier 2023, "Breadth-First Pipeline Parallelism", section 4: all microbatches through one stage of a rank
    before the next, and back in the reverse order."""
    forward, _ = _passes(stages, microbatches, microbatches)
    return forward + [Action("B", action.stage, action.microbatch) for action in reversed(forward)]


def _interleaved_zero_bubble(rank: int, pipeline: int, microbatches: int, stages: Sequence[int]) -> list[Action]:
    """Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.3 (ZB-H1), interleaved: a weight gradient waits
    until it fills a gap, on rank r that of r backwards before."""
    per_round = _microbatches_per_round(pipeline, microbatches)
    forward, backward = _passes(stages, per_round, microbatches)
    warmup = (len(stages) - 1) * per_round + pipeline - 1 - rank
    actions: list[Action] = []
    weights: deque[Action] = deque()
    for action in _alternate(forward, backward, warmup=warmup):
        if action.kind == "F":
            actions.append(action)
            continue
        actions.append(replace(action, kind="I"))
        weights.append(replace(action, kind="W"))
        if len(weights) > rank:
            actions.append(weights.popleft())
    return actions + list(weights)


class _VShaped:
    """A rank's actions of a V-shaped schedule: each stage takes its microbatches in turn, and each kind of action of a
    stage counts for itself. ``down`` is the stage on the way down the V, ``up`` the one on the way back."""

    def __init__(self, stages: Sequence[int]) -> None:
        self.down, self.up = stages
        self.actions: list[Action] = []
        self._next: Counter[tuple[str, int]] = Counter()
        self._weights: deque[Action] = deque()

    def count(self, kind: str, stage: int) -> int:
        """How many actions of this kind were added for the stage; a B is an I and a W."""
        return self._next[kind, stage]

    def add(self, kinds: str, stage: int, *, held: bool = False) -> None:
        """The stage's next action of each of ``kinds``: F, B, I, or W for its own oldest weight gradient."""
        for kind in kinds:
            microbatch = self._next["I" if kind == "B" else kind, stage]
            self.actions.append(Action(kind, stage, microbatch, held))
            for part in "IW" if kind == "B" else kind:
                self._next[part, stage] += 1
            if kind == "I":
                self._weights.append(Action("W", stage, microbatch))

    def add_oldest_weight(self) -> None:
        """The weight gradient that has waited longest, of either stage, if one waits."""
        if self._weights:
            action = self._weights.popleft()
            self.actions.append(action)
            self._next["W", action.stage] += 1


def _zbv(rank: int, pipeline: int, microbatches: int, stages: Sequence[int]) -> list[Action]:
    """Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 6 (ZB-V). No bubble inside a rank's own span where
    F, I and W take equally long."""
    v = _VShaped(stages)
    enough = max(2 * pipeline - 1, microbatches)  # with fewer the pipeline never fills: those beyond are left out below
    for _ in range(2 * (pipeline - rank) - 1):
        v.add("F", v.down)
    for _ in range(rank):
        v.add("F", v.up)
        v.add("F", v.down)
    for _ in range(pipeline - rank):
        v.add("FIW", v.up)
    while v.count("F", v.up) < v.count("F", v.down) or v.count("F", v.down) < enough:
        v.add("FIW" if v.count("F", v.down) < enough else "IW", v.down)
        v.add("FIW", v.up)
    for _ in range(rank):
        v.add("I", v.down)
        v.add("I", v.up)
    for _ in range(pipeline - rank):
        v.add("IW", v.down)
    for stage in (v.up, v.down):
        v.add("W" * (enough - v.count("W", stage)), stage)
    return [action for action in v.actions if action.microbatch < microbatches]


def _dualpipe_v(rank: int, pipeline: int, microbatches: int, stages: Sequence[int]) -> list[Action]:
    """DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 3.2.1, cut in half to a V; steps as in its code
    (https://github.com/deepseek-ai/DualPipe). A forward that overlaps with a backward is held until that is done."""
    v, behind = _VShaped(stages), pipeline - 1 - rank
    for _ in range(2 * behind):
        v.add("F", v.down)
    for _ in range(rank + 1):
        v.add("F", v.down)
        v.add("F", v.up)
    for _ in range(behind):
        v.add("I", v.up)
        v.add_oldest_weight()
        v.add("F", v.up)
    for turn in range(microbatches - 2 * pipeline + rank + 1):
        v.add("F", v.down, held=turn > 0 or behind > 0)
        v.add("B", v.up)
        v.add("F", v.up, held=True)
        v.add("B", v.down)
    for _ in range(behind):
        v.add("B", v.up)
        v.add("F", v.up, held=True)
        v.add("B", v.down)
    # the second half of the last backwards is split, from the middle of the middle pair on for odd ranks
    for turn in range(2 * (rank + 1)):
        split = turn > (rank + 1) // 2 * 2 - rank % 2
        v.add("I" if split else "B", v.down if turn % 2 else v.up)
    for _ in range(behind):
        v.add_oldest_weight()
        v.add("I", v.down)
    for _ in range(rank + 1):
        v.add_oldest_weight()
    return v.actions


_ORDERS: Mapping[str, Callable[[int, int, int, Sequence[int]], list[Action]]] = {
    "gpipe": _gpipe,
    "1f1b": _1f1b,
    "interleaved_1f1b": _interleaved_1f1b,
    "looped_bfs": _looped_bfs,
    "interleaved_zero_bubble": _interleaved_zero_bubble,
    "zbv": _zbv,
    "dualpipe_v": _dualpipe_v,
}


def _microbatches_per_round(pipeline: int, microbatches: int) -> int:
    return microbatches // max(1, microbatches // pipeline)


def _passes(stages: Sequence[int], per_round: int, microbatches: int) -> tuple[list[Action], list[Action]]:
    """All forwards and all backwards of a rank: the microbatches of a round pass through one of its stages before the
    next takes them."""
    starts = range(0, microbatches, per_round)

    def one_pass(kind: str, stages: Sequence[int]) -> list[Action]:
        return [Action(kind, stage, m) for start in starts for stage in stages for m in range(start, start + per_round)]

    return one_pass("F", stages), one_pass("B", stages[::-1])


def _alternate(forward: list[Action], backward: list[Action], *, warmup: int) -> list[Action]:
    """``warmup`` forwards, then a forward and a backward in turn, then the backwards that are left."""
    warmup = min(warmup, len(forward))
    steady = [action for pair in zip(forward[warmup:], backward, strict=False) for action in pair]
    return forward[:warmup] + steady + backward[len(forward) - warmup :]


def _with_reductions(actions: list[Action]) -> list[Action]:
    last = {action.stage: index for index, action in enumerate(actions) if action.kind in "BW"}
    reductions = {index: Action("R", stage, -1) for stage, index in last.items()}
    return [a for index, action in enumerate(actions) for a in (action, reductions.get(index)) if a is not None]
