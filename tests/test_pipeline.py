"""Pipeline steps against one process: loss, gradients, static shapes, one reduction a step, nothing held after it."""

import gc

import pytest
import torch
from harness import run_ranks
from torch import nn
from torch.nn import functional as F

from cuboid.parallel.data import apply_data_parallel
from cuboid.parallel.layout import Layout
from cuboid.parallel.mesh import connect
from cuboid.parallel.pipeline import Pipeline
from cuboid.parallel.schedules import SCHEDULES, stage_indices

VOCABULARY, WIDTH, TOKENS, ROWS = 13, 8, 5, 2


class ToyStage(nn.Module):
    """Stage ``number`` of ``num_stages``: the same parameters wherever it is built."""

    def __init__(self, number, num_stages):
        super().__init__()
        torch.manual_seed(number)
        self.embed = nn.Embedding(VOCABULARY, WIDTH) if number == 0 else nn.Identity()
        self.layers = nn.ModuleDict({str(number): nn.Linear(WIDTH, WIDTH)})
        self.head = nn.Linear(WIDTH, VOCABULARY) if number == num_stages - 1 else nn.Identity()
        self.calls = 0

    def forward(self, x, *, position_ids):
        self.calls += 1
        hidden = self.embed(x)
        for layer in self.layers.values():
            hidden = torch.tanh(layer(hidden)) * (1 + position_ids[..., None] / 10)
        return self.head(hidden)


def batch(microbatches, data=0):
    generator = torch.Generator().manual_seed(7 + data)
    shape = (microbatches * ROWS, TOKENS)
    ids, targets, positions = (torch.randint(VOCABULARY, shape, generator=generator) for _ in range(3))
    targets[torch.rand(shape, generator=generator) < 0.4] = -100
    return ids, targets, positions


def summed_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def reference(num_stages, microbatches, data_ranks=1):
    stages = [ToyStage(number, num_stages) for number in range(num_stages)]
    total = 0.0
    for data in range(data_ranks):
        hidden, targets, positions = batch(microbatches, data)
        for stage in stages:
            hidden = stage(hidden, position_ids=positions)
        loss = summed_loss(hidden, targets)
        loss.backward()
        total += loss.item()
    return total, {f"{i}.{name}": p.grad for i, stage in enumerate(stages) for name, p in stage.named_parameters()}


def build(block, schedule, virtual_stages, microbatches, wrap=None):
    ranks = block.layout.pipeline
    indices = stage_indices(schedule, pipeline=ranks, rank=block.coordinate.pipeline, virtual_stages=virtual_stages)
    modules = {i: ToyStage(i, ranks * virtual_stages) for i in indices}
    for module in modules.values():
        if wrap is not None:
            apply_data_parallel(module, block.mesh["data"], **wrap)
    pipeline = Pipeline(
        modules,
        schedule=schedule,
        microbatches=microbatches,
        group=block.mesh["pipeline"].get_group(),
        loss=summed_loss,
        boundary=torch.empty(ROWS, TOKENS, WIDTH, device="meta"),
        logits=torch.empty(ROWS, TOKENS, VOCABULARY, device="meta"),
        whereabouts=block.whereabouts,
    )
    return pipeline, modules


def step(pipeline, microbatches, data=0):
    ids, targets, positions = batch(microbatches, data)
    loss = pipeline.step(
        ids if pipeline.is_first else None, {"targets": targets} if pipeline.is_last else None, position_ids=positions
    )
    return None if loss is None else loss.item()


def whole_gradients(modules):
    def whole(tensor):
        return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).numpy().copy()

    return {f"{i}.{name}": whole(p.grad) for i, m in modules.items() for name, p in m.named_parameters()}


def assert_gradients_equal(found, expected):
    """Each within 1e-5 of its largest element: a fixed tolerance would let small gradients be anything."""
    assert found.keys() <= expected.keys()
    for name, gradient in found.items():
        largest = expected[name].abs().max()
        assert largest > 0, f"{name} has no gradient"
        assert (torch.from_numpy(gradient) - expected[name]).abs().max() <= 1e-5 * largest, name


def run_cases(cases, ranks):
    """Each case: loss and gradients of two steps, calls of each stage's forward, and the newest step's times."""
    results = []
    with connect(Layout(pipeline=ranks)) as block:
        for schedule, virtual_stages, microbatches in cases:
            pipeline, modules = build(block, schedule, virtual_stages, microbatches)
            losses = []
            for _ in range(2):
                for module in modules.values():
                    module.zero_grad()
                losses.append(step(pipeline, microbatches))
            gc.collect()
            held = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.grad_fn is not None]
            calls = [module.calls for module in modules.values()]
            results.append((losses, whole_gradients(modules), calls, pipeline.times, len(held)))
    return results


CASES = {
    1: [("gpipe", 1, 3), ("1f1b", 1, 3)],  # the looped ones are refused on one rank
    2: [("gpipe", 1, 1), ("gpipe", 1, 3), ("1f1b", 1, 2), ("1f1b", 1, 5), ("interleaved_1f1b", 3, 4), ("zbv", 2, 1)],
    4: [
        ("gpipe", 1, 2),
        ("1f1b", 1, 4),
        ("1f1b", 1, 7),
        ("interleaved_1f1b", 2, 3),
        ("interleaved_1f1b", 2, 10),
        ("looped_bfs", 2, 5),
        ("interleaved_zero_bubble", 2, 10),
        ("zbv", 2, 9),
        ("dualpipe_v", 2, 9),
    ],
}


@pytest.mark.parametrize("ranks", CASES)
def test_every_schedule_equals_one_process(ranks):
    by_rank = run_ranks(run_cases, ranks, CASES[ranks], ranks)
    for case, (schedule, virtual_stages, microbatches) in enumerate(CASES[ranks]):
        assert SCHEDULES[schedule].check(pipeline=ranks, virtual_stages=virtual_stages, microbatches=microbatches) == []
        expected_loss, expected = reference(ranks * virtual_stages, microbatches)
        gradients, with_loss = {}, 0
        for losses, own, calls, times, held in (results[case] for results in by_rank):
            gradients |= own
            assert calls == [2 * microbatches] * virtual_stages, "a microbatch ran more than once a step"
            assert held == 0, "activations outlive the step"
            kinds = [time.kind for time in times]
            full = kinds.count("B")
            assert (
                kinds.count("F") == full + kinds.count("I") == full + kinds.count("W") == microbatches * virtual_stages
            )
            assert SCHEDULES[schedule].splits_backward is ("W" in kinds)
            assert kinds.count("R") == virtual_stages
            assert all(time.stop_seconds >= time.start_seconds for time in times)
            if losses != [None, None]:
                with_loss += 1
                assert losses == pytest.approx([expected_loss] * 2, rel=1e-6)
        assert with_loss == 1, "the last stage's rank alone has the loss"
        assert gradients.keys() == expected.keys()
        assert_gradients_equal(gradients, expected)


def run_sharded(schedule, virtual_stages, microbatches, wrap):
    with connect(Layout(pipeline=2, data=2)) as block:
        pipeline, modules = build(block, schedule, virtual_stages, microbatches, wrap)
        reductions, losses = [], []
        for _ in range(2):
            for module in modules.values():
                module.zero_grad()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                losses.append(step(pipeline, microbatches, block.coordinate.data))
            calls = {event.key: event.count for event in profile.key_averages()}
            reductions.append({key: n for key, n in calls.items() if key.startswith("c10d::") and "reduce" in key})
        return losses, whole_gradients(modules), reductions, pipeline.times


@pytest.mark.parametrize("shard", [True, False])
@pytest.mark.parametrize(("schedule", "virtual_stages"), [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2)])
def test_gradients_are_reduced_once_a_step_over_data(schedule, virtual_stages, shard):
    wrap = {"shard": shard, "reshard_after_forward": False}
    by_rank = run_ranks(run_sharded, 4, schedule, virtual_stages, 4, wrap)
    expected_loss, expected = reference(2 * virtual_stages, 4, data_ranks=2)
    ends = [losses for losses, *_ in by_rank if losses != [None, None]]
    assert len(ends) == 2, "the last stage's rank of each pipeline"
    assert [sum(losses) for losses in zip(*ends, strict=True)] == pytest.approx([expected_loss] * 2, rel=1e-6)
    call = "c10d::_reduce_scatter_base_" if shard else "c10d::allreduce_"
    for _, gradients, reductions, times in by_rank:
        # a stage's layer is one group of parameters, its embedding and head together another
        groups = len({(name.split(".")[0], ".layers." in name) for name in gradients})
        assert reductions == [{call: groups}] * 2
        assert sum(time.kind == "R" for time in times) == virtual_stages
        assert_gradients_equal(gradients, expected)
    assert {name for _, gradients, *_ in by_rank for name in gradients} == expected.keys()
