"""The live block: every group has the run's time-out, and every rank the coordinate of its layout."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from harness import run_ranks

from cuboid.parallel.layout import AXES, Layout
from cuboid.parallel.mesh import connect

BLOCK = Layout(pipeline=2, data=2, tensor=2)


def places() -> tuple[tuple[int, ...], list[int]]:
    with connect(BLOCK, timeout_seconds=30) as block:
        mine = tuple(block.mesh[axis].get_local_rank() for axis in AXES)
        sums = []
        for axis in AXES:
            total = torch.tensor(dist.get_rank())
            dist.all_reduce(total, group=block.mesh[axis].get_group())
            sums.append(int(total))
        assert mine == tuple(block.coordinate)
        return mine, sums


def test_groups_are_the_lines_of_the_block() -> None:
    for rank, (place, sums) in enumerate(run_ranks(places, 8)):
        assert place == (rank >> 2, rank >> 1 & 1, rank & 1)
        assert sums == [2 * rank + step if not rank & step else 2 * rank - step for step in (4, 2, 1)]


def wait_for_a_rank_that_sleeps(axis: str) -> float:
    with connect(BLOCK, timeout_seconds=2) as block:
        if block.rank == 3:
            time.sleep(6)
            return 0.0
        began = time.monotonic()
        try:
            dist.all_reduce(torch.ones(1), group=block.mesh[axis].get_group())
        except RuntimeError:
            return time.monotonic() - began
        time.sleep(6)  # its neighbours would meet its closed sockets sooner than their time-out
        return 0.0


def test_no_group_waits_longer_than_the_time_out() -> None:
    """torch gives the groups of `init_device_mesh` half an hour, whatever the world's time-out is."""
    for axis, neighbour in zip(AXES, (7, 1, 2), strict=True):
        waited = run_ranks(wait_for_a_rank_that_sleeps, 8, axis, timeout=60)
        assert 1.5 < waited[neighbour] < 5, (axis, waited)
