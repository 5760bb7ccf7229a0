"""Ranks over the nodes of a real Ray cluster of two, and a run that finds no room there."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import standin
import yaml
from runs import recipe_on

from cuboid.launch.submit_address import settle_access
from cuboid.trainer.runlog import read_events, read_metrics

pytestmark = [pytest.mark.timeout(300), pytest.mark.alone, pytest.mark.full]

IMPATIENT = "from cuboid.launch import cli, ray_room; ray_room._ROOM_SECONDS = 2.0; cli.main()"
"""The command, with less time than 45 seconds for nodes to join."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, str]]:
    """Addresses of its head and of its job API; two nodes with two CPUs each."""
    from ray.cluster_utils import Cluster

    each = {"num_cpus": 2, "object_store_memory": 80_000_000}
    made = Cluster(initialize_head=True, head_node_args={**each, "include_dashboard": True})
    try:
        made.add_node(**each)
        yield made.address, made.head_node.webui_url
    finally:
        made.shutdown()


def write_recipe(folder: Path, mesh: str, **launch: str) -> list[str]:
    """A run's command."""
    recipe = recipe_on(mesh, changes={"train": {"steps": 100_000}, "checkpoint": {"every": 0}, "launch": launch})
    recipe = recipe.model_copy(update={"runs": str(folder)})
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return [sys.executable, "-c", IMPATIENT, "train", str(folder / "run.yaml")]


def test_tensor_ranks_share_a_node_and_stages_do_not(cluster: tuple[str, str], tmp_path: Path) -> None:
    command = write_recipe(tmp_path, "2x1x2", address=cluster[0])
    folder = tmp_path / "resume"
    with standin.command(command, folder) as driver:
        standin.wait_until(lambda: folder.exists() and read_metrics(folder), driver, seconds=200)
        ranks = standin.ranks_of(folder)
        nodes = {
            rank: psutil.Process(pid).ppid() for rank, pid in ranks.items()
        }  # a worker's parent is its node's raylet
        assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
        os.kill(driver.pid, signal.SIGINT)
        driver.communicate(timeout=60)
        assert driver.returncode == 130


def test_a_run_without_room_says_what_it_needs_and_what_there_is(cluster: tuple[str, str], tmp_path: Path) -> None:
    command = write_recipe(tmp_path, "2x1x2", device="cuda", address=cluster[0])
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr == "cuboid: 4 ranks need 4 GPUs; the Ray cluster has 4 CPUs on 2 nodes\n"
    assert not [event for event in read_events(tmp_path / "resume") if event["kind"] == "workers"]


def test_a_cluster_without_a_token_is_seen_as_one(cluster: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")
    assert settle_access(f"http://{cluster[1]}", insecure=False)
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
