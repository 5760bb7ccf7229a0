"""The live block: every group has the run's time-out, and every rank the coordinate of its layout."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from parity import Case

from cuboid.launch.failures import explain
from cuboid.parallel.layout import AXES, Layout
from cuboid.parallel.mesh import NotMet, connect
from cuboid.trainer.assemble import assemble, initial_weights
from cuboid.trainer.model import draw_blueprint
from cuboid.trainer.model_config import read_checked_config

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


def time_outs() -> dict[str, float]:
    """Of every group that the block and a tied model's ends make, in seconds."""
    with connect(BLOCK, timeout_seconds=30) as block:
        recipe = Case(2, 2, 2, tied=True).recipe()
        blueprint = draw_blueprint(read_checked_config(recipe.model))
        engine = assemble(recipe, block, blueprint, initial_weights(recipe, blueprint))
        groups = {axis: block.mesh[axis].get_group() for axis in AXES}
        groups |= {"world": dist.group.WORLD, "tied": engine.tied.group}
        dist.barrier()  # rank 0 holds the addresses: the others are still connecting their ends
        return {name: _time_out(group) for name, group in groups.items()}


def _time_out(group: dist.ProcessGroup) -> float:
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def test_every_group_has_the_runs_time_out() -> None:
    """torch gives the groups of `init_device_mesh` half an hour, whatever the world's time-out is."""
    for found in run_ranks(time_outs, 8):
        assert found == dict.fromkeys((*AXES, "world", "tied"), 30.0)


NEIGHBOURS = dict(zip((7, 1, 2), AXES, strict=True))
"""Of rank 3, along each axis."""


def wait_for_a_rank_that_sleeps() -> float:
    with connect(BLOCK, timeout_seconds=10) as block:
        dist.barrier()  # so that connecting takes nothing of the time-out
        began = time.monotonic()
        if axis := NEIGHBOURS.get(block.rank):
            with pytest.raises(RuntimeError):
                dist.all_reduce(torch.ones(1), group=block.mesh[axis].get_group())
        waited = time.monotonic() - began
        # the others would meet closed sockets sooner than their time-out
        time.sleep(max(0.0, 25 - waited))
        return waited


@pytest.mark.alone
@pytest.mark.full
def test_no_group_waits_longer_than_the_time_out() -> None:
    waited = run_ranks(wait_for_a_rank_that_sleeps, 8, timeout=90)
    for rank, axis in NEIGHBOURS.items():
        assert 9 < waited[rank] < 20, (axis, waited)


def meet_elsewhere(host: str) -> str:
    """Rank 1 looks for rank 0 where it is not."""
    if os.environ["RANK"] == "1":
        os.environ.update(MASTER_ADDR=host, MASTER_PORT="9")
    began = time.monotonic()
    with pytest.raises(NotMet) as missed, connect(Layout(data=2), timeout_seconds=3):
        pass
    assert time.monotonic() - began < 30
    kind, echo, words = explain(missed.value)
    assert (kind, echo) == ("error", False)
    return words


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("no.such.host.invalid", marks=pytest.mark.full)])
def test_ranks_that_do_not_find_one_another_say_so(host: str) -> None:
    first, second = run_ranks(meet_elsewhere, 2, host)
    assert first.startswith("NotMet: only 1 of 2 ranks came to ")
    assert second == f"NotMet: nobody answers at {host}:9, where rank 0 should be, for 3 s"
