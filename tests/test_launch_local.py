"""The local launcher with real processes: restarts, causes, signals, and nobody left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import standin
import torch.distributed  # noqa: F401  imported before the ranks are forked

from cuboid.launch import failures, local, worker
from cuboid.launch.progress import start_phases
from cuboid.parallel.errors import RunFailed, UserError
from cuboid.trainer.runlog import read_metrics

pytestmark = pytest.mark.timeout(90)


def launch(folder: Path, **settings) -> int:
    return local.launch(standin.recipe(**settings), folder, train=standin.train)


def events(folder: Path, kind: str) -> list[dict]:
    return [event for event in standin.read_all(folder) if event["kind"] == kind]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def session_pids(folder: Path) -> list[int]:
    return [place["pid"] for event in events(folder, "workers") for place in event["ranks"].values()]


def last_line(capfd) -> str:
    return capfd.readouterr().err.strip().splitlines()[-1]


def test_a_run_goes_to_its_end(tmp_path, capfd):
    assert launch(tmp_path, ranks=3) == 0
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 13))
    out = capfd.readouterr().out.splitlines()
    assert "step 12/12  loss 0.0833  1,000 tokens/s  bubble 25%" in out[-2]
    assert out[-1] == "done: 12 steps, loss 1 -> 0.08333"
    phases = start_phases(tmp_path)
    assert list(phases) == ["driver", "imports", "workers", "groups", "model", "first step"]
    assert all(seconds >= 0 for seconds in phases.values())
    assert not any(map(is_alive, session_pids(tmp_path)))


def test_a_killed_rank_restarts_the_group_from_the_newest_checkpoint(tmp_path, capfd):
    standin.plan_mischief(tmp_path, does="kill", rank=1, step=7)
    assert launch(tmp_path) == 0
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 13))
    (failure,) = events(tmp_path, "failure")
    assert (failure["rank"], failure["step"], failure["cause"]) == (1, 7, "was killed by SIGKILL")
    assert [event["step"] for event in events(tmp_path, "start")] == [0, 4]
    out = capfd.readouterr().out
    assert "rank 1 was killed by SIGKILL in step 7; starting again (failure 1 of at most 10)" in out
    assert "going on after step 4" in out


@pytest.mark.parametrize(
    ("does", "code", "words"),
    [
        ("user", 2, "cuboid: data.path=nowhere does not exist; use a file"),
        ("run", 1, "cuboid: rank 2 failed in step 6: the loss is not finite"),
    ],
)
def test_what_cannot_go_better_next_time_is_not_tried_again(tmp_path, capfd, does, code, words):
    standin.plan_mischief(tmp_path, does=does, rank=2, step=6)
    assert launch(tmp_path) == code
    assert len(events(tmp_path, "workers")) == 1
    assert last_line(capfd).startswith(words)


def test_three_failures_without_a_newer_checkpoint_end_the_run(tmp_path, capfd):
    standin.plan_mischief(tmp_path, does="error", rank=2, step=6, times=9)
    assert launch(tmp_path) == 1
    assert len(events(tmp_path, "workers")) == 3
    line = last_line(capfd)
    assert (
        "given up after 3 failures without a newer checkpoint: rank 2 failed in step 6: ValueError: the fifth" in line
    )
    traceback = line[line.rindex("(") + 1 : -1]
    assert "misbehave" in Path(traceback).read_text()


def test_failures_are_counted_over_the_whole_run(tmp_path, capfd):
    standin.plan_mischief(tmp_path, does="kill", rank=0, step=5, times=2)
    assert launch(tmp_path, max_failures=1) == 1
    assert "given up after 2 failures (launch.max_failures=1): rank 0 was killed by SIGKILL" in last_line(capfd)


def test_newer_checkpoints_let_a_run_fail_more_often(tmp_path):
    judge = failures.Judge(tmp_path, max_failures=10, world_size=2)
    crash = failures.Failure(rank=0, cause="was killed by SIGKILL", silent=True)
    verdicts = []
    for saved in (None, None, 4, None, None):
        if saved:
            standin.save(tmp_path, saved)
        verdicts.append(judge.verdict([crash]))
    assert [verdict is None for verdict in verdicts] == [True, True, True, True, False]


def test_a_rank_that_says_nothing_is_named_beside_the_echoes(tmp_path):
    judge = failures.Judge(tmp_path, max_failures=10, world_size=3)
    for rank in (0, 2):
        failures.record(tmp_path, rank, RuntimeError("Timed out waiting 25000ms for send operation to complete"))
    assert judge.verdict([]) is None
    (failure,) = events(tmp_path, "failure")
    assert failure["cause"].endswith("send operation to complete (no word from rank 1)")


def test_a_port_that_was_taken_meanwhile_costs_one_start(tmp_path, monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        ports = iter([other.getsockname()[1], worker.free_port()])
        monkeypatch.setattr(worker, "free_port", lambda: next(ports))
        assert launch(tmp_path) == 0
    (failure,) = events(tmp_path, "failure")
    assert (failure["rank"], "EADDRINUSE" in failure["cause"]) == (0, True)


def test_a_folder_that_cannot_be_written_is_told_before_any_rank_starts(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        launch(tmp_path / "file" / "run")


def test_the_first_cause_is_told_apart_from_its_echoes():
    closed = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"
    assert failures.explain(RuntimeError(closed))[:2] == ("error", True)
    assert failures.explain(RunFailed("no"))[:2] == ("run", False)
    cleanup = RuntimeError(closed)
    cleanup.__context__ = KeyError("shard")
    assert failures.explain(cleanup) == ("error", False, "KeyError: 'shard'")
    echo = failures.Failure(rank=0, cause="closed", echo=True, time=1.0)
    late, early = (failures.Failure(rank=rank, cause="x", time=3.0 - rank / 2) for rank in (1, 2))
    assert failures.root_cause([echo, late, early]) is early


def start_driver(folder: Path, *, steps: int = 2000, wait_for_step: int = 3, launcher: str = "local"):
    """A driver in a process group of its own, as a terminal makes it, that has done some steps."""
    driver = subprocess.Popen(
        [sys.executable, standin.__file__, launcher, str(folder), "2", str(steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(read_metrics(folder)) < wait_for_step:
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline, "no step"
        time.sleep(0.05)
    return driver


def wait_until_gone(pids: list[int], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "code", "everybody"),
    [
        (signal.SIGINT, 130, False),
        (signal.SIGUSR1, 85, False),
        (signal.SIGTERM, 85, True),  # job systems do not send it to the command alone
    ],
)
def test_a_stop_signal_ends_the_run_after_a_checkpoint(tmp_path, number, code, everybody):
    driver = start_driver(tmp_path)
    launcher = parent(standin.ranks_of(tmp_path)[0])
    for pid in [*session_pids(tmp_path), launcher] if everybody else []:
        os.kill(pid, number)
    os.killpg(driver.pid, number)
    _, err = driver.communicate(timeout=30)
    last = read_metrics(tmp_path)[-1]["step"]
    assert driver.returncode == code
    assert failures.newest_step(tmp_path) == last
    assert err.splitlines()[-1].startswith(f"cuboid: stopped after step {last} of 2000")
    assert not (tmp_path / "stop").exists()
    wait_until_gone(session_pids(tmp_path))


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    driver = start_driver(tmp_path)
    victim = standin.ranks_of(tmp_path)[1]
    os.kill(victim, signal.SIGSTOP)  # the step's edge never comes
    os.kill(driver.pid, signal.SIGINT)
    time.sleep(0.5)
    assert driver.poll() is None
    os.kill(driver.pid, signal.SIGINT)
    driver.communicate(timeout=10)
    assert driver.returncode == 130
    wait_until_gone(session_pids(tmp_path))


def test_no_rank_outlives_a_killed_driver(tmp_path):
    driver = start_driver(tmp_path)
    driver.kill()
    driver.communicate(timeout=10)
    wait_until_gone(session_pids(tmp_path))


def test_no_rank_outlives_a_killed_launcher(tmp_path):
    driver = start_driver(tmp_path)
    os.kill(parent(standin.ranks_of(tmp_path)[0]), signal.SIGKILL)
    _, err = driver.communicate(timeout=10)
    assert (driver.returncode, "the launcher's own process died (exit code -9" in err) == (1, True)
    wait_until_gone(session_pids(tmp_path))
