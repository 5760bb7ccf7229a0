"""A stand-in for training, for the launchers' tests: real processes and a real process group, steps of milliseconds.

As a program it is a driver: ``python standin.py LAUNCHER FOLDER RANKS STEPS [mischief]``.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from cuboid.launch import failures
from cuboid.parallel.errors import RunFailed, UserError
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.runlog import RunLog, read_events, read_metrics

MISCHIEF = "mischief.json"
"""{"step": 5, "rank": 1, "does": "user" | "run" | "error" | "kill", "times": 2}; times counts the attempts.
{"does": "slow", "seconds": 0.2}: every step of every rank."""


def recipe(*, ranks: int = 3, steps: int = 12, launcher: str = "local", **launch: int) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "standin",
            "model": {"config": {"model_type": "llama"}},
            "data": {"kind": "text", "path": "none", "sequence_length": 8},
            "parallel": {"data": ranks},
            "train": {"steps": steps, "global_batch": ranks},
            "checkpoint": {"every": 4},
            "launch": {"launcher": launcher, "timeout_seconds": 60, "device": "cpu", **launch},
        }
    )


def train(recipe: Recipe, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    from cuboid.parallel.mesh import connect

    log = RunLog(folder)
    with connect(recipe.layout, timeout_seconds=recipe.launch.timeout_seconds, device=torch.device("cpu")) as block:
        step = max(0, failures.newest_step(folder))
        places = [None] * dist.get_world_size()
        dist.all_gather_object(places, (os.uname().nodename, os.getpid()))
        if block.rank == 0:
            log.truncate(step)
            ranks = {str(rank): {"host": host, "pid": pid} for rank, (host, pid) in enumerate(places)}
            log.event("start", step=step, ranks=ranks, phases={"model": 0.0})
        stop = False
        while step < recipe.train.steps and not stop:
            misbehave(folder, block.rank, step + 1)
            total = torch.tensor([1.0, float((folder / failures.STOP_FILE).exists())])
            dist.all_reduce(total)
            stop = bool(total[1])
            time.sleep(0.02)
            step += 1
            if block.rank == 0:
                log.metrics({"step": step, "loss": 1 / step, "tokens_per_second": 1e3, "bubble_measured": 0.25})
                if stop or step % recipe.checkpoint.every == 0 or step == recipe.train.steps:
                    save(folder, step)
        if block.rank == 0:
            log.event("stop", step=step)


def save(folder: Path, step: int) -> None:
    partial = folder / "checkpoints" / f".step-{step:08}"
    partial.mkdir(parents=True)
    (partial / "manifest.json").write_text("{}")
    partial.rename(partial.with_name(partial.name[1:]))


def misbehave(folder: Path, rank: int, step: int) -> None:
    try:
        plan = json.loads((folder / MISCHIEF).read_text())
    except FileNotFoundError:
        return
    if plan["does"] == "slow":
        time.sleep(plan["seconds"])
        return
    if (rank, step) != (plan["rank"], plan["step"]) or len(list(folder.glob("mischief-*"))) >= plan.get("times", 1):
        return
    (folder / f"mischief-{time.monotonic_ns()}").touch()
    match plan["does"]:
        case "user":
            raise UserError("data.path=nowhere does not exist; use a file")
        case "run":
            raise RunFailed("the loss is not finite")
        case "error":
            raise ValueError("the fifth wheel came off")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)


def plan_mischief(folder: Path, **plan) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MISCHIEF).write_text(json.dumps(plan))


def ranks_of(folder: Path) -> dict[int, int]:
    """rank -> pid, as the newest start event tells."""
    starts = events(folder, "start")
    return {int(rank): place["pid"] for rank, place in starts[-1]["ranks"].items()} if starts else {}


def events(folder: Path, kind: str) -> list[dict]:
    return [event for event in read_events(folder) if event["kind"] == kind]


@contextmanager
def driven(launcher: str, folder: Path, *, steps: int = 2000, ranks: int = 2) -> Iterator[subprocess.Popen]:
    """A driver of the stand-in: see `command`."""
    with command([sys.executable, __file__, launcher, str(folder), str(ranks), str(steps)], folder) as driver:
        yield driver


@contextmanager
def command(words: list[str], folder: Path, *, stdout: int = subprocess.PIPE) -> Iterator[subprocess.Popen]:
    """A command of its own session, as a terminal makes it, that runs in ``folder``; nothing of it is left behind."""
    driver = subprocess.Popen(words, stdout=stdout, stderr=subprocess.PIPE, text=True, start_new_session=True)
    processes: set[psutil.Process] = set()
    try:
        yield driver
    finally:
        with suppress(psutil.NoSuchProcess):
            processes |= family(driver)
        for session in {_session(pid) for pid in worker_pids(folder)} - {None}:
            processes |= members({session})
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        driver.kill()
        driver.communicate(timeout=30)


def family(driver: subprocess.Popen) -> set[psutil.Process]:
    """What lives of a driver's session and of those of its children, also what others have adopted since."""
    return members({driver.pid, *(_session(child.pid) for child in psutil.Process(driver.pid).children())})


def members(sessions: set[int | None]) -> set[psutil.Process]:
    return {process for process in psutil.process_iter() if _session(process.pid) in sessions}


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def worker_pids(folder: Path) -> list[int]:
    """Of every attempt, as the launcher told them."""
    return [place["pid"] for event in events(folder, "workers") for place in event["ranks"].values()]


def wait_until(holds: Callable[[], object], driver: subprocess.Popen, *, seconds: float = 60) -> None:
    """Return once ``holds()`` while the driver lives."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.02)


def wait_for_step(driver: subprocess.Popen, folder: Path, step: int, *, seconds: float = 60) -> set[psutil.Process]:
    """The driver's family once a step is done: all ranks are in it."""
    wait_until(lambda: len(read_metrics(folder)) >= step, driver, seconds=seconds)
    found, ranks = family(driver), set(ranks_of(folder).values())
    assert ranks
    assert ranks <= {process.pid for process in found}
    return found


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(processes: Iterable[psutil.Process], seconds: float = 30) -> None:
    """Long on a machine with other work; a process that is left behind stays for good."""
    deadline = time.monotonic() + seconds
    while left := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)


def main() -> int:
    launcher, folder, ranks, steps = sys.argv[1:5]
    wanted = recipe(launcher=launcher, ranks=int(ranks), steps=int(steps))
    if launcher == "local":
        from cuboid.launch import local

        return local.launch(wanted, Path(folder), train=train)
    from cuboid.launch import ray_cluster

    return ray_cluster.launch(wanted, Path(folder), train=train)


if __name__ == "__main__":
    sys.exit(main())
