"""What a rank is doing, in one line of a file that others can read while it hangs. Imports no torch.

The line is written in place and not through a memory map: where the disk is full, a store into a map kills the process
(SIGBUS), while a write that fails is passed over.
"""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

FOLDER = "watch"
"""Within a run's folder; rank 3 writes ``rank-3.json`` there."""
_LINE_BYTES = 384

PHASES = ("start", "batch", "step", "record", "evaluation", "save", "end")
"""Of a run and, from ``batch`` to ``save``, of each of its steps, in their order."""
PATIENT = frozenset({"start", "save", "end"})
"""Phases in which all ranks together may take any time in one piece: reading data and weights, writing a checkpoint."""
ACTIONS = {
    "F": "forward",
    "B": "backward",
    "I": "input gradient",
    "W": "weight gradient",
    "R": "gradient reduction",
}


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """What a rank said last of itself."""

    machine: str
    """As `machine` tells it."""
    pid: int
    count: int = 0
    """Grows with each change: a rank whose count stands still has not moved."""
    step: int = 0
    phase: str = "start"
    """One of `PHASES`."""
    doing: str = ""
    """A kind of `ACTIONS`, or in words; empty where the phase says it all."""
    stage: int = -1
    microbatch: int = -1
    over: bool = False
    """The action is over and the next one has not begun: messages of the pipeline travel."""
    evaluating: bool = False
    """The action is one of a pass without backward: of an evaluation, a teacher, a reference."""

    @property
    def place(self) -> str:
        """``in the forward of microbatch 3 on stage 1``, ``after`` it, ``in the gradient sum``, ``in the save``."""
        if self.doing not in ACTIONS:
            return f"in the {self.doing or self.phase}"
        of = f" of microbatch {self.microbatch}" if self.microbatch >= 0 else ""
        evaluating = " (evaluating)" if self.evaluating else ""
        return f"{'after' if self.over else 'in'} the {ACTIONS[self.doing]}{of} on stage {self.stage}{evaluating}"


class Whereabouts:
    """Tells what this rank does, at each change: a few microseconds. Without a path it tells nobody."""

    def __init__(self, path: Path | None = None) -> None:
        self._machine, self._pid = machine(), os.getpid()
        self._count, self._step, self._phase = 0, 0, "start"
        self._file: int | None = None
        if path is not None:
            with suppress(OSError):  # as all that is told of a run: never a reason to stop it
                path.parent.mkdir(exist_ok=True)
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.at("")

    def begin(self, phase: str, step: int | None = None) -> None:
        """Another phase of the same step, or of the one of this number."""
        self._phase = phase
        if step is not None:
            self._step = step
        self.at("")

    def at(
        self, doing: str, stage: int = -1, microbatch: int = -1, *, over: bool = False, evaluating: bool = False
    ) -> None:
        """Another part of the phase."""
        if self._file is None:
            return
        self._count += 1
        # written out: json.dumps takes several times as long, and no word of these needs an escape
        line = (
            f'{{"machine": "{self._machine}", "pid": {self._pid}, "count": {self._count}, "step": {self._step}, '
            f'"phase": "{self._phase}", "doing": "{doing}", "stage": {stage}, "microbatch": {microbatch}, '
            f'"over": {str(over).lower()}, "evaluating": {str(evaluating).lower()}}}'
        )
        with suppress(OSError):
            os.pwrite(self._file, line.ljust(_LINE_BYTES - 1).encode() + b"\n", 0)

    def close(self) -> None:
        """Tell that this rank ends, and no more."""
        self.begin("end")
        if self._file is not None:
            os.close(self._file)
            self._file = None


def machine() -> str:
    """Within which a process number means one process: the boot, and the container's numbers of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def path_of(folder: Path, rank: int) -> Path:
    """The file of a rank of the run in ``folder``."""
    return folder / FOLDER / f"rank-{rank}.json"


def sighting_of(folder: Path, rank: int) -> Sighting | None:
    """None where the rank has not begun, or is writing just now."""
    try:
        return Sighting(**json.loads(path_of(folder, rank).read_text()))
    except (OSError, ValueError, TypeError):
        return None
