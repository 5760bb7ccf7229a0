"""The local launcher with real processes: restarts, causes, signals, and nobody left behind."""

import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
import standin
import torch.distributed  # imported before the ranks are forked
from runs import recipe_on, run

from cuboid.launch import failures, local, worker
from cuboid.launch.progress import start_phases
from cuboid.parallel.errors import RunFailed, UserError
from cuboid.trainer import loop
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.run import Run
from cuboid.trainer.runlog import read_metrics
from cuboid.trainer.tokens import cache_folder

pytestmark = pytest.mark.timeout(90)


def launch(folder: Path, **settings) -> int:
    return local.launch(standin.recipe(**settings), folder, train=standin.train)


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
    ranks = standin.worker_pids(tmp_path)
    assert len(ranks) == 3
    assert not any(map(psutil.pid_exists, ranks))


def test_a_killed_rank_restarts_the_group_from_the_newest_checkpoint(tmp_path, capfd):
    standin.plan_mischief(tmp_path, does="kill", rank=1, step=7)
    assert launch(tmp_path) == 0
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 13))
    (failure,) = standin.events(tmp_path, "failure")
    assert (failure["rank"], failure["step"], failure["cause"]) == (1, 7, "was killed by SIGKILL")
    assert [event["step"] for event in standin.events(tmp_path, "start")] == [0, 4]
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
    assert len(standin.events(tmp_path, "workers")) == 1
    assert last_line(capfd).startswith(words)


def test_three_failures_without_a_newer_checkpoint_end_the_run(tmp_path, capfd):
    standin.plan_mischief(tmp_path, does="error", rank=2, step=6, times=9)
    assert launch(tmp_path) == 1
    assert len(standin.events(tmp_path, "workers")) == 3
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


def test_a_rank_that_dies_while_the_run_stops_is_told_with_the_newest_checkpoint(tmp_path):
    crash = failures.Failure(rank=0, cause="was killed by SIGKILL", silent=True)
    (tmp_path / "stop").write_text("interrupt")
    for saved, newest in ((None, "before any checkpoint"), (4, "with step 4 as the newest checkpoint")):
        if saved:
            standin.save(tmp_path, saved)
        ending = failures.Judge(tmp_path, max_failures=10, world_size=2).verdict([crash])
        words = f"stopped {newest}, because rank 0 was killed by SIGKILL before the first step"
        assert ending == failures.Ending(code=130, words=words)


def test_a_rank_that_says_nothing_is_named_beside_the_echoes(tmp_path):
    judge = failures.Judge(tmp_path, max_failures=10, world_size=3)
    for rank in (0, 2):
        failures.record(tmp_path, rank, RuntimeError("Timed out waiting 25000ms for send operation to complete"))
    assert judge.verdict([]) is None
    (failure,) = standin.events(tmp_path, "failure")
    assert failure["cause"].endswith("send operation to complete (no word from rank 1)")


def test_a_port_that_was_taken_meanwhile_costs_one_start(tmp_path, monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        ports = iter([other.getsockname()[1], worker.free_port()])
        monkeypatch.setattr(worker, "free_port", lambda: next(ports))
        assert launch(tmp_path) == 0
    (failure,) = standin.events(tmp_path, "failure")
    assert (failure["rank"], "Address already in use" in failure["cause"]) == (0, True)


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
    wrapper = RuntimeError("\n  [Stage 1] failed to run forward:\n  args: ...")
    wrapper.__cause__ = ValueError("a fault")
    assert failures.explain(wrapper) == ("error", False, "ValueError: a fault")
    echo = failures.Failure(rank=0, cause="closed", echo=True, time=1.0)
    late, early = (failures.Failure(rank=rank, cause="x", time=3.0 - rank / 2) for rank in (1, 2))
    assert failures.root_cause([echo, late, early]) is early


def launcher_of(folder: Path) -> int:
    return psutil.Process(standin.ranks_of(folder)[0]).ppid()


@pytest.mark.parametrize(
    ("number", "code", "everybody"),
    [
        (signal.SIGINT, 130, False),
        (signal.SIGUSR1, 85, False),
        (signal.SIGTERM, 85, True),  # job systems do not send it to the command alone
    ],
)
def test_a_stop_signal_ends_the_run_after_a_checkpoint(tmp_path, number, code, everybody):
    with standin.driven("local", tmp_path) as driver:
        processes = standin.wait_for_step(driver, tmp_path, 3)
        for process in processes if everybody else [psutil.Process(driver.pid)]:
            process.send_signal(number)
        _, err = driver.communicate(timeout=30)
        last = read_metrics(tmp_path)[-1]["step"]
        assert driver.returncode == code
        assert failures.newest_step(tmp_path) == last
        assert err.splitlines()[-1].startswith(f"cuboid: stopped after step {last} of 2000")
        assert not (tmp_path / "stop").exists()
        standin.wait_until_gone(processes)


def test_ctrl_c_before_the_first_step_stops_at_once(tmp_path):
    standin.plan_mischief(tmp_path, does="slow", seconds=60)
    with standin.driven("local", tmp_path) as driver:
        standin.wait_until(lambda: standin.ranks_of(tmp_path), driver)
        processes = standin.family(driver)
        assert len(processes) >= 4
        os.killpg(driver.pid, signal.SIGINT)
        _, err = driver.communicate(timeout=30)
        assert (driver.returncode, err) == (130, "cuboid: stopped at once\n")
        assert failures.newest_step(tmp_path) == -1
        standin.wait_until_gone(processes)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    with standin.driven("local", tmp_path) as driver:
        processes = standin.wait_for_step(driver, tmp_path, 3)
        os.kill(standin.ranks_of(tmp_path)[1], signal.SIGSTOP)  # the step's edge never comes
        os.kill(driver.pid, signal.SIGINT)
        standin.wait_until((tmp_path / "stop").exists, driver)
        time.sleep(0.5)
        assert driver.poll() is None
        os.kill(driver.pid, signal.SIGINT)
        driver.communicate(timeout=30)
        assert driver.returncode == 130
        standin.wait_until_gone(processes)


def test_no_rank_outlives_a_killed_driver(tmp_path):
    with standin.driven("local", tmp_path) as driver:
        processes = standin.wait_for_step(driver, tmp_path, 3)
        driver.kill()
        driver.communicate(timeout=30)
        standin.wait_until_gone(processes)


def test_no_rank_outlives_a_killed_launcher(tmp_path):
    with standin.driven("local", tmp_path) as driver:
        processes = standin.wait_for_step(driver, tmp_path, 3)
        os.kill(launcher_of(tmp_path), signal.SIGKILL)
        _, err = driver.communicate(timeout=30)
        assert (driver.returncode, "the launcher's own process died (exit code -9" in err) == (1, True)
        standin.wait_until_gone(processes)


def test_a_terminal_gets_a_bar(tmp_path):
    """Drawn anew in its place, with the newest loss, and gone at the end."""
    screen, terminal = os.openpty()
    standin.plan_mischief(tmp_path, does="slow", seconds=0.2)
    command = ["env", "TERM=xterm", "COLUMNS=120", sys.executable, standin.__file__, "local", str(tmp_path), "2", "8"]
    with standin.command(command, tmp_path, stdout=terminal) as driver:
        os.close(terminal)
        seen = b"".join(iter(lambda: read_screen(screen), b"")).decode()
        _, err = driver.communicate(timeout=30)
    os.close(screen)
    assert (driver.returncode, err) == (0, "")
    frames = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", seen).replace("\r", "\n")
    assert re.search(r"^step ━+ 0/8 starting", frames, re.MULTILINE)
    steps = re.findall(r"^step [━╸╺]+ ([2-7])/8 loss (\d\.\d{4})  1,000 tokens/s  bubble 25%  eta 0:00:0", frames, re.M)
    assert steps
    assert all(loss == f"{1 / int(step):.4f}" for step, loss in steps)
    assert not re.search(r"step \d/8", frames)  # no plain lines beside it
    assert frames.rstrip().splitlines()[-1] == "done: 8 steps, loss 1 -> 0.125"


def read_screen(screen: int) -> bytes:
    """What a terminal shows next; nothing once its programs are gone."""
    try:
        return os.read(screen, 1 << 16)
    except OSError:  # EIO, the way in which Linux ends a terminal
        return b""


def train_on_files_that_are_cut(recipe: Recipe, folder: Path) -> str | None:
    """The real loop; in the first attempt its token files lose their content before step 5."""

    def cut(run: Run) -> None:
        if run.step == 4 and not (folder / "cut").exists():
            torch.distributed.barrier()
            (folder / "cut").touch()
            for file in cache_folder().rglob("*.bin"):
                os.truncate(file, 0)

    return loop.train(recipe, folder, before_step=cut)


@pytest.mark.full
def test_token_files_cut_under_a_run_cost_a_start_and_are_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBOID_CACHE", str(tmp_path / "cache"))
    recipe = recipe_on("1x2x1", changes={"launch": {"launcher": "local"}}, microbatches=2)
    calm = run(recipe, tmp_path / "calm")
    (tmp_path / "run").mkdir()
    assert local.launch(recipe, tmp_path / "run", train=train_on_files_that_are_cut) == 0
    (failure,) = standin.events(tmp_path / "run", "failure")
    assert (failure["cause"], failure["step"]) == ("was killed by SIGBUS", 5)
    assert [event["step"] for event in standin.events(tmp_path / "run", "start")] == [0, 3]
    assert [record["loss"] for record in read_metrics(tmp_path / "run")] == [record["loss"] for record in calm]
