"""Promise 1: every mesh computes the numbers of one process. A pairwise cover; every cell is marked full."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from itertools import combinations, product

import pytest
import torch
from harness import RanksFailed, run_ranks
from parity import Case, Difference, compare, reference
from torch.distributed.tensor import Replicate

from cuboid.parallel import gradients, tensor
from cuboid.parallel.collectives import enter
from cuboid.trainer import engine

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b")


def cells() -> list[Case]:
    """Every combination whose options mean something on its mesh."""
    result = {}
    for pipeline, data, size in product((1, 2), repeat=3):
        for schedule, family, tied, shard, sequence, recompute in product(
            SCHEDULES, ("llama", "qwen3"), (False, True), (True, False), (True, False), ("none", "full")
        ):
            case = Case(
                pipeline,
                data,
                size,
                schedule if pipeline > 1 else "1f1b",
                family,
                tied,
                shard or data == 1,
                sequence or size == 1,
                recompute,
            )
            result[case] = None
    return list(result)


LARGER = [
    Case(4, 1, 1, "gpipe"),  # six layers on four stages: uneven
    Case(4, 2, 1, "1f1b", "qwen3", tied=True, shard=False, microbatches=8),
    Case(1, 4, 1, family="qwen3"),
    Case(1, 1, 4, family="qwen3", tied=True),
    Case(1, 2, 4, shard=False),
    Case(2, 1, 4, "interleaved_1f1b", tied=True),
    Case(3, 1, 2, "interleaved_1f1b", tied=True, microbatches=8, activation_checkpointing="full"),
    Case(2, 2, 2, "1f1b", microbatches=2),
    Case(2, 1, 1, "gpipe", microbatches=1),
    Case(2, 1, 2, family="qwen2", tied=True),
    Case(2, 1, 2, family="mistral"),  # attends to a sliding window only
]


def pairwise(cases: Iterable[Case]) -> list[Case]:
    """Few cases that hold every pair of options which any case holds; greedy, so not the fewest."""

    def pairs(case: Case) -> set[tuple[object, ...]]:
        values = [(field.name, getattr(case, field.name)) for field in fields(case)]
        return set(combinations(values, 2))

    left, chosen = set().union(*(pairs(case) for case in cases)), []
    while left:
        best = max(cases, key=lambda case: len(pairs(case) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


COVER = pairwise(cells())


def difference(case: Case) -> list[Difference]:
    return run_ranks(compare, case.world_size, case, reference(case.family, case.tied), timeout=120)


def assert_exact(case: Case) -> None:
    ranks = difference(case)
    expected = reference(case.family, case.tied)
    assert set().union(*(rank.seen for rank in ranks)) == set(expected.gradients), "every parameter stands somewhere"
    for rank in ranks:
        assert not rank.missing, f"no gradient: {rank.missing}"
        assert rank.loss <= 1e-6, rank
        assert rank.grad_norm <= 1e-5, rank
        assert rank.gradient <= 1e-5, rank
        assert rank.update <= 1e-3, rank


@pytest.mark.parametrize("case", COVER, ids=str)
def test_mesh_equals_one_process(case: Case) -> None:
    assert_exact(case)


@pytest.mark.parametrize("case", LARGER, ids=str)
def test_longer_axes_equal_one_process(case: Case) -> None:
    assert_exact(case)


@pytest.mark.full
@pytest.mark.parametrize("case", [case for case in cells() if case not in COVER], ids=str)
def test_every_cell_equals_one_process(case: Case) -> None:
    assert_exact(case)


def _norm_left_plain() -> None:
    tensor._heads.__globals__["Partial"] = Replicate


def _block_not_entered() -> None:
    tensor.enter = lambda x, group, *, sequence: enter(x.detach(), group, sequence=sequence).requires_grad_()


def _tied_copies_not_summed() -> None:
    gradients.TiedWeights.sum_gradients = lambda self: None


def _open_sums_forgotten() -> None:
    engine.close_sums = lambda parameters: None


def _mean_of_means() -> None:
    def by_rank(self: engine.NativeEngine, labels: torch.Tensor) -> int:
        return int((labels != engine.IGNORE).sum()) * self.block.layout.data

    engine.NativeEngine._count_tokens = by_rank


FAULTS: list[tuple[Callable[[], None], Case]] = [
    (_norm_left_plain, Case(1, 2, 2, family="qwen3")),
    (_block_not_entered, Case(1, 1, 2)),
    (_tied_copies_not_summed, Case(2, 1, 1, tied=True)),
    (_open_sums_forgotten, Case(2, 1, 2)),
    (_mean_of_means, Case(1, 2, 1)),
]


@pytest.mark.parametrize(("plant", "case"), FAULTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_planted_fault_is_found(plant: Callable[[], None], case: Case) -> None:
    """The comparison can fail: each of the field's silent mistakes is seen by it."""

    def faulty(case: Case, expected: object) -> Difference:
        plant()  # in a forked rank: this process stays as it is
        return compare(case, expected)

    try:
        ranks = run_ranks(faulty, case.world_size, case, reference(case.family, case.tied), timeout=120)
    except RanksFailed:
        return  # loud is as good
    assert max(max(rank.gradient, rank.grad_norm, float(bool(rank.missing))) for rank in ranks) > 1e-3


def test_pairs_are_covered() -> None:
    assert len(COVER) < len(cells()) / 5
    assert set(COVER) <= set(cells())
