"""Ranks as processes of this machine, without Ray: forked after the imports, watched, forked again after a failure.

Own watching instead of torch's elastic agent: at the first process that ends it kills the others and reports only that
one, which is as often the echo of a failure as its cause; and it passes errors on as pickles.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path

from cuboid.launch import worker
from cuboid.launch.failures import EXIT_CODES, Ending, Failure, Judge
from cuboid.launch.supervise import die_with_parent, drive
from cuboid.launch.watch import States, forget, watching
from cuboid.launch.worker import Place, Train
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.runlog import RunLog

_SETTLE_SECONDS = 2.0
"""How long ranks have to write down their own cause once one has failed."""
_KINDS = {code: kind for kind, code in EXIT_CODES.items()}


def launch(recipe: Recipe, folder: Path, *, train: Train | None = None, quiet: bool = False) -> int:
    """Run the recipe as forked processes of this machine; returns the command's exit code.

    Args:
        recipe: resolved.
        folder: the run's folder.
        train: what each rank runs; the training loop unless something else is launched.
        quiet: show nothing but failures.

    Raises:
        UserError: the run's folder cannot be written.
    """
    folder = folder.absolute()
    return drive(recipe, folder, partial(_host, recipe, folder, train), quiet=quiet)


def _host(recipe: Recipe, folder: Path, train: Train | None) -> Ending:
    train = shared_imports(folder, recipe.layout.world_size, train)
    judge = Judge(folder, max_failures=recipe.launch.max_failures, world_size=recipe.layout.world_size)
    while True:
        failed = run_ranks(places(recipe.layout.world_size), recipe, folder, train)
        if not failed:
            return Ending(code=0)
        ending = judge.verdict(failed)
        if ending is not None:
            return ending


def shared_imports(folder: Path, local_size: int, train: Train | None = None) -> Train:
    """What this machine's ranks run, loaded once for all that are forked from this process."""
    # Read by OpenMP when torch is loaded, which is before the fork.
    os.environ["OMP_NUM_THREADS"] = worker.threads(local_size)
    # Else merely asking whether there is a GPU would bar the forked ranks from using it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    train = train or worker.training_loop()
    RunLog(folder).event("phase", name="imports")
    gc.freeze()  # what is imported stays shared with the ranks: no collection writes into its pages
    return train


def places(size: int) -> list[Place]:
    """Of ranks that all run on this machine."""
    port = worker.free_port()
    return [
        Place(rank=rank, world_size=size, local_rank=rank, local_size=size, host="127.0.0.1", port=port)
        for rank in range(size)
    ]


def run_ranks(
    places: Sequence[Place],
    recipe: Recipe,
    folder: Path,
    train: Train,
    *,
    tell: Callable[[States], None] | None = None,
) -> list[Failure]:
    """Fork this machine's ranks and wait until all have ended; what went wrong, as far as this process sees it. None of
    them is left afterwards. ``tell``: see `watching`."""
    context, plain, log = get_context("fork"), recipe.model_dump(), RunLog(folder)
    forget(folder, [place.rank for place in places])
    ranks = {
        place.rank: context.Process(target=_rank, args=(place, plain, folder, train), name=f"rank-{place.rank}")
        for place in places
    }
    for process in ranks.values():
        process.start()
    log.event("phase", name="workers")
    here = socket.gethostname()
    log.event("workers", ranks={str(rank): {"host": here, "pid": process.pid} for rank, process in ranks.items()})
    with watching(recipe, folder, tell):
        failed = _wait(ranks)
    _end(ranks.values())
    return failed


def _rank(place: Place, recipe: dict[str, object], folder: Path, train: Train) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as SIGINT: the driver asks for a checkpoint when it gets one
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    die_with_parent(signal.SIGKILL)
    os.environ.update(worker.environment(place))
    worker.run(recipe, str(folder), train=train)


def _wait(ranks: Mapping[int, ForkProcess]) -> list[Failure]:
    """Until all have ended well, or one has failed and the others had the time to say what they saw."""
    deadline: float | None = None
    found: dict[int, Failure] = {}
    running = dict(ranks)
    while running:
        patience = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not wait([process.sentinel for process in running.values()], timeout=patience):
            break
        for rank, process in list(running.items()):
            if process.is_alive():
                continue
            del running[rank]
            if process.exitcode:
                found[rank] = _failure(rank, process.exitcode)
                deadline = deadline or time.monotonic() + _SETTLE_SECONDS
    return list(found.values())


def _failure(rank: int, code: int) -> Failure:
    """Of a rank that wrote nothing down; what it wrote down stands before this."""
    if code < 0:
        return Failure(rank=rank, cause=f"was killed by {_signal_name(-code)}", silent=True, time=time.time())
    kind = _KINDS.get(code, "error")
    return Failure(rank=rank, cause=f"ended with exit code {code}", kind=kind, silent=True, time=time.time())


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _end(ranks: Collection[ForkProcess]) -> None:
    """No rank of this attempt is left. Killed, not asked: a rank within a collective does not listen."""
    for process in ranks:
        if process.is_alive():
            process.kill()
    for process in ranks:
        process.join()
        process.close()
