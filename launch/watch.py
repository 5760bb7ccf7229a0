"""Ranks watched for a hang: no rank moves for `launch.timeout_seconds`. Imports no torch.

Every rank tells in a file what it does (`parallel.whereabouts`). A thread on each machine reads these; once all stand
still it asks its own ranks for their stacks. Then it is told once, by the launcher, who waits for whom, and the ranks
are killed: what comes then is as after any failure (`failures.Judge`). `slurm_step` hears of it from its agents; under
Ray there is one watch, and ranks of other machines end by the time-out of their process groups.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from threading import Event, Thread

from cuboid.launch.failures import Failure, record_silent
from cuboid.launch.waits import Found, Waits
from cuboid.parallel.errors import one_of
from cuboid.parallel.schedules import order
from cuboid.parallel.whereabouts import PATIENT, Sighting, machine, path_of, sighting_of
from cuboid.trainer.check_mesh import virtual_stages
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.runlog import RunLog

States = Mapping[int, str]
"""Of the processes of some ranks, by rank, as /proc tells them: R, S, D, T, ..."""

_POLL_SECONDS = 0.5
_STACKS_SECONDS = 3.0
"""For a rank to write down where it stands: at once, but cores may be busy."""


@contextmanager
def answering(folder: Path, rank: int) -> Iterator[None]:
    """Within: this rank's process writes the stacks of all its threads when it gets SIGUSR2, also while it computes or
    waits outside of Python."""
    path = _stacks_path(folder, rank)
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
        try:
            yield
        finally:
            faulthandler.unregister(signal.SIGUSR2)


@contextmanager
def watching(recipe: Recipe, folder: Path, tell: Callable[[States], None] | None = None) -> Iterator[None]:
    """Within: a hang of the run's ranks is noticed, told and ended.

    Args:
        tell: hears once how this machine's ranks are, and sees to the rest.
    """
    done, watch = Event(), Watch(recipe, folder)

    def look() -> None:
        while not done.wait(_POLL_SECONDS):
            if not watch.sees_hang(time.monotonic()):
                continue
            states = watch.states()
            if tell is not None:
                tell(states)
                return
            tell_hang(recipe, folder, states)
            watch.kill()

    thread = Thread(target=look, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def forget(folder: Path, ranks: Iterable[int]) -> None:
    """Before these ranks start: what those of an earlier start said. Their process numbers may be others' by now."""
    for rank in ranks:
        path_of(folder, rank).unlink(missing_ok=True)


class Watch:
    """What the ranks of a run have told, and since when they tell nothing new."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._recipe, self._folder, self._machine = recipe, folder, machine()
        self._seen: dict[int, Sighting] = {}
        self._moved: dict[int, float] = {}
        self._stopped: dict[int, float] = {}
        """Since when each rank that is stopped has been seen so."""

    def sees_hang(self, now: float) -> bool:
        """Whether no rank has moved, or one has been stopped, for `launch.timeout_seconds` at ``now`` (monotonic)."""
        current = self._look()
        for rank, seen in current.items():
            before = self._seen.get(rank)
            if before != seen:
                self._moved[rank] = now
            if before is None or before.pid != seen.pid or self._state(seen) != "T":
                self._stopped.pop(rank, None)
            else:
                self._stopped.setdefault(rank, now)
        self._seen = current
        if len(current) < self._recipe.layout.world_size:
            return False
        limit = now - self._recipe.launch.timeout_seconds
        if any(self._stopped.get(rank, now) < limit for rank in current):
            return True
        is_still = all(self._moved[rank] < limit for rank in current)
        # all ranks leave a patient phase together: one that stays there alone keeps the others in a collective
        return is_still and not all(seen.phase in PATIENT for seen in current.values())

    def states(self) -> States:
        """Of this machine's ranks, which have been asked for their stacks and had the time to write them."""
        states = {rank: state for rank, seen in self._seen.items() if (state := self._state(seen))}
        asked = [rank for rank, state in states.items() if state != "T"]
        for rank in asked:
            with suppress(ProcessLookupError):
                os.kill(self._seen[rank].pid, signal.SIGUSR2)
        deadline, sizes = time.monotonic() + _STACKS_SECONDS, dict.fromkeys(asked, -1)
        while time.monotonic() < deadline:
            now = {rank: _stacks_path(self._folder, rank).stat().st_size for rank in asked}
            if now == sizes and all(now.values()):
                break
            sizes = now
            time.sleep(0.1)
        return states

    def kill(self) -> None:
        """The ranks of this machine."""
        for seen in self._seen.values():
            if self._state(seen):
                with suppress(ProcessLookupError):
                    os.kill(seen.pid, signal.SIGKILL)
        self._seen = {}

    def _look(self) -> dict[int, Sighting]:
        """Every rank that has begun, and has not ended since as far as this machine can see."""
        ranks = range(self._recipe.layout.world_size)
        told = {rank: seen for rank in ranks if (seen := sighting_of(self._folder, rank))}
        return {rank: seen for rank, seen in told.items() if seen.machine != self._machine or self._state(seen)}

    def _state(self, seen: Sighting) -> str:
        """R, S, D, T, ... as /proc tells it; empty where the process is gone, or on another machine."""
        if seen.machine != self._machine:
            return ""
        try:
            state = Path(f"/proc/{seen.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return ""
        return "" if state in "ZX" else state


def tell_hang(recipe: Recipe, folder: Path, states: States) -> None:
    """Who waits for whom: an event, a file with all stacks, and the failure of the rank that keeps the others waiting.

    Args:
        states: of every rank whose machine has asked it for its stacks.
    """
    ranks = {rank: _found(folder, rank, states.get(rank, "")) for rank in range(recipe.layout.world_size)}
    settings, seconds = recipe.parallel, recipe.launch.timeout_seconds
    actions = order(
        settings.schedule,
        pipeline=settings.pipeline,
        virtual_stages=virtual_stages(recipe),
        microbatches=settings.microbatches,
    )
    waits = Waits(ranks, recipe.layout, actions)
    lines = waits.lines()
    details = _write(folder, f"no rank has moved for {seconds} s, or one was stopped for as long", lines, ranks)
    first = ranks[waits.hung[0]]
    RunLog(folder).event("hang", rank=first.rank, step=first.seen.step, waits=lines, details=details)
    record_silent(folder, _failure(first, waits, details))


def _found(folder: Path, rank: int, state: str) -> Found:
    seen = sighting_of(folder, rank) or Sighting(machine="", pid=0)
    # threads are written newest first: the last one is the main thread
    stack = _stacks(folder, rank).rpartition("first):\n")[2].strip() if state else ""
    return Found(rank=rank, seen=seen, state=state, stack=stack)


def _stacks(folder: Path, rank: int) -> str:
    try:
        return _stacks_path(folder, rank).read_text()
    except OSError:
        return ""


def _write(folder: Path, title: str, lines: list[str], ranks: Mapping[int, Found]) -> str | None:
    """All that is known, in a file of the run's logs; its path in the folder, None where it cannot be written."""
    number = 1 + len(list((folder / "logs").glob("hang-*.txt")))
    path = folder / "logs" / f"hang-{number}.txt"
    parts = [title, *lines]
    for rank, found in ranks.items():
        place = f"process {found.seen.pid}, state {found.state}" if found.state else "on another machine"
        stacks = _stacks(folder, rank) if found.stack else "no stack\n"
        parts.append(f"\n--- rank {rank}, {place}: step {found.seen.step}, {found.seen.place}\n{stacks}")
    try:
        path.write_text("\n".join(parts))
    except OSError:
        return None
    return str(path.relative_to(folder))


def _failure(first: Found, waits: Waits, details: str | None) -> Failure:
    """Of the rank that keeps the others waiting: where, why, and one that waits."""
    others = f", or rank {one_of(waits.hung[1:])}," if waits.hung[1:] else ""
    waiting = (rank for rank in waits.ranks if rank not in waits.hung and first.rank in waits.awaited(rank)[1])
    beside = "; ".join([word for word in (first.why, *map(waits.line, islice(waiting, 1))) if word])
    cause = f"{others} hung {first.seen.place}{f' ({beside})' if beside else ''}".strip()
    return Failure(rank=first.rank, cause=cause, silent=True, time=time.time(), details=details)


def _stacks_path(folder: Path, rank: int) -> Path:
    return path_of(folder, rank).with_suffix(".stacks")
