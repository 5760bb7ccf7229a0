"""Who waits for whom when no rank moves: told from what each said of itself last, its stack, and the schedule's order.
Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cuboid.parallel.errors import one_of
from cuboid.parallel.layout import Layout
from cuboid.parallel.schedules import Action
from cuboid.parallel.whereabouts import ACTIONS, PHASES, Sighting

_WAITING_FILES = r"distributed_c10d|_functional_collectives|pipelining/schedules|fsdp/_fully_shard/\w+"
_WAITING = re.compile(rf'File ".*/torch/distributed/(?:{_WAITING_FILES})\.py", line \d+ in (\w+)')
_INNERMOST = 3
"""Frames in which a wait shows: the library's own, beneath it a decorator or an operator."""
_PARTS = ("", "count of tokens", "action", "gradient sum", "gradient norm", "update")
"""Of a step, in their order."""
_COARSE = 3
"""Numbers of a rank's progress that can be compared with those of any other rank; all, within a stage."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A rank of a hang, as its watcher finds it."""

    rank: int
    seen: Sighting
    state: str = ""
    """Of its process, as /proc tells it; empty on another machine."""
    stack: str = ""
    """Of its main thread, a line a call, innermost first; empty where it gave none."""

    @property
    def is_mute(self) -> bool:
        """It is here and answers nothing: stopped, or held in the kernel."""
        return bool(self.state) and not self.stack

    @property
    def call(self) -> str | None:
        """The call in which it waits for other ranks, by its stack."""
        innermost = "\n".join(self.stack.splitlines()[:_INNERMOST])
        match = _WAITING.search(innermost)
        return match[1].strip("_") if match else None

    @property
    def why(self) -> str:
        """What its process tells beside."""
        if self.state == "T":
            return "stopped by a signal"
        return f"its process is in state {self.state} and answers nothing" if self.is_mute else ""


class Waits:
    """The ranks of one hang, all of them.

    Args:
        found: every rank, by its number.
        order: of each pipeline rank (`schedules.order`).
    """

    def __init__(self, found: Mapping[int, Found], layout: Layout, order: Sequence[Sequence[Action]]) -> None:
        self._found, self._layout = found, layout
        self._order = {False: order, True: [[action for action in own if action.kind == "F"] for own in order]}
        """By whether there is no backward."""
        self.hung = self._hung()
        """The ranks that keep the others waiting; several where it cannot be told which."""

    def _hung(self) -> list[int]:
        mute = [found.rank for found in self._found.values() if found.is_mute]
        if mute:
            return mute
        at_work = [found.rank for found in self._found.values() if found.stack and not found.call]
        if 0 < len(at_work) < len(self._found):
            return at_work
        free = [rank for rank in self._found if not self.awaited(rank, hung=())[1]]
        return free or list(self._found)

    def awaited(self, rank: int, *, hung: Sequence[int] | None = None) -> tuple[str, list[int]]:
        """In which call a rank waits, and for which other ranks: none where it waits for nobody."""
        found, hung = self._found[rank], self.hung if hung is None else hung
        seen = found.seen
        if seen.doing in ACTIONS and seen.over and (message := self._message(found)):
            return message
        others, own_progress = [other for other in self._found if other != rank], self._progress(rank)[:_COARSE]
        if seen.doing in ACTIONS and not seen.over:  # meets the ranks of its tensor and of its data axis
            own = self._layout.coordinate(rank)
            places = {other: self._layout.coordinate(other) for other in others}
            others = [r for r, c in places.items() if c.pipeline == own.pipeline and own[1:] != c[1:]]
            others = [r for r in others if own.data == places[r].data or own.tensor == places[r].tensor]
            own_progress = self._progress(rank)
        behind = [other for other in others if self._progress(other)[: len(own_progress)] < own_progress]
        return found.call or "a collective", behind or [other for other in others if other in hung]

    @property
    def ranks(self) -> list[int]:
        """All, those that hang first."""
        return [*self.hung, *(rank for rank in self._found if rank not in self.hung)]

    def line(self, rank: int) -> str:
        """``rank 5 waits in recv for rank 3``, ``rank 3 hangs in the save``."""
        found = self._found[rank]
        if rank in self.hung:
            return f"rank {rank} hangs {found.seen.place}{f', {found.why}' if found.why else ''}"
        call, awaited = self.awaited(rank)
        return f"rank {rank} waits in {call} {f'for rank {one_of(awaited)}' if awaited else 'for it is not known whom'}"

    def lines(self) -> list[str]:
        """A sentence for each rank, and where the one is that it waits for."""
        told = []
        for rank in self.ranks:
            awaited = [] if rank in self.hung else self.awaited(rank)[1]
            which = f", which is {self._found[awaited[0]].seen.place}" if len(awaited) == 1 else ""
            told.append(f"{self.line(rank)}{which}")
        return told

    def _message(self, found: Found) -> tuple[str, list[int]] | None:
        """Of a rank between two actions: the neighbour whose message it needs next, or that has not taken its own."""
        seen, place = found.seen, self._layout.coordinate(found.rank)
        order = self._order[seen.evaluating]
        own = order[place.pipeline]
        now = _index(own, seen)
        if now is None:
            return None
        source = _source(own[now + 1], order) if now + 1 < len(own) else None
        taker = _taker(own[now], order)
        for call, action in (("recv", source), ("send", taker)):
            if action is None or action[0] == place.pipeline:
                continue
            peer = self._layout.rank(place._replace(pipeline=action[0]))
            if self._has_not_done(peer, action[1], seen):
                return call, [peer]
        return None

    def _has_not_done(self, peer: int, index: int, seen: Sighting) -> bool:
        """Whether a rank has yet to end the action at ``index`` of its order, in the pass of ``seen``."""
        other = self._found[peer].seen
        if (other.step, other.phase, other.evaluating) != (seen.step, seen.phase, seen.evaluating):
            return (other.step, PHASES.index(other.phase)) <= (seen.step, PHASES.index(seen.phase))
        at = _index(self._order[seen.evaluating][self._layout.coordinate(peer).pipeline], other)
        if at is None:
            return _PARTS.index(_part(other)) < _PARTS.index("action")
        return at < index or (at == index and not other.over)

    def _progress(self, rank: int) -> tuple[int, ...]:
        """Larger is farther: step, phase, part of it; of an action also how many came before it."""
        seen = self._found[rank].seen
        coarse = (seen.step, PHASES.index(seen.phase), _PARTS.index(_part(seen)))
        if seen.doing not in ACTIONS:
            return coarse
        own = self._order[seen.evaluating][self._layout.coordinate(rank).pipeline]
        return (*coarse, int(not seen.evaluating), _index(own, seen) or 0, int(seen.over))


def _part(seen: Sighting) -> str:
    if seen.doing in ACTIONS:
        return "action"
    return seen.doing if seen.doing in _PARTS else ""


def _index(own: Sequence[Action], seen: Sighting) -> int | None:
    wanted = (seen.doing, seen.stage, seen.microbatch)
    return next((i for i, a in enumerate(own) if (a.kind, a.stage, a.microbatch) == wanted), None)


def _source(action: Action, order: Sequence[Sequence[Action]]) -> tuple[int, int] | None:
    """(pipeline rank, index in its order) of the action whose result this one needs; None where it needs none."""
    step = {"F": -1, "B": 1, "I": 1}.get(action.kind)
    return None if step is None else _find(action, step, order)


def _taker(action: Action, order: Sequence[Sequence[Action]]) -> tuple[int, int] | None:
    """The same of the action that needs this one's result."""
    step = {"F": 1, "B": -1, "I": -1}.get(action.kind)
    return None if step is None else _find(action, step, order)


def _find(action: Action, step: int, order: Sequence[Sequence[Action]]) -> tuple[int, int] | None:
    kinds = "F" if action.kind == "F" else "BI"
    for rank, own in enumerate(order):
        for index, other in enumerate(own):
            if other.kind in kinds and (other.stage, other.microbatch) == (action.stage + step, action.microbatch):
                return rank, index
    return None
