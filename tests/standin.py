"""A stand-in for training, for the launchers' tests: real processes and a real process group, steps of milliseconds.

As a program it is a driver: ``python standin.py LAUNCHER FOLDER RANKS STEPS [mischief]``.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from cuboid.launch import failures
from cuboid.parallel.errors import RunFailed, UserError
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.runlog import RunLog

MISCHIEF = "mischief.json"
"""{"step": 5, "rank": 1, "does": "user" | "run" | "error" | "kill" | "slow", "times": 2}; times counts the attempts."""


def recipe(*, name="standin", ranks=3, tensor=1, steps=12, launcher="local", max_failures=10, every=4) -> Recipe:
    return Recipe.model_validate(
        {
            "name": name,
            "model": {"config": {"model_type": "llama"}},
            "data": {"kind": "text", "path": "none", "sequence_length": 8},
            "parallel": {"data": ranks // tensor, "tensor": tensor},
            "train": {"steps": steps, "global_batch": ranks},
            "checkpoint": {"every": every},
            "launch": {"launcher": launcher, "max_failures": max_failures, "timeout_seconds": 60, "device": "cpu"},
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
        time.sleep(0.2)
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
    events = [event for event in read_all(folder) if event["kind"] == "start"]
    return {int(rank): place["pid"] for rank, place in events[-1]["ranks"].items()} if events else {}


def read_all(folder: Path) -> list[dict]:
    from cuboid.trainer.runlog import read_events

    return read_events(folder)


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
