"""Ray Train's workers as ranks: seats, restarts, causes, and nothing left behind. Each real cluster costs 10 s."""

import os
import signal
from collections.abc import Iterable
from contextlib import suppress

import psutil
import pytest
import standin

from cuboid.launch import failures
from cuboid.launch.placement import rank_bundle, rank_order, told_resources
from cuboid.launch.progress import start_phases
from cuboid.launch.ray_group import crash_words
from cuboid.parallel.errors import UserError
from cuboid.trainer.runlog import read_metrics

# alone, since the parts of a cluster that starts miss one another where another start has all cores
pytestmark = [pytest.mark.timeout(240), pytest.mark.alone]


def listening(processes: Iterable[psutil.Process]) -> set[str]:
    """Addresses on which Ray's own processes wait for others; the ranks' are gloo's."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if not process.name().startswith("ray::RayTrainWo"):
                connections = process.net_connections("inet")
                found |= {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}
    return found


def test_a_killed_rank_restarts_the_group_and_the_run_goes_to_its_end(tmp_path):
    standin.plan_mischief(tmp_path, does="slow", seconds=0.2)
    with standin.driven("ray", tmp_path, steps=20) as driver:
        processes = standin.wait_for_step(driver, tmp_path, 6, seconds=180)
        addresses = listening(processes)
        assert addresses
        assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        os.kill(standin.ranks_of(tmp_path)[1], signal.SIGKILL)
        standin.wait_until(lambda: len(standin.events(tmp_path, "start")) == 2, driver, seconds=120)
        processes |= standin.family(driver)
        out, err = driver.communicate(timeout=180)

        assert (driver.returncode, err) == (0, "")
        assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 21))
        (failure,) = standin.events(tmp_path, "failure")
        assert (failure["rank"], failure["restart"]) == (1, True)
        assert f"rank 1 was killed, most likely by SIGKILL, in step {failure['step']}; starting again" in out
        assert "going on after step 4" in out or "going on after step 8" in out
        assert out.splitlines()[-1].startswith("done: 20 steps")
        assert list(start_phases(tmp_path))[:4] == ["driver", "cluster", "workers", "imports"]
        assert not (tmp_path / ".ray").exists()
        standin.wait_until_gone(processes)


def test_a_users_mistake_is_told_once_and_last(tmp_path):
    standin.plan_mischief(tmp_path, does="user", rank=1, step=3)
    with standin.driven("ray", tmp_path, steps=20) as driver:
        _, err = driver.communicate(timeout=200)
    assert (driver.returncode, err) == (2, "cuboid: data.path=nowhere does not exist; use a file\n")
    assert len(standin.events(tmp_path, "workers")) == 1


@pytest.mark.full
def test_three_failures_without_a_newer_checkpoint_end_the_run(tmp_path):
    standin.plan_mischief(tmp_path, does="error", rank=1, step=6, times=9)
    with standin.driven("ray", tmp_path, steps=20) as driver:
        _, err = driver.communicate(timeout=220)
    words = (
        "cuboid: given up after 3 failures without a newer checkpoint: rank 1 failed in step 6: ValueError: the fifth"
    )
    assert driver.returncode == 1
    assert err.startswith(words)
    assert len(standin.events(tmp_path, "workers")) == 3


@pytest.mark.full
def test_ctrl_c_ends_the_run_after_a_checkpoint(tmp_path):
    with standin.driven("ray", tmp_path, steps=5000) as driver:
        processes = standin.wait_for_step(driver, tmp_path, 3, seconds=180)
        os.killpg(driver.pid, signal.SIGINT)
        driver.communicate(timeout=60)
        assert driver.returncode == 130
        assert failures.newest_step(tmp_path) == read_metrics(tmp_path)[-1]["step"]
        standin.wait_until_gone(processes)


@pytest.mark.full
def test_nothing_outlives_a_killed_driver(tmp_path):
    with standin.driven("ray", tmp_path, steps=5000) as driver:
        processes = standin.wait_for_step(driver, tmp_path, 3, seconds=180)
        driver.kill()
        driver.communicate(timeout=10)
        standin.wait_until_gone(processes)


@pytest.mark.parametrize(
    ("nodes", "tensor", "ranks"),
    [
        ("aabb", 2, [0, 1, 2, 3]),
        ("abab", 2, [0, 2, 1, 3]),  # handed out in turns: tensor ranks are brought together
        ("bbaaaa", 2, [0, 1, 2, 3, 4, 5]),
        ("ab", 1, [0, 1]),
    ],
)
def test_tensor_ranks_share_a_node(nodes, tensor, ranks):
    assert rank_order(nodes, tensor) == ranks


def test_nodes_that_would_part_tensor_ranks_are_refused():
    with pytest.raises(UserError, match=r"parallel\.tensor=2 needs 2 ranks together on a node.* took 3, 1;"):
        rank_order("aaab", 2)


@pytest.mark.parametrize(
    ("nodes", "ranks", "tensor", "gpu", "bundle"),
    [
        ([{"CPU": 8}], 8, 2, False, {"CPU": 1}),
        ([{"CPU": 2}], 8, 2, False, {"CPU": 0.25}),  # ranks outnumber cores
        ([{"CPU": 3}, {"CPU": 3}], 4, 2, False, {"CPU": 1.5}),  # 2 and 2, not 3 and 1
        ([{"CPU": 16, "GPU": 4}, {"CPU": 16, "GPU": 4}], 8, 4, True, {"CPU": 1, "GPU": 1}),
        ([{"CPU": 16, "GPU": 4}], 8, 4, True, None),
        ([{}], 1, 1, False, None),
    ],
)
def test_ranks_are_given_room(nodes, ranks, tensor, gpu, bundle):
    assert rank_bundle(nodes, ranks, tensor=tensor, gpu=gpu) == bundle


def test_resources_are_told_in_words():
    assert told_resources([{"CPU": 4.0, "GPU": 2.0}, {"CPU": 4.0}]) == "8 CPUs and 2 GPUs on 2 nodes"


def test_a_crash_is_found_in_the_newest_process_of_a_log(tmp_path):
    log = tmp_path / "rank-0.txt"
    log.write_text(
        "--- process 1\nFatal Python error: Aborted\n--- process 2\nFatal Python error: Segmentation fault\n"
    )
    assert crash_words(log) == "Segmentation fault"
    log.write_text(log.read_text() + "--- process 3\nfine\n")
    assert crash_words(log) is None
