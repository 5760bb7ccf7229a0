"""Steps of changing length and incomplete batches against one process: loss, norm, every gradient, and the clock."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from cases import Case
from harness import run_ranks
from parity import assembled, backward, compare_gradients, make_batch, one_process, own_share, relative

from cuboid.parallel.pipeline import READY_KEPT
from cuboid.trainer.check_mesh import virtual_stages
from cuboid.trainer.data import Batch
from cuboid.trainer.metrics import BubbleMeter

SHAPES = [(16, 12), (16, 20), (13, 12), (5, 8), (16, 16), (16, 24), (16, 20)]
"""Sequences and tokens of each step; a full batch has 16, and 5 leave the second of two data ranks with none."""


@dataclass(frozen=True)
class Expected:
    """What one process computes of a batch with the first weights."""

    batch: Batch
    loss: float
    norm: float
    gradients: Mapping[str, torch.Tensor]


def expect(case: Case) -> tuple[dict[str, torch.Tensor], list[Expected]]:
    """The first weights, and a step for each of `SHAPES`; in float64, since few tokens round off more, and the rounding
    of both sides would add up to what is allowed."""
    model, steps = one_process(case).double(), []
    for seed, shape in enumerate(SHAPES):
        batch = make_batch(seed, *shape)
        loss, gradients = backward(model, batch)
        steps.append(Expected(batch, loss, torch.nn.utils.get_total_norm(gradients.values()).item(), gradients))
        model.zero_grad()
    return {name: parameter.detach().float() for name, parameter in model.named_parameters()}, steps


def step_by_step(case: Case, weights: Mapping[str, torch.Tensor], steps: list[Expected]) -> list[tuple[float, ...]]:
    """Relative errors of loss, gradient norm, worst gradient and evaluated loss of each step; weights stay the first.

    Batches of other shapes are evaluated before the step, and between it and the measurement of its bubble.
    """
    recipe, errors = case.recipe(), []
    with assembled(case, weights) as engine:
        pipeline = engine.pipeline
        meter = BubbleMeter(
            engine.block,
            schedule=case.schedule,
            virtual_stages=virtual_stages(recipe),
            microbatches=case.microbatches,
        )
        for step, other in zip(steps, [*steps[1:], steps[0]], strict=True):
            batches = [own_share(each.batch, engine.block) for each in (other, step)]
            evaluated, tokens, _ = engine.evaluate(batches[:1])
            began = time.monotonic()
            result = engine.backward(batches[1])
            ended, times = time.monotonic(), pipeline.times
            assert began <= times[0].start_seconds
            assert times[-1].stop_seconds <= ended
            assert engine.evaluate(batches[:1]) == (evaluated, tokens, None), "a step leaves no trace in evaluation"
            assert pipeline.times == times, "evaluation leaves no trace in the step's times"
            measured = meter.measure(pipeline)
            if measured is not None and engine.block.layout.pipeline > 1:
                assert measured.bubble.pipeline_seconds <= ended - began
                assert 0 < measured.bubble.measured < 1
            *gradient, missing = compare_gradients(engine, step.gradients)
            assert not missing
            assert result.tokens == int((step.batch.labels >= 0).sum())
            assert tokens == int((other.batch.labels >= 0).sum())
            found = (relative(result.loss, step.loss), relative(result.grad_norm, step.norm), gradient[0])
            errors.append((*found, relative(evaluated, other.loss)))
            for _, parameter in engine.parameters:
                parameter.grad = None
            assert len(pipeline._ready) <= READY_KEPT < len({tokens for _, tokens in SHAPES})
        if case.tensor > 1 and case.sequence:
            with pytest.raises(AssertionError, match="13 tokens cannot be divided among 2 tensor ranks"):
                engine.backward(own_share(make_batch(0, tokens=13), engine.block))
        with pytest.raises(AssertionError, match="samples, where a step takes"):
            engine.backward(make_batch(0, 17))
    return errors


CASES = [
    Case(2, 1, 1, "1f1b"),
    Case(2, 2, 2, "1f1b", tied=True),
    Case(2, 2, 1, "zbv"),
]
EVERY_SCHEDULE = [
    Case(1, 2, 2, sequence=False, shard=False),
    Case(2, 2, 1, "gpipe", activation_checkpointing="full"),
    Case(2, 2, 2, "interleaved_1f1b"),
    Case(2, 1, 2, "looped_bfs", tied=True),
    Case(2, 2, 1, "interleaved_zero_bubble", shard=False),
    Case(2, 1, 2, "dualpipe_v"),
    Case(4, 1, 1, "1f1b"),
]


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.full) for case in EVERY_SCHEDULE)], ids=str
)
def test_every_shape_equals_one_process(case: Case) -> None:
    for errors in run_ranks(step_by_step, case.world_size, case, *expect(case), timeout=120):
        for loss, norm, gradient, evaluated in errors:
            assert loss <= 1e-6
            assert norm <= 1e-5
            assert gradient <= 1e-5
            assert evaluated <= 1e-6
