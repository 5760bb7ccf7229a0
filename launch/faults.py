"""Faults for drills: what they are, when each comes, and how a rank inflicts one on itself. Imports no torch.

A `Drill` is what the ranks run in place of the training loop: the same loop, disturbed before the steps that it names.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuboid.parallel.errors import UserError, one_of
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.runlog import RunLog, read_events

if TYPE_CHECKING:
    from cuboid.trainer.loop import Run

CLAIMS = "faults"
"""A folder within the run's: a file for each fault that has come."""
SLOW_STEPS = 10
"""So long a slow rank stays slow."""
_SLOWER = 6
"""Forwards that are added to each: with a backward of two forwards the whole takes three times as long."""
_MOST_DRAWN = 1000


def _signal(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _raise() -> None:
    raise ValueError("a fault of the drill")


ACTS: dict[str, Callable[[], None]] = {
    "kill": _signal(signal.SIGKILL),
    "segv": _signal(signal.SIGSEGV),
    "exit": lambda: os._exit(3),
    "raise": _raise,
    "stop": _signal(signal.SIGSTOP),
    "hang": lambda: ctypes.PyDLL(None).sleep(10**6),  # keeps the interpreter's lock
}
"""By kind; ``slow`` is no act of a moment."""
KINDS = (*ACTS, "slow")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault: in the forward of a microbatch of ``step``, or of the first step ``seconds`` after the run began."""

    kind: str
    rank: int
    microbatch: int
    step: int | None = None
    seconds: float | None = None


def parse(text: str, recipe: Recipe, *, seed: int, rate: float | None) -> tuple[Fault, ...]:
    """The faults of ``--faults``, what it leaves open drawn from ``seed``; with a ``rate`` (faults a minute) as many as
    a run may ever meet, at the moments of a Poisson process.

    Raises:
        UserError: naming what would work.
    """
    draw = random.Random(seed)
    asked = [_parsed(word.strip(), recipe, draw) for word in text.split(",")]
    if rate is None:
        return tuple(asked)
    faults, moment = [], 0.0
    for _ in range(_MOST_DRAWN):
        moment += draw.expovariate(rate / 60)
        word = draw.choice(text.split(",")).strip()
        faults.append(replace(_parsed(word, recipe, draw), step=None, seconds=moment))
    return tuple(faults)


def _parsed(word: str, recipe: Recipe, draw: random.Random) -> Fault:
    match = re.fullmatch(r"([a-z]+)(?:@(\d+)(?::(\d+))?)?", word)
    if match is None or match[1] not in KINDS:
        remedy = f"use {one_of(KINDS)}, with @RANK or @RANK:STEP where you want to choose these"
        raise UserError(f"--faults: {word or 'nothing'} is no fault; {remedy}")
    ranks, steps = recipe.layout.world_size, recipe.train.steps
    rank = draw.randrange(ranks) if match[2] is None else int(match[2])
    step = draw.randint(1, steps) if match[3] is None else int(match[3])
    if rank >= ranks:
        raise UserError(f"--faults: {word} names rank {rank}; the recipe has ranks 0 to {ranks - 1}")
    if not 1 <= step <= steps:
        raise UserError(f"--faults: {word} names step {step}; the recipe has steps 1 to {steps}")
    return Fault(kind=match[1], rank=rank, step=step, microbatch=draw.randrange(recipe.parallel.microbatches))


@dataclass(frozen=True)
class Drill:
    """The training loop with faults; each comes once, however often its step is done."""

    faults: tuple[Fault, ...]

    def __call__(self, recipe: Recipe, folder: Path) -> str | None:
        from cuboid.trainer.loop import train

        return train(recipe, folder, before_step=self.disturb)

    def disturb(self, run: Run) -> None:
        """Before each step, on every rank: prepare the fault that is due on this one."""
        own = [(number, fault) for number, fault in enumerate(self.faults) if fault.rank == run.block.rank]
        if not own:
            return
        began = next((event["time"] for event in read_events(run.folder) if event["kind"] == "start"), time.time())
        for number, fault in own:
            is_due = fault.step == run.step + 1 if fault.seconds is None else time.time() - began >= fault.seconds
            if is_due and _claim(run.folder / CLAIMS / str(number)):
                _prepare(run, number, fault)
                return


def _claim(path: Path) -> bool:
    path.parent.mkdir(exist_ok=True)
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _prepare(run: Run, number: int, fault: Fault) -> None:
    """Have it happen in a forward of this rank's first stage."""
    stage, step = next(iter(run.engine.pipeline.modules.values())), run.step + 1

    def tell() -> None:
        about = {"number": number, "fault": fault.kind, "rank": fault.rank, "step": step}
        RunLog(run.folder).event("fault", **about, microbatch=fault.microbatch)

    if fault.kind == "slow":
        tell()
        _slow_down(stage, forwards=SLOW_STEPS * run.engine.pipeline.microbatches)
        return
    left = fault.microbatch

    def act(*_: Any) -> None:
        nonlocal left
        if left == 0:
            hook.remove()
            tell()
            ACTS[fault.kind]()
        left -= 1

    hook = stage.register_forward_pre_hook(act)


def _slow_down(stage: Any, *, forwards: int) -> None:
    """Every forward takes as much more of the processor as if its core were three times slower."""
    began, left = 0.0, forwards

    def begin(*_: Any) -> None:
        nonlocal began
        began = time.thread_time()

    def prolong(*_: Any) -> None:
        nonlocal left
        end = time.thread_time() + _SLOWER * (time.thread_time() - began)
        while time.thread_time() < end:
            pass
        left -= 1
        if left == 0:
            before.remove()
            after.remove()

    before, after = stage.register_forward_pre_hook(begin), stage.register_forward_hook(prolong)
