"""What every rank of every launcher runs. Imports no torch itself: its environment must be settled before."""

from __future__ import annotations

import faulthandler
import io
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuboid.launch import failures, fence, watch
from cuboid.launch.private import keep_files_private, redact_output
from cuboid.parallel.errors import RunFailed
from cuboid.trainer.check import num_cores
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.runlog import RunLog

Train = Callable[[Recipe, Path], object]

NEW_PROCESS = "--- process"
"""Begins what a process writes into a log that several write one after the other."""


def run(recipe: dict[str, Any], folder: str, *, train: Train | None = None) -> None:
    """Train as one rank: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT stand in the environment.

    What this process prints goes to ``logs/rank-N.txt`` of the run's folder, also what its libraries print, and the
    stacks of a crash.

    Args:
        recipe: the resolved recipe as plain data.
        folder: the run's folder, the same on every node.
        train: what to run; the training loop unless something else is launched.

    Raises:
        SystemExit: with a code of `failures.EXIT_CODES` where the rank fails; why stands in the folder by then. No
            other exception leaves, since not every exception survives the way to the launcher's process.
    """
    path, rank = Path(folder), int(os.environ["RANK"])
    keep_files_private()
    send_output_to(path / "logs" / f"rank-{rank}.txt")
    faulthandler.enable()
    try:
        train = train or training_loop()
        if rank == 0:
            RunLog(path).event("phase", name="imports")
        with watch.answering(path, rank):
            train(Recipe.model_validate(recipe), path)
    except BaseException as error:
        if fence.is_overtaken(path):  # the end of its peers is no failure of the newer ranks
            raise SystemExit(failures.EXIT_CODES["error"]) from error
        raise SystemExit(failures.record(path, rank, error)) from error
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def training_loop() -> Train:
    """The training loop, with the seconds of imports that come before it (torch, transformers)."""
    from cuboid.trainer.loop import train

    return train


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank stands among the processes, and where rank 0 listens."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    """Ranks on this rank's machine."""
    host: str
    port: int


def environment(place: Place) -> dict[str, str]:
    """What `run` and torch read."""
    variables = {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_size),
        "MASTER_ADDR": place.host,
        "MASTER_PORT": str(place.port),
    }
    if place.local_size == place.world_size and sys.platform == "linux":
        # Within one machine gloo needs no network, and must not depend on whether the host's own name resolves.
        variables["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return variables


def threads(local_size: int) -> str:
    """OMP_NUM_THREADS for each of the ranks of this machine, which share its cores; the user's own stands."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, num_cores() // local_size))


def free_port() -> int:
    """A port that nobody listens on, from below the range that systems hand out to outgoing connections.

    Between this look and rank 0's own, another program may take it: the group then fails at its start, and the next
    one gets another port.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_768), 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise RunFailed("no free port between 20000 and 32767 for the ranks to meet at")


def send_output_to(path: Path) -> None:
    """Append what this process writes to its standard output and error to ``path``, libraries in C included; what
    Python writes without secrets."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # a killed process must have said what it said
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(f"{NEW_PROCESS} {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    redact_output()
