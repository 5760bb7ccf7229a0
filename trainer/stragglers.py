"""Ranks that compute clearly longer than those that do the same: told within ten steps.

With each step a rank tells how long one microbatch took it in the step before: the medians of its forwards and of
its backwards, added up. Waiting for another pipeline rank is no part of that, but waiting for tensor and data ranks
within an action is, so that on the wall clock these look alike where they meet in every layer; the processor time tells
them apart.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from cuboid.parallel.layout import Layout
from cuboid.parallel.pipeline import ActionTime

CLEARLY = 2.0
"""A rank is slow from this many times the median of its peers on."""
STEPS = 4
"""So many one after the other: a step alone is slow for many reasons."""


def microbatch_seconds(times: Sequence[ActionTime]) -> tuple[float, float]:
    """(wall, processor time) of one microbatch through this rank's stages; zeros before the first step."""
    by_kind: dict[tuple[int, str], list[ActionTime]] = {}
    for time in times:
        if time.kind != "R":
            by_kind.setdefault((time.stage, time.kind), []).append(time)
    groups = by_kind.values()
    wall = sum(statistics.median(time.seconds for time in group) for group in groups)
    return wall, sum(statistics.median(time.thread_seconds for time in group) for group in groups)


class Stragglers:
    """Judges by one clock, on rank 0.

    Peers are the ranks of the same stages, and those of all others where there are none.

    Args:
        meets: whether tensor ranks look alike on this clock: then those beside a rank are no peers of it.
    """

    def __init__(self, layout: Layout, *, meets: bool) -> None:
        places = [layout.coordinate(rank) for rank in range(layout.world_size)]
        self._peers: list[list[int]] = []
        for own in places:
            others = [r for r, c in enumerate(places) if c != own and not (meets and c[:2] == own[:2])]
            same = [rank for rank in others if places[rank].pipeline == own.pipeline]
            self._peers.append(same or others)
        self._streaks = Counter[int]()

    def judge(self, seconds: Sequence[float]) -> dict[int, float]:
        """Ranks that have been slow for `STEPS` steps just now, each with how many times as long it takes; ``seconds``
        has one number a rank."""
        found = {}
        for rank, peers in enumerate(self._peers):
            usual = statistics.median(seconds[peer] for peer in peers) if peers else 0.0
            is_slow = usual > 0 and seconds[rank] > CLEARLY * usual
            self._streaks[rank] = self._streaks[rank] + 1 if is_slow else 0
            if self._streaks[rank] == STEPS:
                found[rank] = seconds[rank] / usual
        return found
