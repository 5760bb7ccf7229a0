"""Slow ranks: who is named, and when. A real one is made by the drills of test_drill.py."""

from itertools import chain, repeat

import pytest

from cuboid.launch.progress import told
from cuboid.parallel.layout import Layout
from cuboid.parallel.pipeline import ActionTime
from cuboid.trainer.stragglers import STEPS, Stragglers, microbatch_seconds

CUBE = Layout(pipeline=2, data=2, tensor=2)


def named(layout: Layout, steps, *, meets: bool) -> dict[int, dict[int, float]]:
    """By step, from 1, who is named there."""
    stragglers = Stragglers(layout, meets=meets)
    found = {number: stragglers.judge(seconds) for number, seconds in enumerate(steps, 1)}
    return {number: ranks for number, ranks in found.items() if ranks}


@pytest.mark.parametrize("slow", range(8))
def test_a_rank_three_times_slower_is_named_once_within_ten_steps(slow):
    """On the processor's clock, by which tensor ranks differ; the second stage takes longer by itself."""
    usual = [1.0] * 4 + [1.7] * 4
    slowed = [seconds * (3 if rank == slow else 1) for rank, seconds in enumerate(usual)]
    found = named(CUBE, chain(repeat(usual, 20), repeat(slowed, 20)), meets=False)
    assert found == {20 + STEPS: {slow: pytest.approx(3.0)}}
    assert STEPS < 10


def test_on_the_wall_clock_tensor_ranks_are_slow_together():
    found = named(CUBE, repeat([1.0, 1.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0], 9), meets=True)
    assert found == {STEPS: {2: 3.0, 3: 3.0}}


def test_a_stage_without_peers_is_compared_with_the_others():
    assert named(Layout(pipeline=3), repeat([1.2, 3.0, 0.8], 9), meets=True) == {STEPS: {1: 3.0}}


def test_an_ordinary_run_names_nobody():
    """One step is slow for many reasons, stages are a little unequal, and a rank alone has no peers."""
    uneven = [1.0, 1.4, 0.8, 1.9, 1.7, 1.1, 1.3, 1.6]
    hiccup = [9.0, *uneven[1:]]
    assert named(CUBE, chain(*repeat([uneven, hiccup, hiccup, uneven], 9)), meets=False) == {}
    assert named(Layout(), repeat([5.0], 9), meets=True) == {}
    assert named(Layout(pipeline=2), repeat([0.0, 0.0], 9), meets=True) == {}


def test_a_microbatch_is_a_forward_and_a_backward_whatever_one_of_them_took():
    times = [ActionTime("F", 0, m, 10.0, 11.0 if m else 60.0, 0.5) for m in range(3)]
    times += [ActionTime("B", 0, m, 20.0, 22.0, 0.75) for m in range(3)]
    times += [ActionTime("R", 0, -1, 30.0, 90.0, 9.0)]
    assert microbatch_seconds(times) == (3.0, 1.25)
    assert microbatch_seconds([]) == (0, 0)


def test_it_is_told_with_rank_and_stage():
    event = {"kind": "slow_rank", "rank": 5, "step": 8, "stages": [2], "factor": 3.07, "clock": "processor"}
    assert told(event) == "rank 5 (stage 2) takes 3.1 times as long as the others"
