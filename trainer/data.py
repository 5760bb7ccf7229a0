"""Tokens to samples: packing, labels, the order of an epoch; sample number -> content in constant time.

Shapes: n samples, T tokens of a sample (`sequence_length`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cuboid.parallel.errors import FieldError
from cuboid.parallel.loss import IGNORE
from cuboid.trainer.conversations import form_of
from cuboid.trainer.corpus import find_corpus
from cuboid.trainer.packing import Packs, pack
from cuboid.trainer.recipe import MIXTURE, DataSettings
from cuboid.trainer.tokenizer import Tokenizer
from cuboid.trainer.tokens import Tokens, prepare_tokens

_ORDER = "feistel-1"


@dataclass(frozen=True)
class Batch:
    """Samples for a step. int64, [n, T] each.

    Labels are shifted already: ``labels[i, t]`` is the token after ``input_ids[i, t]``, or -100 where none is
    predicted. Position ids start at 0 with each document inside a sample (unless `cross_documents`); attention follows
    from them.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same samples there."""
        return Batch(self.input_ids.to(device), self.labels.to(device), self.position_ids.to(device))

    def filled_up(self, rows: int) -> Batch:
        """[rows, T]: the same samples, and after them such as predict nothing, which add exact zeros to every sum."""
        missing, length = rows - len(self.labels), self.labels.shape[1]
        assert missing >= 0, f"{len(self.labels)} samples, where a step takes {rows}"
        fill = self.labels.new_zeros(missing, length)
        return Batch(
            torch.cat([self.input_ids, fill]),
            torch.cat([self.labels, fill + IGNORE]),
            torch.cat([self.position_ids, fill + torch.arange(length)]),
        )


class Counts(NamedTuple):
    """Tokens of an epoch."""

    tokens: int
    """Read, without what fills sequences up."""
    predicted: int


class Dataset:
    """Samples by number, without end: every epoch holds each sample once, in an order of its own.

    - packing: all documents one after another, cut every T tokens. Each token but a document's first is predicted once
      an epoch. The last sample is filled up; what fills has label -100.
    - without packing: a document a sample, cut or filled to T.
    - examples (chat and instruct) as `packs` lays them, several in a sample or one, each as truncation left it; so are
      pairs (preference), the chosen answer and then the rejected one.

    A call reads a few kilobytes of a memory map (under a millisecond for 16 x 128), so that no loader processes are
    needed. The order depends on the seed and the epoch only, never on the mesh. `fingerprint` is the SHA-256 of all
    that decides what a sample number holds: tokens, tokenizer, sequence settings and seed.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        sequence_length: int,
        packing: bool,
        cross_documents: bool,
        seed: int,
        tokenizer: Tokenizer,
        packs: Packs | None = None,
    ) -> None:
        self._ids, self._starts, self._predicted, self.packs = tokens.ids, tokens.starts, tokens.predicted, packs
        self.sequence_length, self._packing, self._cross, self._seed = sequence_length, packing, cross_documents, seed
        self._pad = tokenizer.pad
        self.num_documents = len(self._starts) - 1
        self.num_tokens = len(self._ids)
        # The very last token predicts nothing, so that a sample with it alone would be empty.
        packed = -(-(self.num_tokens - 1) // sequence_length)
        self.num_samples: int = packed if packing else self.num_documents
        facts = [
            tokens.sha256,
            tokenizer.identity,
            tokenizer.pad,
            sequence_length,
            packing,
            cross_documents,
            _ORDER,
            seed,
        ]
        if packs is not None:
            self.num_samples = len(packs.bounds) - 1
            facts += [hashlib.sha256(array.data).hexdigest() for array in (packs.bounds, packs.first, packs.stop)]
        self.facts: dict[str, Any] = {
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "sequences": self.num_samples,
            "left_out": ", ".join(filter(None, (tokens.skipped.words(), packs.words() if packs else ""))),
        }
        """What there is, and what was left out of it, in words."""
        self.fingerprint: str = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def count(self) -> Counts:
        """Tokens of an epoch; reads the whole mask."""
        if self.packs is not None:
            assert self._predicted is not None
            first, stop = self.packs.first, self.packs.stop
            # the first token of an example follows none that could predict it; a sum of each range, ends included
            mask = np.append(self._predicted, False)
            sums = np.add.reduceat(mask, np.stack([first + 1, stop], 1).ravel(), dtype=np.int64)[::2]
            return Counts(int((stop - first).sum()), int(sums.sum()))
        if self._packing:
            return Counts(self.num_tokens, self.num_tokens - (1 if self._cross else self.num_documents))
        lengths = np.diff(self._starts)
        read, predicted = (np.minimum(part, self.sequence_length).sum() for part in (lengths, lengths - 1))
        return Counts(int(read), int(predicted))

    def batch(self, samples: range) -> Batch:
        """The samples with these numbers, in this order."""
        return self.take(np.arange(samples.start, samples.stop, samples.step, dtype=np.int64))

    def take(self, numbers: np.ndarray) -> Batch:
        """The samples with these numbers, int64, [n]."""
        place = _shuffled(numbers, self.num_samples, seed=self._seed)
        if self.packs is not None:
            return self._laid(place, self.packs)
        if self._packing:
            first = place * self.sequence_length
            stop = np.full_like(first, self.num_tokens)
        else:
            first, stop = self._starts[place], self._starts[place + 1]
        return self._cut(first[:, None], stop[:, None])

    def _cut(self, first: np.ndarray, stop: np.ndarray) -> Batch:
        """Samples that begin at token `first` and have no tokens from `stop` on; both [n, 1]."""
        index = first + np.arange(self.sequence_length + 1)  # [n, T + 1]: a label is the token after the last one too
        inside = index < stop
        ids = np.where(inside, self._ids[np.minimum(index, self.num_tokens - 1)].astype(np.int64), self._pad)
        predicted = inside[:, 1:].copy()
        begin = first
        if self._packing and not self._cross:
            document = np.searchsorted(self._starts[:-1], index, side="right") - 1
            predicted &= document[:, 1:] == document[:, :-1]
            begin = np.maximum(self._starts[document[:, :-1]], first)
        labels = np.where(predicted, ids[:, 1:], IGNORE)
        return _batch(ids[:, :-1], labels, index[:, :-1] - begin)

    def _laid(self, place: np.ndarray, packs: Packs) -> Batch:
        """The sequences with these numbers; k tokens in all before they are filled up, as one more document."""
        assert self._predicted is not None
        low, high = packs.bounds[place], packs.bounds[place + 1]
        examples = _ranges(low, high - low)
        first = packs.first[examples]
        lengths = packs.stop[examples] - first
        index = _ranges(first, lengths)  # [k]: where each token is read
        inside = _ranges(np.zeros_like(first), lengths)  # [k]: its place in its example
        row = np.repeat(np.repeat(np.arange(len(place)), high - low), lengths)
        used = np.bincount(row, minlength=len(place))
        column = _ranges(np.zeros_like(used), used)
        shape = len(place), self.sequence_length
        ids, labels = np.full(shape, self._pad), np.full(shape, IGNORE)
        positions = np.arange(self.sequence_length) - used[:, None]
        after = np.minimum(index + 1, self.num_tokens - 1)
        predicted = (inside + 1 < np.repeat(lengths, lengths)) & self._predicted[after]
        ids[row, column] = self._ids[index]
        labels[row, column] = np.where(predicted, self._ids[after].astype(np.int64), IGNORE)
        positions[row, column] = inside
        return _batch(ids, labels, positions)


def _batch(*arrays: np.ndarray) -> Batch:
    return Batch(*(torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)) for array in arrays))


def _ranges(first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, ... for lengths[0] numbers, then the same from first[1] on, and so on."""
    return np.arange(lengths.sum()) + np.repeat(first - np.cumsum(lengths) + lengths, lengths)


class Mixture:
    """Samples by number of several data sets, each with its share and none ever exhausted.

    Of every `MIXTURE` samples each data set gives its share: the next ones of its own order, which goes on without end.
    These samples come in an order drawn for them alone. So a data set's epochs are its own, and nothing depends on the
    mesh.
    """

    def __init__(self, parts: Sequence[Dataset], weights: Sequence[float], *, seed: int) -> None:
        self.parts, self.slots, self._seed = tuple(parts), slots(weights), seed
        facts = [_ORDER, [part.fingerprint for part in parts], self.slots.tolist(), seed]
        self.fingerprint: str = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        totals = {name: sum(part.facts[name] for part in parts) for name in ("documents", "tokens", "sequences")}
        self.num_samples: int = totals["sequences"]
        """Of all data sets, each taken whole."""
        self.facts: dict[str, Any] = {
            **totals,
            "left_out": "; ".join(part.facts["left_out"] for part in parts if part.facts["left_out"]),
        }
        """Sums, and what was left out of each."""

    def batch(self, samples: range) -> Batch:
        """The samples with these numbers, in this order."""
        which, own = self.places(np.arange(samples.start, samples.stop, samples.step, dtype=np.int64))
        found = [part.take(own[which == number]) for number, part in enumerate(self.parts)]
        back = torch.from_numpy(np.argsort(np.argsort(which, kind="stable")))
        columns = zip(*((batch.input_ids, batch.labels, batch.position_ids) for batch in found), strict=True)
        return Batch(*(torch.cat(column)[back] for column in columns))

    def places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(which data set, which of its samples) these samples are; int64, [n] each."""
        slot = _shuffled(numbers, MIXTURE, seed=self._seed)
        ends = np.cumsum(self.slots)
        which = np.searchsorted(ends, slot, side="right")
        return which, numbers // MIXTURE * self.slots[which] + slot - (ends - self.slots)[which]


def slots(weights: Sequence[float]) -> np.ndarray:
    """`MIXTURE` divided by weight, by the largest remainders; int64."""
    shares = np.array(weights) / sum(weights) * MIXTURE
    whole = np.floor(shares).astype(np.int64)
    whole[np.argsort(whole - shares, kind="stable")[: MIXTURE - whole.sum()]] += 1
    return whole


def held_out_settings(settings: DataSettings) -> DataSettings | None:
    """What evaluation reads: the same kind of data from `eval_path`; None where that is not given."""
    if settings.eval_path is None:
        return None
    return settings.model_copy(update={"path": settings.eval_path, "split": settings.eval_split, "weights": None})


def prepare(
    settings: DataSettings, *, tokenizer: Tokenizer, seed: int, cache: Path, verify: bool = False
) -> Dataset | Mixture:
    """The data set or mixture of a recipe. Tokenised once for all processes that share `cache`; later ones map it.

    Args:
        settings: the recipe's `data`.
        tokenizer: from `open_tokenizer`.
        seed: decides the order of the samples.
        cache: `cache_folder()`.
        verify: read all that the cache holds of it and compare it with what was written.

    Raises:
        UserError: nothing there, nothing usable, a broken line (file and number), a cache that cannot be written, or in
            which bytes have changed.
    """
    if settings.weights is not None:
        parts = [_prepare(path, settings, tokenizer, seed, cache, verify) for path in settings.path]
        return Mixture(parts, settings.weights, seed=seed)
    return _prepare(settings.path, settings, tokenizer, seed, cache, verify)


def _prepare(
    path: str | Sequence[str], settings: DataSettings, tokenizer: Tokenizer, seed: int, cache: Path, verify: bool
) -> Dataset:
    corpus = find_corpus(
        path,
        split=settings.split,
        subset=settings.subset,
        form=form_of(settings, tokenizer),
        skip_broken=settings.broken == "skip",
    )
    tokens = prepare_tokens(corpus, tokenizer=tokenizer, cache=cache, verify=verify)
    apart = not (settings.packing and settings.cross_documents)
    if len(tokens.ids) - (len(tokens.starts) - 1 if apart else 1) <= 0:
        raise FieldError(
            "data.path", corpus.name, "has no token to predict: each document is one token", "give more text"
        )
    length, packing = settings.sequence_length, settings.packing
    packs = None
    if corpus.examples:
        packs = pack(
            tokens,
            sequence_length=length,
            truncation=settings.truncation,
            packing=packing,
            cache=cache,
            paired=settings.kind == "preference",
        )
    return Dataset(
        tokens,
        sequence_length=length,
        packing=packing,
        cross_documents=settings.cross_documents,
        seed=seed,
        tokenizer=tokenizer,
        packs=packs,
    )


def _shuffled(numbers: np.ndarray, size: int, *, seed: int) -> np.ndarray:
    """Numbers that go on without end, each run of ``size`` of them in an order of its own; in range(size)."""
    place = np.empty_like(numbers)
    epochs = numbers // size
    for epoch in np.unique(epochs):
        here = epochs == epoch
        place[here] = permute(numbers[here] % size, size, seed=seed, epoch=int(epoch))
    return place


def permute(numbers: np.ndarray, size: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(size), another in each epoch: which sample is the number-th of the epoch (int64, int64).

    A Feistel network over the smallest even number of bits that holds `size`, and cycle walking: what falls outside is
    sent through again until it falls inside (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). It needs
    no table, so that any sample of any epoch is found at once, and uses integer arithmetic of our own: a library's
    shuffle may change with its version, and a resumed run must not.
    """
    half = max(2, -(-(size - 1).bit_length() // 2))
    mask = np.uint64((1 << half) - 1)
    keys = np.frombuffer(
        hashlib.sha512(f"{_ORDER} {seed} {epoch}".encode()).digest(), dtype="<u8"
    )  # one for each round
    place = numbers.astype(np.uint64)
    walking = np.arange(len(place))
    while len(walking):
        left, right = place[walking] >> np.uint64(half), place[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        place[walking] = (left << np.uint64(half)) | right
        walking = walking[place[walking] >= size]
    return place.astype(np.int64)


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit in reaches every bit out."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
