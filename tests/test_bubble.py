"""The measured bubble: sleeping stages against the simulator, what the gap is made of, clocks, and what timing costs."""

import time

import pytest
import torch
from cuboid.parallel.layout import Layout
from cuboid.parallel.mesh import connect
from cuboid.parallel.pipeline import ActionTime, Pipeline, Timer
from cuboid.parallel.schedules import ideal_bubble, order, simulate, stage_indices
from cuboid.trainer.metrics import BubbleMeter, StepTimes, bubble, clock_offset
from harness import run_ranks
from torch import nn

RANKS, MICROBATCHES, SLOW = 4, 8, 2
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2}


class SleepingStage(nn.Module):
    """Sleeps ``seconds`` forward and as long backward: needs no core, so that 4 ranks on 2 cores do not disturb it."""

    def __init__(self, number, seconds):
        super().__init__()
        self.number, self.seconds = number, seconds
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, *, position_ids):
        time.sleep(self.seconds)
        hidden = x if x.is_floating_point() else x[..., None].float()
        return SleepBackward.apply(hidden + self.weight, self)


class SleepBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stage):
        ctx.stage = stage
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.stage.seconds)
        return grad, None


def sleep_through(block, schedule, seconds, slow_stage, repeats):
    """The bubble of each of ``repeats`` steps (rank 0), with stage ``slow_stage`` taking twice as long."""
    virtual_stages, place = SCHEDULES[schedule], block.coordinate
    indices = stage_indices(schedule, pipeline=RANKS, rank=place.pipeline, virtual_stages=virtual_stages)
    modules = {i: SleepingStage(i, 0.0) for i in indices}
    pipeline = Pipeline(
        modules,
        schedule=schedule,
        microbatches=MICROBATCHES,
        group=block.mesh["pipeline"].get_group(),
        loss=lambda output, targets: output.sum(),
        boundary=torch.empty(1, 2, 1, device="meta"),
        logits=torch.empty(1, 2, 1, device="meta"),
    )
    meter = BubbleMeter(block, schedule=schedule, virtual_stages=virtual_stages, microbatches=MICROBATCHES)
    ids = torch.zeros(MICROBATCHES, 2, dtype=torch.int64)
    results = []
    for repeat in range(1 + repeats):  # the first one opens connections
        for i, module in modules.items():
            module.seconds = (2 if i == slow_stage else 1) * (seconds if repeat else 0.0)
        pipeline.step(
            ids if pipeline.is_first else None, ids if pipeline.is_last else None, position_ids=torch.zeros_like(ids)
        )
        results.append(meter.measure(pipeline))
    return None if place.pipeline else [result.bubble for result in results[1:]]


def sleep_through_all(seconds, repeats):
    with connect(Layout(pipeline=RANKS)) as block:
        return {
            (schedule, slow): sleep_through(block, schedule, seconds, slow, repeats)
            for schedule in SCHEDULES
            for slow in (None, SLOW)
        }


def assert_measured_as_simulated(results, seconds, tolerance):
    for (schedule, slow), steps in results.items():
        sizes = {"pipeline": RANKS, "virtual_stages": SCHEDULES[schedule], "microbatches": MICROBATCHES}
        nominal = simulate(
            order(schedule, **sizes),
            lambda action, slow=slow: 0.0 if action.kind == "R" else (2 if action.stage == slow else 1) * seconds,
        )
        # other work on the machine only widens the gap: the best of the steps counts
        best = min(steps, key=lambda step: abs(step.measured - step.expected))
        words = f"{schedule}, slow stage {slow}: {best}"
        assert abs(best.measured - best.expected) < tolerance, words
        assert abs(best.measured - nominal.bubble) < tolerance, words
        assert best.ideal == ideal_bubble(schedule, **sizes)
        assert [step.slow_stage for step in steps] == [slow] * len(steps), words
        assert best.by_rank == pytest.approx([1 - busy / nominal.wall for busy in nominal.busy], abs=2 * tolerance)
        assert best.pipeline_seconds == pytest.approx(nominal.wall, rel=2 * tolerance)


def test_sleeping_stages_are_measured_as_simulated():
    results = run_ranks(sleep_through_all, RANKS, 0.05, 2, timeout=120)[0]
    assert_measured_as_simulated(results, 0.05, 0.025)


@pytest.mark.full
def test_sleeping_stages_at_200_milliseconds():
    results = run_ranks(sleep_through_all, RANKS, 0.2, 2, timeout=300)[0]
    assert_measured_as_simulated(results, 0.2, 0.01)
