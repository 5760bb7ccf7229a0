"""The plain arithmetic under everything: which rank stands where, which samples it reads, which layers it computes."""

from __future__ import annotations

import random
from itertools import combinations, pairwise, product

import pytest

from cuboid.parallel.errors import FieldError
from cuboid.parallel.layout import BatchPlan, Coordinate, Layout, divisors
from cuboid.parallel.stages import Costs, split_layers

LAYOUTS = [Layout(pipeline=p, data=d, tensor=t) for p, d, t in product((1, 2, 3, 5), (1, 2, 3), (1, 2, 4))]


def test_ranks_and_coordinates_are_two_names_of_the_same() -> None:
    for layout in LAYOUTS:
        places = [layout.coordinate(rank) for rank in range(layout.world_size)]
        axes = (range(layout.pipeline), range(layout.data), range(layout.tensor))
        assert places == [Coordinate(*place) for place in product(*axes)], "pipeline outermost, tensor innermost"
        assert [layout.rank(place) for place in places] == list(range(layout.world_size))


def test_neighbouring_ranks_are_tensor_ranks() -> None:
    layout = Layout(pipeline=2, data=3, tensor=4)
    assert layout.coordinate(0) == (0, 0, 0)
    assert layout.coordinate(1) == (0, 0, 1)
    assert layout.coordinate(4) == (0, 1, 0)
    assert layout.coordinate(12) == (1, 0, 0)
    assert layout.coordinate(23) == (1, 2, 3)
    assert layout.rank(Coordinate(pipeline=1, data=2, tensor=0)) == 20


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_outside_the_block_has_no_place(rank: int) -> None:
    with pytest.raises(AssertionError, match="outside a world of 8"):
        Layout(pipeline=2, data=2, tensor=2).coordinate(rank)


@pytest.mark.parametrize("axis", ["pipeline", "data", "tensor", "expert"])
def test_an_axis_has_at_least_one_rank(axis: str) -> None:
    with pytest.raises(FieldError, match=rf"parallel.{axis}=0 is not a number of ranks; use 1 or more"):
        Layout(**{axis: 0})


def test_experts_are_folded_into_data_and_tensor() -> None:
    assert Layout(data=2, tensor=3, expert=6).world_size == 6
    with pytest.raises(FieldError, match=r"parallel.expert=4 does not divide data x tensor = 6; use 1, 2, 3 or 6"):
        Layout(data=2, tensor=3, expert=4)


def test_every_sample_is_read_once_by_one_data_rank_on_every_mesh() -> None:
    for data, microbatches, size in product((1, 2, 3, 4), (1, 2, 5), (1, 3)):
        total = data * microbatches * size
        plan = BatchPlan(global_batch=total, data=data, microbatches=microbatches)
        assert plan.microbatch_size == size
        read = [number for step in (1, 2, 3) for rank in range(data) for number in plan.samples(step, rank)]
        # in order, so that the samples of a step are the same ones whatever the number of data ranks
        assert read == list(range(3 * total))
        assert {len(plan.samples(step, rank)) for step in (1, 7) for rank in range(data)} == {microbatches * size}


def test_a_batch_that_does_not_divide_is_refused_with_its_neighbours() -> None:
    with pytest.raises(FieldError, match=r"train.global_batch=10 .* = 2 x 4 = 8; use 8 or 16"):
        BatchPlan(global_batch=10, data=2, microbatches=4)
    with pytest.raises(FieldError, match=r"train.global_batch=5 .* = 8; use 8$"):
        BatchPlan(global_batch=5, data=2, microbatches=4)


def test_divisors() -> None:
    assert divisors(1) == [1]
    assert divisors(7) == [1, 7]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


def test_stages_hold_all_layers_in_order_as_evenly_as_they_divide() -> None:
    for layers, stages in product(range(1, 20), range(1, 20)):
        if stages > layers:
            continue
        parts = split_layers(Costs([1.0] * layers), stages)
        assert [layer for part in parts for layer in part] == list(range(layers))
        sizes = [len(part) for part in parts]
        assert len(sizes) == stages
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True), "where two splits cost the same, more layers stand in front"


def test_more_stages_than_layers_are_impossible() -> None:
    with pytest.raises(AssertionError, match="2 layers cannot fill 3 stages"):
        split_layers(Costs([1.0] * 2), 3)


def all_splits(layers: int, stages: int) -> list[list[range]]:
    inner = combinations(range(1, layers), stages - 1)
    return [[range(*pair) for pair in pairwise((0, *bounds, layers))] for bounds in inner]


def test_the_costliest_stage_costs_as_little_as_any_split_allows_and_the_others_are_even() -> None:
    dice = random.Random(0)
    for _ in range(60):
        layers, stages = dice.randint(1, 9), dice.randint(1, 5)
        if stages > layers:
            continue
        costs = Costs([dice.choice((1.0, 2.0, 5.0)) for _ in range(layers)], dice.uniform(0, 4), dice.uniform(0, 9))
        found = split_layers(costs, stages)
        assert [layer for part in found for layer in part] == list(range(layers)), "every layer once, in order"
        assert all(found)
        possible = [costs.of(split) for split in all_splits(layers, stages)]
        least = min(map(max, possible))
        assert max(costs.of(found)) == pytest.approx(least)
        even = min(sum(cost * cost for cost in split) for split in possible if max(split) <= least * (1 + 1e-9))
        assert sum(cost * cost for cost in costs.of(found)) == pytest.approx(even)


def test_a_costly_head_leaves_the_last_stage_few_layers() -> None:
    split = split_layers(Costs([1.0] * 30, head=8.0), 4)
    assert [len(part) for part in split] == [10, 10, 9, 1]
