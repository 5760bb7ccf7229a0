"""The measured bubble: sleeping stages against the simulator, what the gap is made of, clocks, the cost of timing."""

import functools
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from harness import run_ranks
from torch import nn

from cuboid.parallel.layout import Layout
from cuboid.parallel.mesh import connect
from cuboid.parallel.pipeline import ActionTime, Pipeline, Timer
from cuboid.parallel.schedules import SCHEDULES, order, stage_indices
from cuboid.parallel.simulation import ideal_bubble, simulate
from cuboid.parallel.whereabouts import Whereabouts, path_of
from cuboid.trainer import metrics
from cuboid.trainer.metrics import BubbleMeter, StepTimes, bubble, clock_offset

RANKS, MICROBATCHES, SLOW = 4, 8, 2
STAGES = {name: spec.default_virtual_stages for name, spec in SCHEDULES.items()}
NAPS_TOLERANCE = 0.0125
"""Actions take a little longer than the naps in them, the more so where others want the cores: about 0.006."""


class SleepingStage(nn.Module):
    """Sleeps ``seconds`` forward, for the input gradient and for the weight gradient: needs no core, so that 4 ranks
    on 2 cores do not disturb it.

    ``naps`` has when each sleep began and ended, by the stage's own look at the clock.
    """

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.naps = seconds, []
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, *, position_ids):
        self.sleep()
        hidden = x if x.is_floating_point() else x[..., None].float()
        return SleepBackward.apply(hidden, self) + SleepBackward.apply(self.weight, self)

    def sleep(self):
        began = time.monotonic()
        time.sleep(self.seconds)
        self.naps.append((began, time.monotonic()))


class SleepBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stage):
        ctx.stage = stage
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.stage.sleep()
        return grad.contiguous(), None  # gloo sends nothing else


def sleeping_pipeline(block, schedule):
    virtual_stages, place = STAGES[schedule], block.coordinate
    indices = stage_indices(schedule, pipeline=RANKS, rank=place.pipeline, virtual_stages=virtual_stages)
    modules = {i: SleepingStage(0.0) for i in indices}
    pipeline = Pipeline(
        modules,
        schedule=schedule,
        microbatches=MICROBATCHES,
        group=block.mesh["pipeline"].get_group(),
        loss=lambda output, targets: output.sum(),
        boundary=torch.empty(1, 2, 1, device="meta"),
        logits=torch.empty(1, 2, 1, device="meta"),
        whereabouts=block.whereabouts,
    )
    return pipeline, modules


def nominal(schedule, seconds, slow_stage):
    def sleeps(action):
        # the first stage has no input gradient; torch computes all of its split backward in W
        parts = {"F": 1, "B": 2, "I": 1, "W": 1, "R": 0} | ({"B": 1, "I": 0} if action.stage == 0 else {})
        return parts[action.kind] * (2 if action.stage == slow_stage else 1) * seconds

    sizes = {"pipeline": RANKS, "virtual_stages": STAGES[schedule], "microbatches": MICROBATCHES}
    return simulate(order(schedule, **sizes), sleeps)


def is_as_simulated(result, simulation, tolerance):
    shares = [1 - busy / simulation.wall for busy in simulation.busy]
    return (
        abs(result.measured - result.expected) < tolerance
        and abs(result.measured - simulation.bubble) < tolerance
        and result.by_rank == pytest.approx(shares, abs=2 * tolerance)
    )


def bubble_of_naps(naps):
    """The bubble of a step from what its stages noted themselves; on every rank."""
    by_rank = [None] * RANKS
    torch.distributed.all_gather_object(by_rank, naps)
    wall = max(stop for own in by_rank for _, stop in own) - min(start for own in by_rank for start, _ in own)
    return 1 - sum(stop - start for own in by_rank for start, stop in own) / (RANKS * wall)


def sleep_through(block, schedule, seconds, slow_stage, tolerance, at_least):
    """Steps with stage ``slow_stage`` taking twice as long: of each, the measured `Bubble` (rank 0) and that of naps.

    Other work on the machine delays those that sleep, and the bubble is then really larger: up to eight steps
    are tried for one that it left alone. What is measured must agree with the naps in most of them.
    """
    pipeline, modules = sleeping_pipeline(block, schedule)
    meter = BubbleMeter(block, schedule=schedule, virtual_stages=STAGES[schedule], microbatches=MICROBATCHES)
    ids, simulation = torch.zeros(MICROBATCHES, 2, dtype=torch.int64), nominal(schedule, seconds, slow_stage)
    targets, steps, enough = {"targets": ids}, [], torch.tensor(False)
    for attempt in range(9):  # the first one, without sleep, opens connections
        for i, module in modules.items():
            module.seconds, module.naps = (2 if i == slow_stage else 1) * (seconds if attempt else 0.0), []
        pipeline.step(ids if pipeline.is_first else None, targets if pipeline.is_last else None, position_ids=ids)
        result = meter.measure(pipeline)
        napped = bubble_of_naps([nap for module in modules.values() for nap in module.naps])
        if result is not None and attempt:
            steps.append((result.bubble, napped))
            found = any(is_as_simulated(found, simulation, tolerance) for found, _ in steps)
            enough.fill_(found and len(steps) >= at_least)
        torch.distributed.broadcast(enough, src=0)
        if enough:
            break
    return steps


def sleep_with_and_without_a_slow_stage(*arguments):
    schedule, *others = arguments
    with connect(Layout(pipeline=RANKS)) as block:
        return {slow: sleep_through(block, schedule, others[0], slow, *others[1:]) for slow in (None, SLOW)}


def sleep_through_schedules(seconds, tolerance, at_least, at_once):
    """Of every schedule what its ranks found, ``at_once`` of them at a time: who sleeps needs no core."""
    # processes, since a fork out of several threads may copy a lock that is held
    with ProcessPoolExecutor(at_once, mp_context=get_context("fork")) as pool:
        found = {
            schedule: pool.submit(
                run_ranks,
                sleep_with_and_without_a_slow_stage,
                RANKS,
                *(schedule, seconds, tolerance, at_least),
                timeout=60 + 1000 * seconds,
            )
            for schedule in SCHEDULES
        }
        return {schedule: future.result()[0] for schedule, future in found.items()}


def assert_measured_as_simulated(schedule, results, seconds, tolerance):
    """Returns the measured bubble where all stages take equally long."""
    measured = {}
    for slow, steps in results.items():
        simulation, words = nominal(schedule, seconds, slow), f"slow stage {slow}: {steps}"
        # whatever else the machine did; the median, since a rank may lose its core between a nap and the action's end
        assert statistics.median(abs(found.measured - napped) for found, napped in steps) < NAPS_TOLERANCE, words
        undisturbed = [found for found, _ in steps if is_as_simulated(found, simulation, tolerance)]
        assert undisturbed, words
        sizes = {"pipeline": RANKS, "virtual_stages": STAGES[schedule], "microbatches": MICROBATCHES}
        for result in undisturbed:
            assert result.ideal == ideal_bubble(schedule, **sizes)
            assert result.slow_stage == slow, words
        measured[slow] = undisturbed[0].measured
    return measured[None]


@pytest.fixture(scope="module")
def slept():
    return sleep_through_schedules(0.05, 0.025, at_least=3, at_once=2)


@pytest.mark.alone
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sleeping_stages_are_measured_as_simulated(schedule, slept):
    assert_measured_as_simulated(schedule, slept[schedule], seconds=0.05, tolerance=0.025)


@pytest.mark.alone
@pytest.mark.full
@pytest.mark.timeout(600)
def test_sleeping_stages_at_200_milliseconds():
    found = sleep_through_schedules(0.2, 0.01, at_least=1, at_once=4)
    measured = {name: assert_measured_as_simulated(name, found[name], 0.2, tolerance=0.01) for name in SCHEDULES}
    assert measured["1f1b"] > measured["interleaved_1f1b"] > measured["zbv"]


def as_simulated(schedule, seconds, ready=None, delay=0.0, **sizes):
    """Times of a step that ran as simulated from t = 100 s, each message ``delay`` late; ranks ready at ``ready``."""
    actions = order(schedule, **sizes)
    simulation = simulate(actions, lambda action: seconds(action) + delay, ready=ready)
    return [
        [
            ActionTime(
                action.kind, action.stage, action.microbatch, 100 + start, 100 + stop - delay, seconds(action) / 2
            )
            for action, start, stop in zip(*columns, strict=True)
        ]
        for columns in zip(actions, simulation.starts, simulation.stops, strict=True)
    ]


SIZES = {"pipeline": 4, "virtual_stages": 1, "microbatches": 8}


def unequal(action):
    return {"F": 1.0, "B": 2.0, "R": 0.25}[action.kind] * (1.5 if action.stage == 1 else 1.0)


def explain(actions, freed=(99.0,) * 4, entered=(99.5,) * 4, contended=False):
    times = StepTimes(actions=actions, freed=freed, entered=entered, updated=(140.0,) * 4)
    return bubble(times, ideal=ideal_bubble("1f1b", **SIZES), contended=contended)


def test_a_step_without_delays_has_no_gap():
    result = explain(as_simulated("1f1b", unequal, **SIZES), contended=True)
    simulation = simulate(order("1f1b", **SIZES), unequal)
    assert result.measured == pytest.approx(simulation.bubble)
    assert result.expected == pytest.approx(simulation.bubble)
    assert result.replayed == pytest.approx(simulation.bubble), "thread times here are half of wall times"
    assert result.by_rank == pytest.approx([1 - busy / simulation.wall for busy in simulation.busy])
    assert (result.optimizer, result.input, result.communication) == pytest.approx((0, 0, 0), abs=1e-12)
    assert result.imbalance == pytest.approx(simulation.bubble - 3 / 11)
    assert result.stage_seconds == pytest.approx((3.0, 4.5, 3.0, 3.0))
    assert result.slow_stage == 1
    assert result.pipeline_seconds == pytest.approx(simulation.wall)
    assert result.input_seconds == pytest.approx(0.5)
    assert result.optimizer_seconds == pytest.approx(40 - simulation.wall)


def test_the_gap_is_split_into_what_caused_it():
    late = explain(as_simulated("1f1b", unequal, ready=[0, 6, 0, 0], **SIZES), entered=(100, 106, 99, 99))
    assert late.input == pytest.approx(late.measured - late.expected)
    assert late.input > 0.01
    assert (late.optimizer, late.communication) == pytest.approx((0, 0), abs=1e-12)
    times = {"freed": (100, 104, 99, 99), "entered": (100, 106, 99, 99)}
    both = explain(as_simulated("1f1b", unequal, ready=[0, 6, 0, 0], **SIZES), **times)
    assert both.optimizer > 0.01
    assert both.optimizer + both.input == pytest.approx(late.input)
    slow_messages = explain(as_simulated("1f1b", unequal, delay=0.5, **SIZES))
    assert slow_messages.communication > 0.05
    for result in (late, both, slow_messages):
        parts = (result.ideal, result.imbalance, result.optimizer, result.input, result.communication)
        assert sum(parts) == pytest.approx(result.measured)


def test_one_hiccup_names_no_stage_slow():
    actions = as_simulated("1f1b", lambda a: 50.0 if (a.kind, a.stage, a.microbatch) == ("F", 3, 5) else 1.0, **SIZES)
    assert explain(actions).slow_stage is None


def test_one_stage_alone_has_no_bubble():
    sizes = {"pipeline": 1, "virtual_stages": 1, "microbatches": 3}
    times = StepTimes(actions=as_simulated("1f1b", unequal, **sizes), freed=(99,), entered=(99,), updated=(120,))
    result = bubble(times, ideal=ideal_bubble("1f1b", **sizes), contended=False)
    assert (result.measured, result.expected, result.ideal) == pytest.approx((0, 0, 0), abs=1e-12)
    assert result.slow_stage is None
    assert "bubble_replayed" not in result.record()


def estimate_offsets():
    with connect(Layout(pipeline=3)) as block:
        error = 1000.0 * block.rank
        return clock_offset(block.mesh["pipeline"].get_group(), now=lambda: time.monotonic() + error)


def test_clocks_of_other_hosts_are_aligned():
    assert run_ranks(estimate_offsets, 3) == pytest.approx([0, -1000, -2000], abs=0.01)


def columns_measured(one_host):
    """A 2 x 2 x 1 block in which data rank 1's pipeline is simply slower; rank 0 gets the mean."""
    with connect(Layout(pipeline=2, data=2)) as block:
        if not one_host:
            metrics._host = lambda: f"host {block.rank}"
        sizes = {"pipeline": 2, "virtual_stages": 1, "microbatches": 4}
        meter = BubbleMeter(block, schedule="1f1b", virtual_stages=1, microbatches=4)
        assert meter._spans_hosts is not one_host, "what is asked for is what is tried"
        own = as_simulated("1f1b", unequal, delay=0.5 * block.coordinate.data, **sizes)[block.coordinate.pipeline]
        return meter.measure(Newest(own, entered_seconds=99.0))


class Newest:
    """What `BubbleMeter` reads of a pipeline."""

    def __init__(self, times, entered_seconds):
        self.times, self.entered_seconds = times, entered_seconds


@pytest.mark.parametrize("one_host", [True, False])
def test_pipelines_are_averaged_on_rank_0(one_host):
    results = run_ranks(columns_measured, 4, one_host)
    assert results[1:] == [None, None, None]
    mean, times = results[0].bubble, results[0].times
    sizes = {"pipeline": 2, "virtual_stages": 1, "microbatches": 4}
    ideal, measured = ideal_bubble("1f1b", **sizes), []
    for delay in (0.0, 0.5):
        actions = as_simulated("1f1b", unequal, delay=delay, **sizes)
        step = StepTimes(actions=actions, freed=(0, 0), entered=(0, 0), updated=(200, 200))
        measured.append(bubble(step, ideal=ideal, contended=False).measured)
    assert mean.measured == pytest.approx(sum(measured) / 2, abs=1e-3)  # clocks of hosts are aligned, not equal
    assert mean.ideal == ideal
    for own, expected in zip(times.actions, as_simulated("1f1b", unequal, **sizes), strict=True):
        assert [time.action for time in own] == [time.action for time in expected]
        assert [time.stop_seconds for time in own] == pytest.approx([time.stop_seconds for time in expected], abs=0.01)


def cost_of_measuring():
    """Seconds of a step, of measuring it, and of nothing, on 2 x 2 x 2.

    The step stands for the quickstart's, which takes half a second at the very least where 8 ranks share 2 cores: 0.125
    processor seconds of each rank. It is run here so that other work on the machine stretches all three alike.
    """
    with connect(Layout(pipeline=2, data=2, tensor=2)) as block:
        meter = BubbleMeter(block, schedule="1f1b", virtual_stages=1, microbatches=8)
        sizes = {"pipeline": 2, "virtual_stages": 1, "microbatches": 8}
        newest = Newest(as_simulated("1f1b", unequal, **sizes)[block.coordinate.pipeline], entered_seconds=99.0)

        def work():
            end = time.process_time() + 0.125
            while time.process_time() < end:
                sum(range(1000))

        def median_seconds(call, times):
            seconds = []
            for _ in range(times):
                torch.distributed.barrier()
                start = time.perf_counter()
                call()
                torch.distributed.barrier()
                seconds.append(time.perf_counter() - start)
            return statistics.median(seconds)

        measure = functools.partial(meter.measure, newest)
        return [(median_seconds(work, 1), median_seconds(measure, 15), median_seconds(int, 15)) for _ in range(4)]


@pytest.mark.alone
def test_timing_costs_less_than_one_percent_of_a_step(tmp_path):
    timer, calls = Timer(torch.device("cpu"), Whereabouts(path_of(tmp_path, 0))), 2000

    def seconds_of_a_call():
        timer.begin()
        start = time.perf_counter()
        for microbatch in range(calls):
            timer.time("F", 0, microbatch, int)
        return (time.perf_counter() - start) / calls

    call = min(seconds_of_a_call() for _ in range(5))
    actions = sum(len(own) for own in order("1f1b", pipeline=2, virtual_stages=1, microbatches=8))
    # 4 pipelines; as if all ranks shared one core
    rounds = run_ranks(cost_of_measuring, 8)[0]
    shares = [(4 * actions * call + measured - nothing) / step for step, measured, nothing in rounds]
    # other work on the machine only adds to it
    assert min(shares) < 0.01, f"{call * 1e6:.1f} us a call; shares of a step: {shares}"
