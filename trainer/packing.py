"""Which examples stand in which sequence: whole ones, best fit, the same on every rank. Imports no torch.

Text may be cut anywhere and is not packed here (`data`). An entry of the cache holds `bounds.bin`, `first.bin` and
`stop.bin`.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cuboid.parallel.errors import FieldError
from cuboid.trainer.cache import Facts, cached, mapped
from cuboid.trainer.tokens import Tokens

_METHOD = "best-fit-1"


@dataclass(frozen=True)
class Packs:
    """Examples of each sequence, int64 and memory-mapped; an example is what truncation has left of it."""

    bounds: np.ndarray
    """[sequences + 1]; sequence s holds the examples bounds[s] to bounds[s + 1] - 1."""
    first: np.ndarray
    """[examples]; the token with which each begins."""
    stop: np.ndarray
    """[examples]; the token after its last."""
    truncated: int
    """Examples or pairs that were cut."""
    dropped: int
    """Examples or pairs that are left out: too long, or the cut left nothing to predict."""
    paired: bool = False
    """Whether examples are the answers of pairs, which stay side by side: the chosen one, then the rejected."""

    def words(self) -> str:
        """What truncation did, in a line; empty where every example is whole."""
        parts = [f"cut to the length of a sequence: {self.truncated}"] if self.truncated else []
        return ", ".join(parts + ([f"dropped as too long: {self.dropped}"] if self.dropped else []))


def pack(
    tokens: Tokens, *, sequence_length: int, truncation: str, packing: bool, cache: Path, paired: bool = False
) -> Packs:
    """The examples of ``tokens`` in sequences of at most ``sequence_length`` tokens: computed once, then mapped.

    Args:
        truncation: what is done with longer ones: their `end` or their `start` is cut off, or `drop`.
        packing: several examples in a sequence, as many as fit; else one.
        paired: two documents are a pair, and it is pairs that fit, are cut, and stand alone.

    Raises:
        FieldError: no example is left.
    """
    kind = ["pairs"] if paired else []
    identity = json.dumps([_METHOD, tokens.sha256, sequence_length, truncation, packing, *kind])
    entry = Path(cache) / "packs" / hashlib.sha256(identity.encode()).hexdigest()[:32]

    def write(folder: Path) -> Facts:
        cut, each = (_cut_pairs, 2) if paired else (_cut, 1)
        first, stop, truncated = cut(tokens, sequence_length, truncation)
        dropped = (len(tokens.starts) - 1 - len(first)) // each
        if not len(first):
            what = "pair" if paired else "example"
            constraint = f"leaves no {what} with a token to predict: all {dropped} are dropped or cut before one"
            raise FieldError("data.sequence_length", sequence_length, constraint, "use more, or data.truncation=start")
        lengths = (stop - first).reshape(-1, each).sum(1)
        place = np.repeat(best_fit(lengths, sequence_length) if packing else np.arange(len(lengths)), each)
        order = np.argsort(place, kind="stable")
        bounds = np.searchsorted(place[order], np.arange(place.max() + 2))
        arrays = {"bounds.bin": bounds, "first.bin": first[order], "stop.bin": stop[order]}
        for name, array in arrays.items():
            array.astype(np.int64).tofile(folder / name)
        sizes = {name: 8 * len(array) for name, array in arrays.items()}
        return {"truncated": truncated, "dropped": dropped, "bytes": sizes}

    facts = cached(entry, write)
    bounds, first, stop = (mapped(entry / name, np.int64) for name in ("bounds.bin", "first.bin", "stop.bin"))
    return Packs(bounds, first, stop, facts["truncated"], facts["dropped"], paired)


def _cut(tokens: Tokens, length: int, truncation: str) -> tuple[np.ndarray, np.ndarray, int]:
    """(first, stop) of the examples that are kept, and how many of them were cut."""
    assert tokens.predicted is not None
    first, stop = tokens.starts[:-1].copy(), tokens.starts[1:].copy()
    long = stop - first > length
    if truncation == "end":
        stop[long] = first[long] + length
    elif truncation == "start":
        first[long] = stop[long] - length
    kept = ~long if truncation == "drop" else np.ones_like(long)
    # the first token follows none that could predict it; whole examples predict one, or they would not be here
    for number in np.flatnonzero(long & kept):
        kept[number] = tokens.predicted[first[number] + 1 : stop[number]].any()
    return first[kept], stop[kept], int((long & kept).sum())


def _cut_pairs(tokens: Tokens, length: int, truncation: str) -> tuple[np.ndarray, np.ndarray, int]:
    """As `_cut`, of pairs that are longer together. At the start as many tokens are cut off both answers, so that what
    is left of their prompt is the same; at the end off the longer one, until both are as long."""
    assert tokens.predicted is not None
    first, stop = tokens.starts[:-1].reshape(-1, 2).copy(), tokens.starts[1:].reshape(-1, 2).copy()
    sizes = stop - first
    long = sizes.sum(1) > length
    if truncation == "end":
        stop[long] = (first + np.minimum(sizes, np.maximum(length - sizes.min(1), length // 2)[:, None]))[long]
    elif truncation == "start":
        first[long] += -(-(sizes.sum(1) - length) // 2)[long, None]
    kept = ~long if truncation == "drop" else np.ones_like(long)
    for number in np.flatnonzero(long & kept):
        both = zip(first[number], stop[number], strict=True)
        kept[number] = all(tokens.predicted[start + 1 : end].any() for start, end in both)
    return first[kept].ravel(), stop[kept].ravel(), int((long & kept).sum())


def best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """The sequence of each example: the longest first, each into the fullest that still takes it, else into a new one.

    Best-fit decreasing, at most 11/9 of the fewest sequences and a few (Johnson, Near-optimal bin packing algorithms,
    1973); for training data without cuts: Ding et al., Fewer Truncations Improve Language Modeling, 2024, section 3.
    """
    place = np.empty(len(lengths), np.int64)
    open_by_rest: defaultdict[int, list[int]] = defaultdict(list)
    rests: list[int] = []  # sorted: the free tokens that some open sequence has
    count = 0
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        found = bisect_left(rests, length)
        if found == len(rests):
            sequence, rest = count, room - length
            count += 1
        else:
            rest = rests[found]
            sequence = open_by_rest[rest].pop()
            if not open_by_rest[rest]:
                del rests[found]
            rest -= length
        place[number] = sequence
        if rest:
            if not open_by_rest[rest]:
                insort(rests, rest)
            open_by_rest[rest].append(sequence)
    return place
