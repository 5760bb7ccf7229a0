"""Ranks for tests: forked after the imports, on gloo, with a time limit that shows where every rank stands."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch  # imported here, once: a fork costs milliseconds, eight imports ten seconds

from cuboid.launch.worker import free_port

torch.set_num_threads(1)

PATIENCE_SECONDS = 10.0
"""Once a rank has failed, the others have this long to say why they fail too; most meet its closed sockets at once."""
STACKS_SECONDS = 5.0
"""For a rank that stood still to write down where; a signal is answered at once, but cores may be busy."""


class RanksFailed(AssertionError):
    """Some rank raised, died or stood still; the first failing rank's traceback stands first."""


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
    begun = stacks.with_suffix(".begun")
    with begun.open("w") as file:
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
        begun.rename(stacks)  # from now on the signal is answered; before, it would kill this process
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
        ready = wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
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
                deadline = min(deadline, time.monotonic() + PATIENCE_SECONDS)
    if failures or waiting:
        raise RanksFailed(_report(failures, sorted(waiting), processes, folder))
    return [results[rank] for rank in range(len(receivers))]


def _report(failures: list[tuple[float, int, str]], waiting: list[int], processes: list[Any], folder: Path) -> str:
    lines = [f"rank {rank} failed:\n{text}" for _, rank, text in sorted(failures)]
    files = {rank: folder / f"rank-{rank}.txt" for rank in waiting}
    for rank in waiting:
        if files[rank].exists():
            with suppress(ProcessLookupError):  # it may end just now
                os.kill(processes[rank].pid, signal.SIGUSR2)
    deadline = time.monotonic() + STACKS_SECONDS
    lines += [f"rank {rank} stood here:\n{_stacks(file, deadline)}" for rank, file in files.items()]
    return "\n".join(lines)


def _stacks(file: Path, deadline: float) -> str:
    """What a rank writes into ``file``: all of it, once it has stopped to grow."""
    if not file.exists():
        return "it had not begun"
    size = -1
    while time.monotonic() < deadline and (size <= 0 or file.stat().st_size > size):
        size = file.stat().st_size
        time.sleep(0.1)
    return file.read_text()
