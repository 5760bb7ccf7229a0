"""The pipeline bubble of each step: gathered from the ranks, measured, compared with what it should be, explained.

Words of one step and one pipeline (the ranks of one data and one tensor coordinate):

wall         first start of an action to last stop of an action over the ranks of the pipeline, seconds
busy         of a rank: time inside its actions F, B, I, W and R. Collectives of the tensor and data axes happen inside
             actions and count as busy; waiting for another pipeline rank happens outside, and is idle
idle         wall - busy
bubble       mean over the pipeline's ranks of idle / wall

Clock: the host's monotonic clock, which all ranks of a host share. Where a pipeline spans hosts, each rank's offset
from the pipeline's first rank is estimated over the network (`clock_offset`) at the start and every
`CLOCK_EVERY` steps; its error is at most half of the fastest round trip, tens of microseconds on Ethernet.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from operator import itemgetter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cuboid.parallel.layout import Coordinate
from cuboid.parallel.mesh import Block
from cuboid.parallel.pipeline import ActionTime, Pipeline
from cuboid.parallel.schedules import order
from cuboid.parallel.simulation import ideal_bubble, simulate
from cuboid.trainer.check import num_cores

CLOCK_EVERY = 100
"""Steps between two estimates of the offsets of clocks, which drift by microseconds a second."""
CLEARLY_SLOWER = 1.4
"""A stage is named slow from this many times the median of the other stages on."""


@dataclass(frozen=True, kw_only=True)
class Bubble:
    """The bubble of one step; means over the pipelines, as shares of the wall unless said otherwise.

    ``measured = ideal + imbalance + optimizer + input + communication`` holds exactly; the last three are the gap
    between measured and expected.
    """

    measured: float
    expected: float
    """Of the simulated schedule with this step's own durations of each action: what is left when messages take no time
    and every rank is there from the start."""
    ideal: float
    """`simulation.ideal_bubble`: equal stages. Not a lower bound: the first stage computes no input gradient."""
    replayed: float | None
    """Expected, with the processor time of each action in place of its wall time; None unless ranks outnumber cores,
    where wall times are contention."""
    imbalance: float
    """expected - ideal: stages and microbatches that take unequally long. Negative where the slow stage hides it."""
    optimizer: float
    """Added to the simulated bubble by ranks that came late out of the step before: exchange of gradients, update."""
    input: float
    """Added to that by ranks that came later still: fetching the batch, and what the loop does between steps (saving,
    logging)."""
    communication: float
    """The rest: messages between stages, and the host's work between two actions."""
    by_rank: tuple[float, ...]
    """idle / wall of each pipeline rank."""
    stage_seconds: tuple[float, ...]
    """Median forward + median backward of each stage, seconds a microbatch."""
    pipeline_seconds: float
    """The wall."""
    input_seconds: float
    """From the end of the step before until the batch entered the pipeline, mean over the ranks."""
    optimizer_seconds: float
    """From the end of the wall until the pipeline's last rank had updated its parameters."""

    @property
    def slow_stage(self) -> int | None:
        """The stage that takes clearly longer than the others (`CLEARLY_SLOWER`), or None."""
        if len(self.stage_seconds) < 2:
            return None
        stage, seconds = max(enumerate(self.stage_seconds), key=itemgetter(1))
        others = statistics.median(self.stage_seconds[:stage] + self.stage_seconds[stage + 1 :])
        return stage if seconds > CLEARLY_SLOWER * others else None

    def record(self) -> dict[str, object]:
        """The fields of ``metrics.jsonl``; ``bubble_by_stage`` has the idle share of each pipeline rank, which with
        interleaving holds several stages (`schedules.stage_indices`), while ``bubble_slow_stage`` is a stage."""
        record: dict[str, object] = {
            "bubble_measured": self.measured,
            "bubble_expected": self.expected,
            "bubble_ideal": self.ideal,
            "bubble_by_stage": list(self.by_rank),
            "bubble_slow_stage": self.slow_stage,
            "bubble_imbalance": self.imbalance,
            "bubble_communication": self.communication,
            "bubble_input": self.input,
            "bubble_optimizer": self.optimizer,
            "pipeline_seconds": self.pipeline_seconds,
            "input_seconds": self.input_seconds,
            "optimizer_seconds": self.optimizer_seconds,
        }
        return record if self.replayed is None else record | {"bubble_replayed": self.replayed}


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """One step of one pipeline, on one clock; a list has one entry for each pipeline rank."""

    actions: Sequence[Sequence[ActionTime]]
    freed: Sequence[float]
    """When the rank had finished the step before."""
    entered: Sequence[float]
    """When it had its batch."""
    updated: Sequence[float]
    """When it had updated its parameters."""


def bubble(times: StepTimes, *, ideal: float, contended: bool) -> Bubble:
    """The `Bubble` of one pipeline; ``contended`` where ranks outnumber cores."""
    first = min(actions[0].start_seconds for actions in times.actions)
    last = max(time.stop_seconds for actions in times.actions for time in actions)
    wall, ranks = last - first, len(times.actions)
    idle = [wall - sum(time.seconds for time in actions) for actions in times.actions]
    measured = sum(idle) / (ranks * wall)
    as_run = [[time.action for time in actions] for actions in times.actions]

    def simulated(ready: Sequence[float] | None, clock: str = "seconds") -> float:
        seconds = {time.action: getattr(time, clock) for actions in times.actions for time in actions}
        return simulate(as_run, seconds.__getitem__, ready=ready).bubble

    expected = simulated(None)
    freed = [max(0.0, moment - first) for moment in times.freed]
    entered = [max(0.0, moment - first) for moment in times.entered]
    after_optimizer = simulated(freed) if any(freed) else expected
    after_input = simulated(entered) if any(entered) else after_optimizer
    return Bubble(
        measured=measured,
        expected=expected,
        ideal=ideal,
        replayed=simulated(None, "thread_seconds") if contended else None,
        imbalance=expected - ideal,
        optimizer=after_optimizer - expected,
        input=after_input - after_optimizer,
        communication=measured - after_input,
        by_rank=tuple(share / wall for share in idle),
        stage_seconds=_stage_seconds(times.actions),
        pipeline_seconds=wall,
        input_seconds=sum(times.entered) / ranks - sum(times.freed) / ranks,
        optimizer_seconds=max(times.updated) - last,
    )


def _stage_seconds(actions: Sequence[Sequence[ActionTime]]) -> tuple[float, ...]:
    by_kind: dict[tuple[int, str], list[float]] = {}
    for time_ in (time_ for own in actions for time_ in own if time_.kind != "R"):
        by_kind.setdefault((time_.stage, time_.kind), []).append(time_.seconds)
    stages = range(1 + max(stage for stage, _ in by_kind))
    return tuple(sum(statistics.median(by_kind.get((stage, kind), [0.0])) for kind in "FBIW") for stage in stages)


@dataclass(frozen=True)
class Measurement:
    """What rank 0 learns of a step: the mean over the pipelines, and the times of its own pipeline for the picture."""

    title: str
    """What ran: schedule, layout, microbatches."""
    bubble: Bubble
    times: StepTimes


class BubbleMeter:
    """Measures every step of a run; every rank makes one and calls it once a step, after the update.

    The pipelines of tensor coordinate 0 are measured: tensor ranks meet in every layer, so that theirs run alike. Each
    rank of these sends one message a step, 3 numbers an action, to its pipeline's first rank, which sends a few dozen
    numbers on to rank 0. Point to point: where ranks outnumber cores, a gloo reduction takes several times as long.
    """

    def __init__(self, block: Block, *, schedule: str, virtual_stages: int, microbatches: int) -> None:
        layout, place = block.layout, block.coordinate
        sizes = {"pipeline": layout.pipeline, "virtual_stages": virtual_stages, "microbatches": microbatches}
        self._title = f"{schedule}, {layout}, {microbatches} microbatches"
        self._order = order(schedule, **sizes)
        self._ideal = ideal_bubble(schedule, **sizes)
        self._place = place
        self._first_ranks = [layout.rank(Coordinate(0, data, 0)) for data in range(layout.data)]
        self._group = block.mesh["pipeline"].get_group()
        hosts: list[str] = [""] * layout.world_size
        dist.all_gather_object(hosts, _host())
        self.contended = block.device.type == "cpu" and max(Counter(hosts).values()) > num_cores()
        """Whether ranks outnumber the cores of a host, so that wall times are contention."""
        column = {hosts[layout.rank(place._replace(pipeline=rank))] for rank in range(layout.pipeline)}
        self._spans_hosts = len(column) > 1
        self._offset, self._steps = 0.0, 0
        self._freed: float | None = None

    def measure(self, pipeline: Pipeline) -> Measurement | None:
        """The newest step of ``pipeline``, on rank 0; None elsewhere. All ranks call it together."""
        updated = time.monotonic()
        if self._place.tensor:
            return None
        if self._spans_hosts and self._steps % CLOCK_EVERY == 0:
            self._offset = clock_offset(self._group)
        self._steps += 1
        own = pipeline.times
        mine = self._order[self._place.pipeline]
        assert [time_.action for time_ in own] == mine, "the schedule ran in another order than the one simulated"
        freed = pipeline.entered_seconds if self._freed is None else self._freed
        rows = [(freed, pipeline.entered_seconds, updated)]
        rows += [(time_.start_seconds, time_.stop_seconds, time_.thread_seconds) for time_ in own]
        sent = torch.tensor(rows, dtype=torch.float64)
        sent[0] += self._offset
        sent[1:, :2] += self._offset
        if self._place.pipeline:
            dist.send(sent, group=self._group, group_dst=0)
            result = None
        else:
            result = self._collect(sent)
        self._freed = time.monotonic()
        return result

    def _collect(self, own: Tensor) -> Measurement | None:
        """On a pipeline's first rank: its ranks' times become its bubble; on rank 0 all of these become the mean."""
        tables = [own, *(own.new_empty(1 + len(actions), own.shape[1]) for actions in self._order[1:])]
        for rank in range(1, len(tables)):
            dist.recv(tables[rank], group=self._group, group_src=rank)
        times = self._step_times(tables)
        result = bubble(times, ideal=self._ideal, contended=self.contended)
        numbers = _numbers(result)
        if dist.get_rank():
            dist.send(numbers, 0)
            return None
        total, other = numbers.clone(), torch.empty_like(numbers)
        for rank in self._first_ranks[1:]:
            dist.recv(other, rank)
            total += other
        return Measurement(self._title, _from_numbers(total / len(self._first_ranks), like=result), times)

    def _step_times(self, received: Sequence[Tensor]) -> StepTimes:
        tables = [table.tolist() for table in received]
        freed, entered, updated = zip(*(table[0] for table in tables), strict=True)
        actions = [
            [
                ActionTime(action.kind, action.stage, action.microbatch, start, stop, thread, action.held)
                for action, (start, stop, thread) in zip(own, table[1:], strict=True)
            ]
            for own, table in zip(self._order, tables, strict=True)
        ]
        return StepTimes(actions=actions, freed=freed, entered=entered, updated=updated)


_SCALARS = tuple(field.name for field in fields(Bubble) if field.name not in ("by_rank", "stage_seconds"))


def _numbers(own: Bubble) -> Tensor:
    """A `Bubble` as float64 [numbers], to be averaged."""
    scalars = [getattr(own, name) or 0.0 for name in _SCALARS]
    return torch.tensor([*scalars, *own.by_rank, *own.stage_seconds], dtype=torch.float64)


def _from_numbers(numbers: Tensor, *, like: Bubble) -> Bubble:
    values = iter(numbers.tolist())
    scalars = {name: next(values) for name in _SCALARS}
    if like.replayed is None:
        scalars["replayed"] = None
    by_rank = tuple(next(values) for _ in like.by_rank)
    return Bubble(**scalars, by_rank=by_rank, stage_seconds=tuple(values))


def clock_offset(group: ProcessGroup, *, now: Callable[[], float] = time.monotonic, rounds: int = 8) -> float:
    """Seconds to add to this rank's clock so that it reads like that of the group's first rank; 0 on that rank.

    Cristian 1989, "Probabilistic clock synchronization": the first rank is asked for its time, and the answer that came
    back soonest is taken to have been given half-way.
    """
    message = torch.zeros(1, dtype=torch.float64)
    if group.rank() == 0:
        for peer in (peer for peer in range(1, group.size()) for _ in range(rounds)):
            dist.recv(message, group=group, group_src=peer)
            dist.send(torch.tensor([now()], dtype=torch.float64), group=group, group_dst=peer)
        return 0.0
    answers = []
    for _ in range(rounds):
        asked = now()
        dist.send(message, group=group, group_dst=0)
        dist.recv(message, group=group, group_src=0)
        answered = now()
        answers.append((answered - asked, message.item() - (asked + answered) / 2))
    return min(answers)[1]


def _host() -> str:
    """The machine whose monotonic clock this process reads, whatever it is called in its container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else platform.node()
