"""Runs whose data ranks follow a cluster's nodes: which numbers fit, what is refused, a node that goes and comes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import standin
from runs import events, recipe_on, run

from cuboid.launch.placement import rank_bundle
from cuboid.trainer import loop
from cuboid.trainer.elastic import elastic_errors, resized, sizes
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.runlog import read_metrics

STEPS = 90


def elastic(mesh: str = "1x4x1", *, batch: int = 48, launch: dict[str, Any] | None = None, **parallel: Any) -> Recipe:
    changes = {"train": {"global_batch": batch, "steps": STEPS}, "launch": launch or {}}
    return recipe_on(mesh, changes=changes, **{"microbatches": 3, **parallel})


def test_fewer_data_ranks_accumulate_more_microbatches_of_the_same_size() -> None:
    found = sizes(elastic(launch={"min_data": 1, "max_data": 8}))
    assert [(size.parallel.data, size.parallel.microbatches) for size in found] == [
        (6, 2),
        (4, 3),
        (3, 4),
        (2, 6),
        (1, 12),
    ]
    assert {size.batch_plan.microbatch_size for size in found} == {4}
    for size in found:
        samples = [n for rank in range(size.layout.data) for n in size.batch_plan.samples(2, rank)]
        assert samples == list(range(48, 96)), "every step reads the samples that it would have read"
    assert sizes(elastic()) == [elastic()]


def test_numbers_that_do_not_come_out_are_left_out() -> None:
    assert resized(elastic(), 5) is None
    assert resized(elastic(shard=2), 3) is None, "shards in groups of two"
    assert resized(elastic("2x4x1", schedule="dualpipe_v", microbatches=6), 12) is None, (
        "too few microbatches for four stages"
    )
    assert resized(elastic("1x4x1", expert=4), 2) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_data": 5}, "launch.min_data=5 is more than parallel.data=4; use 1, 2, 3 or 4"),
        ({"max_data": 3}, "launch.max_data=3 is less than parallel.data=4; use 4, 6 or 12"),
        (
            {"max_data": 5},
            "launch.max_data=5 data ranks cannot share 48 sequences in microbatches of 4 evenly under this schedule "
            "and sharding; use 4, 6 or 12",
        ),
        (
            {"min_data": 2, "launcher": "local"},
            "launch.min_data=2 needs nodes that come and go, and launcher local looks for none; "
            "use launch.launcher=ray, or null",
        ),
    ],
)
def test_bounds_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    assert [str(error) for error in elastic_errors(elastic(launch=changes))] == [words]


def test_ranks_of_an_elastic_run_share_no_cpu() -> None:
    nodes = [{"CPU": 1.0}, {"CPU": 1.0}]
    assert rank_bundle(nodes, 4, tensor=1, gpu=False) == {"CPU": 0.5}
    assert rank_bundle(nodes, 4, tensor=1, gpu=False, share_cpus=False) is None
    assert rank_bundle(nodes, 2, tensor=1, gpu=False, share_cpus=False) == {"CPU": 1.0}


def slow_training(recipe: Recipe, folder: Path) -> None:
    """The real loop, with time between steps for nodes to go and come."""
    step = loop.train_step
    loop.train_step = lambda run: (time.sleep(0.3), step(run))[1]
    loop.train(recipe, folder)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without CPUs, where the command runs, and two nodes of one CPU."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20})
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.mark.full
@pytest.mark.alone
@pytest.mark.timeout(420)
def test_a_lost_node_costs_data_ranks_until_a_larger_one_is_there(cluster: Any, tmp_path: Path) -> None:
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20) for _ in range(2)]
    words = [sys.executable, __file__, cluster.address, str(tmp_path / "run")]
    with standin.command(words, tmp_path / "run") as driver:
        standin.wait_until(lambda: len(read_metrics(tmp_path / "run")) >= 5, driver, seconds=150)
        cluster.remove_node(nodes[1], allow_graceful=False)
        standin.wait_until(lambda: len(events(tmp_path / "run", "start")) == 2, driver, seconds=120)
        cluster.add_node(num_cpus=3, object_store_memory=80 * 2**20)
        out, err = driver.communicate(timeout=240)
    assert (driver.returncode, err) == (0, "")
    assert [event["data"] for event in events(tmp_path / "run", "seated")] == [2, 1, 4]
    assert "1 data ranks find room (2 asked for); the cluster has 1 CPUs" in out
    (failure,) = events(tmp_path / "run", "failure")
    starts = [event["step"] for event in events(tmp_path / "run", "start")]
    assert failure["step"] - 1 - starts[1] < recipe().checkpoint.every, (
        "no more is computed again than since the checkpoint"
    )
    grown = [event["step"] for event in events(tmp_path / "run", "stop") if event["reason"] == "resize"]
    assert grown == [starts[2]], "growing loses no step"
    expected = run(recipe(), tmp_path / "undisturbed")
    for found, wanted in zip(read_metrics(tmp_path / "run"), expected, strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def recipe(address: str | None = None) -> Recipe:
    launch = {"address": address, "min_data": 1, "max_data": 4, "timeout_seconds": 20}
    found = elastic("1x2x1", batch=8, launch=launch, microbatches=2)
    return found.model_copy(
        update={
            "checkpoint": found.checkpoint.model_copy(update={"every": 4}),
            # at more, rounding alone moves the loss by 1e-4 within these steps
            "optimizer": found.optimizer.model_copy(update={"learning_rate": 1e-3}),
        }
    )


if __name__ == "__main__":
    from cuboid.launch import ray_cluster

    address, folder = sys.argv[1:]
    Path(folder).mkdir()
    sys.exit(ray_cluster.launch(recipe(address), Path(folder), train=slow_training))
