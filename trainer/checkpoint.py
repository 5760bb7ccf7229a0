"""Save and load a run's tensors on any mesh: staged in the step, written behind it, published by rank 0.

What a step pays for is one copy into host memory. Writing, hashing, manifest, rename and retention run on a thread of
their own, whose messages travel on a process group of their own (gloo), so that they never meet the training's.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from cuboid.parallel.errors import UserError
from cuboid.trainer import inspection
from cuboid.trainer.copies import Copier
from cuboid.trainer.manifest import FACTS, PARTIAL, TENSORS, CheckpointError, read_manifest, refused, steps
from cuboid.trainer.publish import clean, discard, publish, retain, set_aside, write_durably, write_json
from cuboid.trainer.restore import faults_of, read_facts, read_tensors
from cuboid.trainer.shards import Arena, Written, lay_out, plan_pieces, signature
from cuboid.trainer.tensor_table import TensorRecord, encode_table, read_table

Event = Callable[..., None]
"""Called as ``event(kind, **fields)``, like `RunLog.event`; also from the writing thread."""

_SLOWEST_WRITE = timedelta(hours=1)
_SHOWN = 5


@dataclass(frozen=True)
class Failure:
    """Why a save failed: the first rank that could not do its part, and its error in words."""

    rank: int
    cause: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.cause}"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on the disk, whole."""

    path: Path
    bytes: int


class Ranks:
    """Small messages between all ranks; plain calls where this process is alone."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group, self.alone = group, not dist.is_initialized()
        self.rank, self.size = (0, 1) if self.alone else (dist.get_rank(), dist.get_world_size())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def to_first(self, value: Any) -> list[Any] | None:
        """Every rank's value on rank 0, None elsewhere."""
        if self.alone:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.alone:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]


class Checkpointer:
    """Saves into ``folder``; every rank of the world makes one and calls the same methods in the same order.

    A save that fails (no space, a broken disk, on any rank) does not stop the training: its partial folder is removed,
    the event ``checkpoint_failed`` says so, the checkpoints before it stay, and the next save tries again.

    Args:
        folder: the run's ``checkpoints``; what killed saves left in it is removed (by rank 0).
        keep: how many whole checkpoints stay, at least 1.
        asynchronous: write behind the training; otherwise `save` returns when all is on the disk.
        copier: takes each whole checkpoint to a second place; rank 0's does.
        event: hears ``checkpoint`` (step, path, bytes, seconds, blocked_seconds), ``checkpoint_failed`` (step, rank,
            cause, newest), ``checkpoint_waited`` (step, seconds), ``checkpoint_not_removed`` (step, cause),
            ``checkpoint_cleaned`` (paths); on rank 0.

    Raises:
        UserError: on every rank, where the folder cannot be made or written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        asynchronous: bool,
        copier: Copier | None = None,
        event: Event | None = None,
    ) -> None:
        # a rank whose disk is slow must not break the group, so it waits longer than the training's groups
        group = dist.new_group(backend="gloo", timeout=_SLOWEST_WRITE) if dist.is_initialized() else None
        self._ranks = Ranks(group)
        self.folder, self.keep, self.asynchronous = Path(folder), keep, asynchronous
        self.failure: Failure | None = None
        """Of the newest save; None where it succeeded or is still under way."""
        self.newest: Path | None = None
        """The newest checkpoint that this run completed."""
        self._event, self._copier = event, copier if self._ranks.rank == 0 else None
        self._arena: Arena | None = None
        self._signature: list[tuple[Any, ...]] = []
        self._job: Future[None] | None = None
        refusal = self._prepare_folder() if self._ranks.rank == 0 else None
        # a name unlike any earlier start's, whose last processes may still be writing
        refusal, self._start = self._ranks.from_first((refusal, os.urandom(4).hex()))
        if refusal:
            raise UserError(refusal)

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Plan, and get the host memory, behind the first steps; else the first `save` does so while a step waits.

        Only names, shapes and placements count; no value is read.
        """
        self._job = _behind(self._plan, tensors)

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, best: bool = False) -> None:
        """Save the state after ``step`` (completed updates). The tensors may change as soon as this returns.

        Args:
            tensors: global name -> plain tensor or DTensor; a name may stand on several ranks with the same values.
            facts: everything else, as JSON; rank 0's count.
            best: mark it as the best so far, which stays beside the newest ones.

        Raises:
            ValueError: on every rank, where the ranks' pieces of a tensor do not fit together.
        """
        started = time.monotonic()
        if self._job is not None and not self._job.done():
            self.wait()
            self._tell("checkpoint_waited", step=step, seconds=_since(started))
        self._plan(tensors)
        assert self._arena is not None
        failure, content = None, b""
        try:
            self._arena.fill(tensors)
            content = json.dumps({**facts, "step": step}, indent=1, allow_nan=False).encode()
        except Exception as error:  # whatever it is, the other ranks wait for this one's word
            failure = self._fault(error)
        self._job = _behind(self._finish, step, content, failure, best, (started, _since(started)))
        if not self.asynchronous:
            self.wait()
            self._finish_copies()

    def wait(self) -> None:
        """Return when the newest save has succeeded or failed; ``failure`` says which."""
        if self._job is not None:
            self._job.result()

    def close(self, *, patience_seconds: float | None = None) -> None:
        """Wait for the newest save and its copy; at most so long, where another rank may never answer again."""
        if self._job is not None:
            with suppress(Exception):  # a plan that failed is told by `save`, which nobody called
                self._job.result(patience_seconds)
        self._finish_copies(patience_seconds)

    def _finish_copies(self, patience_seconds: float | None = None) -> None:
        if self._copier is not None:
            self._copier.wait(patience_seconds)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _prepare_folder(self) -> str | None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if removed := clean(self.folder):
                self._tell("checkpoint_cleaned", paths=[str(path) for path in removed])
            probe = self.folder / f"{PARTIAL}probe"
            write_durably(probe, b"")
            discard(probe)
        except OSError as error:
            return f"the checkpoints folder {self.folder} cannot be written: {error.strerror}"
        return None

    def _plan(self, tensors: Mapping[str, Tensor]) -> None:
        """Divide the tensors among the ranks; once, as long as no rank's tensors change their names or shapes."""
        new = signature(tensors)
        if not any(self._ranks.gather(new != self._signature)):
            return
        pieces = plan_pieces(tensors, group=self._ranks.group)
        self._arena = None  # gives its memory back before the next is made
        self._arena = Arena(lay_out(pieces, rank=self._ranks.rank))
        self._signature = new

    def _finish(self, step: int, facts: bytes, failure: Failure | None, best: bool, clock: tuple[float, float]) -> None:
        """Behind the training: write, agree, publish. Every rank reaches both messages, whatever happened to it."""
        partial = self.folder / f"{PARTIAL}{step:08d}-{self._start}"
        try:
            reports = self._ranks.to_first(failure or self._write(partial))
            outcome = self._publish(partial, step, facts, reports, best=best) if reports is not None else None
            outcome = self._ranks.from_first(outcome)
        except Exception as error:  # another rank is gone; the training finds that out by itself
            outcome = self._fault(error)
        if isinstance(outcome, Failure):
            self.failure = outcome
            newest = str(self.newest) if self.newest else None
            self._tell("checkpoint_failed", step=step, rank=outcome.rank, cause=outcome.cause, newest=newest)
            return
        self.failure, self.newest = None, outcome.path
        started, blocked = clock
        times = {"seconds": _since(started), "blocked_seconds": blocked}
        self._tell("checkpoint", step=step, path=str(outcome.path), bytes=outcome.bytes, **times)
        if self._copier is not None:
            self._copier.add(outcome.path)
        self._retain(step)

    def _write(self, partial: Path) -> Written | Failure:
        assert self._arena is not None
        try:
            partial.mkdir(exist_ok=True)
            return self._arena.write(partial)
        except Exception as error:
            return self._fault(error)

    def _publish(
        self, partial: Path, step: int, facts: bytes, reports: list[Written | Failure], *, best: bool
    ) -> Saved | Failure:
        """On rank 0, when every rank has written or given up."""
        failures = [report for report in reports if isinstance(report, Failure)]
        written = [report for report in reports if isinstance(report, Written)]
        try:
            if failures:
                raise OSError("some ranks wrote nothing")
            files = dict(chain.from_iterable(report.files.items() for report in written))
            files[TENSORS] = write_json(partial / TENSORS, encode_table(_table(written)))
            files[FACTS] = write_json(partial / FACTS, facts)
            path = publish(partial, self.folder, step=step, files=files, best=best)
        except Exception as error:
            discard(partial)
            return failures[0] if failures else self._fault(error)
        return Saved(path, sum(record.size for record in files.values()))

    def _retain(self, step: int) -> None:
        if self._ranks.rank > 0:
            return
        try:
            in_use = self._copier.in_use if self._copier else ()
            retain(self.folder, keep=self.keep, newest=step, in_use=in_use)
        except OSError as error:  # the new checkpoint is good; only the old ones take space
            self._tell("checkpoint_not_removed", step=step, cause=self._fault(error).cause)

    def _fault(self, error: Exception) -> Failure:
        cause = str(error)
        if isinstance(error, OSError) and error.filename:
            cause = f"{Path(error.filename).name}: {error.strerror}"
        return Failure(self._ranks.rank, cause or type(error).__name__)

    def _tell(self, kind: str, **fields: Any) -> None:
        if self._event and self._ranks.rank == 0:
            self._event(kind, **fields)


def newest(folder: Path, *, event: Event | None = None) -> Path | None:
    """The newest checkpoint of which every byte is right; all ranks call it together and divide the reading.

    One that is not right is renamed to ``step-....refused`` by rank 0 and told by the event ``checkpoint_refused``
    (path, faults, moved_to), and the one before it is tried. None where there never was one.

    Raises:
        UserError: on every rank, where some rank does not see the folder that rank 0 sees, or where all that is left
            are refused checkpoints: to begin anew is then for the user to say.
    """
    ranks = Ranks()
    for path in ranks.from_first(list(steps(folder).values())):
        if blind := [rank for rank, seen in enumerate(ranks.gather(path.exists())) if not seen]:
            raise UserError(f"rank {blind[0]} does not see {path}; a run's folder must be shared by all nodes")
        faults = inspection.verify(path, share=slice(ranks.rank, None, ranks.size))
        all_faults = sorted(set(chain.from_iterable(ranks.gather(faults))))
        if not all_faults:
            return path
        if ranks.rank == 0:
            moved = str(set_aside(path))
            if event:
                event("checkpoint_refused", path=str(path), faults=all_faults, moved_to=moved)
    if broken := ranks.from_first(refused(folder)):
        remedy = "put a sound copy in its place under its old name, or begin anew with --fresh"
        raise CheckpointError(f"no checkpoint in {folder} is whole any more ({', '.join(broken)}); {remedy}")
    return None


def load(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fill this rank's ``tensors`` in place from the checkpoint at ``path``, whatever mesh it was saved on.

    All ranks call it together; contents are those that `newest` or `inspection.verify` checked.

    Args:
        tensors: global name -> plain tensor or DTensor of any placement, all names of this rank.

    Returns:
        The facts given to `Checkpointer.save`.

    Raises:
        CheckpointError: on every rank, where the path is no whole checkpoint, or a name is missing in it, too much in
            it, or of another shape or dtype.
    """
    ranks = Ranks()
    table: dict[str, TensorRecord] = {}
    facts: dict[str, Any] = {}
    faults: list[str] = []
    try:
        manifest = read_manifest(path)
        table, facts = read_table(path, manifest), read_facts(path, manifest)
        faults = faults_of(tensors, table)
    except CheckpointError as error:
        faults = [str(error)]
    known = set(chain.from_iterable(ranks.gather(list(tensors))))
    if extra := sorted(table.keys() - known):
        faults.append(f"{extra[0]} stands in the checkpoint and not in this run ({len(extra)} such names)")
    _agree(ranks, path, faults)
    try:
        read_tensors(path, table, tensors)
    except CheckpointError as error:
        faults = [str(error)]
    _agree(ranks, path, faults)
    return facts


def _agree(ranks: Ranks, path: Path, faults: list[str]) -> None:
    """Raise on every rank what any rank found."""
    found = list(dict.fromkeys(chain.from_iterable(ranks.gather(faults))))
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        words = "; ".join(fault.removeprefix(str(path)).lstrip(": ") for fault in found[:_SHOWN])
        raise CheckpointError(f"{path} cannot be loaded: {words}{more}")


def _table(written: list[Written]) -> dict[str, TensorRecord]:
    table: dict[str, TensorRecord] = {}
    for name, dtype, shape, chunk in chain.from_iterable(report.pieces for report in written):
        before = table[name].chunks if name in table else ()
        table[name] = TensorRecord(dtype, shape, (*before, chunk))
    return table


def _behind(call: Callable[..., None], *args: Any) -> Future[None]:
    """Run ``call`` on a thread that does not keep the process alive: it may be waiting for a rank that is gone."""
    job: Future[None] = Future()

    def work() -> None:
        try:
            call(*args)
            job.set_result(None)
        except BaseException as error:
            job.set_exception(error)

    Thread(target=work, name="checkpoint", daemon=True).start()
    return job


def _since(started: float) -> float:
    return round(time.monotonic() - started, 6)
