"""What ended a rank, whose failure came first, and whether the group starts again. Imports no torch.

A failing rank writes its traceback to ``errors/rank-N.txt`` and one ``rank_error`` event; a rank that dies without a
word is seen by its launcher. From both, `Judge` finds the cause and decides.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cuboid.parallel.errors import RunFailed, UserError, one_of
from cuboid.trainer.manifest import steps
from cuboid.trainer.runlog import STOP_FILE, RunLog, read_events, read_metrics, redact

Kind = Literal["user", "run", "error"]

EXIT_CODES: dict[Kind, int] = {"user": 2, "run": 1, "error": 70}
"""How a rank's process ends: the user's mistake, a run that cannot go on, or what another attempt may not meet
(EX_SOFTWARE of sysexits.h)."""

STOPPED = {"interrupt": 130, "signal": 85}
"""Exit codes of a run that was asked to stop, by what the stop file says."""

RESIZE = "resize"
"""In the stop file: the ranks save and end, to begin again as another number of data ranks."""

STALE_FAILURES = 3
"""Failures without a newer checkpoint after which a run is given up: it would only fail there again."""

# What a healthy rank meets when another one has died: no cause, only its echo.
_ECHOES = re.compile(
    r"gloo|nccl|tcpstore|socket|connection (was )?(closed|reset|refused|aborted)|broken pipe|timed out",
    re.IGNORECASE,
)
_ECHO_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError", "DistError"}
_PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a run ended: the command's exit code and its last words, empty where all is well."""

    code: int
    words: str = ""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One rank's end."""

    rank: int
    cause: str
    """An error in one line; of a rank that died silently a verb: ``was killed by SIGKILL``."""
    kind: Kind = "error"
    echo: bool = False
    """Only the sound of another rank's death."""
    silent: bool = False
    """The rank wrote nothing down; its launcher saw it go."""
    time: float = 0.0
    details: str | None = None
    """The file with the traceback, within the run's folder."""

    def told(self, step: int) -> str:
        if self.kind == "run" and self.cause.startswith("step "):  # it tells its step itself
            return self.cause
        where = f"in step {step}" if step else "before the first step"
        if self.silent:
            return f"rank {self.rank} {self.cause} {where}"
        return f"rank {self.rank} failed {where}: {self.cause}"


def record(folder: Path, rank: int, error: BaseException) -> int:
    """Write down why this rank ends; returns the exit code of its process."""
    kind, echo, cause = explain(error)
    details = Path("errors") / f"rank-{rank}.txt"
    try:
        (folder / details).parent.mkdir(exist_ok=True)
        (folder / details).write_text(redact("".join(traceback.format_exception(error))))
    except OSError as unwritable:
        cause += f" (its traceback could not be written: {unwritable.strerror})"
    RunLog(folder).event("rank_error", rank=rank, error=kind, echo=echo, cause=cause, details=str(details))
    return EXIT_CODES[kind]


def record_silent(folder: Path, failure: Failure) -> None:
    """For a rank that cannot write down why it ends: one that hangs."""
    about = {"rank": failure.rank, "error": failure.kind, "cause": failure.cause, "details": failure.details}
    RunLog(folder).event("rank_error", **about, echo=False, silent=True)


def explain(error: BaseException) -> tuple[Kind, bool, str]:
    """(kind, whether it is only an echo of another rank's end, the cause in one line)."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, UserError):
            return "user", False, str(link)
        if isinstance(link, RunFailed):
            return "run", False, str(link)
    # The innermost is where it began; an echo met while cleaning up stands outside of it.
    echo = _is_echo(chain[-1])
    shown = chain[-1] if echo else next(link for link in chain if not _is_echo(link) and not _is_wrapper(link))
    first_line = next((line.strip() for line in str(shown).splitlines() if line.strip()), "")
    first_line = re.sub(r"^\[\S+\.\w+:\d+\] ", "", first_line)  # gloo and c10d begin with their own source file
    return "error", echo, f"{type(shown).__name__}: {first_line[:300]}" if first_line else type(shown).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, outermost first."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _is_wrapper(error: BaseException) -> bool:
    """Torch's pipeline: ``[Stage 1] failed to run forward: args: ...`` around what a stage raised."""
    return error.__cause__ is not None and "] failed to run " in str(error)


def _is_echo(error: BaseException) -> bool:
    if _PORT_TAKEN.search(str(error)):
        return False
    if type(error).__name__ in _ECHO_TYPES or isinstance(error, ConnectionError):
        return True
    return isinstance(error, RuntimeError) and bool(_ECHOES.search(str(error)))


class Judge:
    """Decides after each failure of the group whether it starts again; counts over one launch."""

    def __init__(self, folder: Path, *, max_failures: int, world_size: int) -> None:
        self._folder, self._max_failures = folder, max_failures
        self.world_size = world_size
        self._log = RunLog(folder)
        self._seen_events = len(read_events(folder))
        self._newest = newest_step(folder)
        self._failures = self._stale = 0

    def recorded(self) -> list[Failure]:
        """What ranks wrote down since the last verdict."""
        events = read_events(self._folder)[self._seen_events :]
        return [
            Failure(
                rank=event["rank"],
                cause=event["cause"],
                kind=event["error"],
                echo=event["echo"],
                time=event["time"],
                details=event["details"],
                silent=event.get("silent", False),
            )
            for event in events
            if event["kind"] == "rank_error"
        ]

    def verdict(self, silent: Sequence[Failure]) -> Ending | None:
        """None: start the group again; otherwise how the run ends.

        Args:
            silent: ranks that died without writing down why, as their launcher saw it.
        """
        recorded = self.recorded()
        known = {failure.rank for failure in recorded}
        found = [*recorded, *(failure for failure in silent if failure.rank not in known)]
        assert found, "a verdict without a failure"
        cause = root_cause(found)
        if cause.echo:
            # None knows more than that another one is not there; it may be one that has not spoken, a stopped process.
            mute = sorted(set(range(self.world_size)) - {failure.rank for failure in found})
            cause = replace(cause, cause=f"{cause.cause} (no word from rank {one_of(mute)})") if mute else cause
        self._failures += 1
        newest = newest_step(self._folder)
        self._stale = 1 if newest > self._newest else self._stale + 1
        self._newest = newest
        step = step_in_work(self._folder)
        ending = self._decide(cause, step)
        self._log.event(
            "failure",
            rank=cause.rank,
            step=step,
            cause=cause.cause,
            details=cause.details,
            failures=self._failures,
            restart=ending is None,
            words=ending.words if ending else self._restart_words(cause, step),
        )
        self._seen_events = len(read_events(self._folder))
        return ending

    def _decide(self, cause: Failure, step: int) -> Ending | None:
        line = cause.told(step) + self._where(cause)
        if cause.kind == "user":
            return Ending(code=2, words=cause.cause)
        if cause.kind == "run":
            return Ending(code=1, words=line)
        reason = stop_reason(self._folder)
        if reason in STOPPED:
            saved = self._newest
            newest = f"with step {saved} as the newest checkpoint" if saved >= 0 else "before any checkpoint"
            return Ending(code=STOPPED[reason], words=f"stopped {newest}, because {line}")
        if self._failures > self._max_failures:
            limit = f"launch.max_failures={self._max_failures}"
            return Ending(code=1, words=f"given up after {_times(self._failures, 'failure')} ({limit}): {line}")
        if self._stale >= STALE_FAILURES:
            return Ending(code=1, words=f"given up after {STALE_FAILURES} failures without a newer checkpoint: {line}")
        return None

    def _restart_words(self, cause: Failure, step: int) -> str:
        return f"{cause.told(step)}; starting again (failure {self._failures} of at most {self._max_failures})"

    def _where(self, cause: Failure) -> str:
        for name in (cause.details, f"logs/rank-{cause.rank}.txt"):
            if name and (self._folder / name).exists():
                return f" ({shown(self._folder / name)})"
        return ""


def root_cause(failures: Sequence[Failure]) -> Failure:
    """The earliest failure that is not an echo; where all are, the earliest."""
    return min(failures, key=lambda failure: (failure.echo, failure.time, failure.rank))


def newest_step(folder: Path) -> int:
    """Step of the newest finished checkpoint (its folder gets its name only when whole); -1 where there is none."""
    return max(steps(folder / "checkpoints"), default=-1)


def step_in_work(folder: Path) -> int:
    """The step after the last one in metrics.jsonl; 0 where there is none yet."""
    steps = [record["step"] for record in read_metrics(folder)[-1:] if isinstance(record.get("step"), int)]
    return steps[0] + 1 if steps else 0


def stop_reason(folder: Path) -> str | None:
    """Why the run was asked to stop, if it was."""
    try:
        reason = (folder / STOP_FILE).read_text().strip()
    except OSError:
        return None
    return reason if reason in (*STOPPED, RESIZE) else "signal"


def shown(path: Path) -> str:
    """A path as a user likes to read it: relative where that is shorter."""
    try:
        relative = os.path.relpath(path)
    except FileNotFoundError:  # the working directory is gone
        return str(path)
    return str(path) if relative.startswith("..") else relative


def _times(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
