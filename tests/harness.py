"""Ranks for tests: forked after the imports, on gloo, with a time limit that shows where every rank stands."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch  # imported here, once: a fork costs milliseconds, eight imports ten seconds

torch.set_num_threads(1)


class RanksFailed(AssertionError):
    """Some rank raised, died or stood still; the first failing rank's traceback stands first."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60) -> list[Any]:
    """Call ``fn(*args)`` in ``world_size`` forked ranks and give back what each returned (picklable).

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set. After ``timeout`` seconds every rank's Python
    stacks are dumped into the error.
    """
    context, port = get_context("fork"), free_port()
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            stacks = Path(folder, f"rank-{rank}.txt")
            process = context.Process(target=_rank_main, args=(rank, world_size, port, sender, stacks, fn, args))
            process.start()
            sender.close()
            ranks.append((process, receiver))
        try:
            return _collect([receiver for _, receiver in ranks], [p for p, _ in ranks], Path(folder), timeout)
        finally:
            for process, _ in ranks:
                if process.is_alive():
                    process.kill()
                process.join()


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    sender: Connection,
    stacks: Path,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with stacks.open("w") as file:
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
        try:
            _send(sender, None, fn(*args))
        except BaseException:
            _send(sender, traceback.format_exc(), None)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # no tear-down of a forked interpreter's inherited state


def _send(sender: Connection, failure: str | None, result: Any) -> None:
    # plain pickle: torch's own would hand over file descriptors of a process that is about to end
    sender.send_bytes(pickle.dumps((time.monotonic(), failure, result)))


def _collect(receivers: list[Connection], processes: list[Any], folder: Path, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, str]] = []
    deadline, waiting = time.monotonic() + timeout, dict(enumerate(receivers))
    while waiting:
        # once a rank has failed, the others only get the time to say why
        patience = 3.0 if failures else deadline - time.monotonic()
        ready = wait(list(waiting.values()), timeout=max(0.0, patience))
        if not ready:
            break
        for rank in [rank for rank, receiver in waiting.items() if receiver in ready]:
            try:
                when, failure, results[rank] = pickle.loads(waiting.pop(rank).recv_bytes())
            except EOFError:
                processes[rank].join()
                when, failure = time.monotonic(), f"died with exit code {processes[rank].exitcode}"
            if failure:
                failures.append((when, rank, failure))
    if failures or waiting:
        raise RanksFailed(_report(failures, sorted(waiting), processes, folder))
    return [results[rank] for rank in range(len(receivers))]


def _report(failures: list[tuple[float, int, str]], waiting: list[int], processes: list[Any], folder: Path) -> str:
    lines = [f"rank {rank} failed:\n{text}" for _, rank, text in sorted(failures)]
    for rank in waiting:
        os.kill(processes[rank].pid, signal.SIGUSR2)
    time.sleep(0.5 if waiting else 0)
    lines += [f"rank {rank} stood here:\n{(folder / f'rank-{rank}.txt').read_text()}" for rank in waiting]
    return "\n".join(lines)
