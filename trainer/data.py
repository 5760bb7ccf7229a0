"""Tokens to samples: packing, labels, the order of an epoch; sample number -> content in constant time.

Shapes: n samples, T tokens of a sample (`sequence_length`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cuboid.parallel.errors import FieldError
from cuboid.parallel.loss import IGNORE
from cuboid.trainer.corpus import find_corpus
from cuboid.trainer.recipe import DataSettings
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


class Dataset:
    """Samples by number, without end: every epoch holds each sample once, in an order of its own.

    - packing: all documents one after another, cut every T tokens. Each token but a document's first is predicted once
      an epoch. The last sample is filled up; what fills has label -100.
    - without packing: a document a sample, cut or filled to T.

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
    ) -> None:
        self._ids, self._starts = tokens.ids, tokens.starts
        self._length, self._packing, self._cross, self._seed = sequence_length, packing, cross_documents, seed
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
        self.fingerprint: str = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def batch(self, samples: range) -> Batch:
        """The samples with these numbers, in this order."""
        numbers = np.arange(samples.start, samples.stop, samples.step, dtype=np.int64)
        place = np.empty_like(numbers)
        epochs = numbers // self.num_samples
        for epoch in np.unique(epochs):
            here = epochs == epoch
            place[here] = permute(numbers[here] % self.num_samples, self.num_samples, seed=self._seed, epoch=int(epoch))
        if self._packing:
            first = place * self._length
            stop = np.full_like(first, self.num_tokens)
        else:
            first, stop = self._starts[place], self._starts[place + 1]
        return self._cut(first[:, None], stop[:, None])

    def _cut(self, first: np.ndarray, stop: np.ndarray) -> Batch:
        """Samples that begin at token `first` and have no tokens from `stop` on; both [n, 1]."""
        index = first + np.arange(self._length + 1)  # [n, T + 1]: a label is the token after the last one too
        inside = index < stop
        ids = np.where(inside, self._ids[np.minimum(index, self.num_tokens - 1)].astype(np.int64), self._pad)
        predicted = inside[:, 1:].copy()
        begin = first
        if self._packing and not self._cross:
            document = np.searchsorted(self._starts[:-1], index, side="right") - 1
            predicted &= document[:, 1:] == document[:, :-1]
            begin = np.maximum(self._starts[document[:, :-1]], first)
        labels = np.where(predicted, ids[:, 1:], IGNORE)
        arrays = (ids[:, :-1], labels, index[:, :-1] - begin)
        return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


def prepare(settings: DataSettings, *, tokenizer: Tokenizer, seed: int, cache: Path) -> Dataset:
    """The data set of a recipe. Tokenised once for all processes that share `cache`; later ones map what is there.

    Args:
        settings: the recipe's `data`.
        tokenizer: from `open_tokenizer`.
        seed: decides the order of the samples.
        cache: `cache_folder()`.

    Raises:
        UserError: nothing there, nothing usable, a broken line (file and number), a cache that cannot be written.
    """
    corpus = find_corpus(settings.path, text_column=settings.text_column, split=settings.split, subset=settings.subset)
    tokens = prepare_tokens(corpus, tokenizer=tokenizer, cache=cache)
    apart = not (settings.packing and settings.cross_documents)
    if len(tokens.ids) - (len(tokens.starts) - 1 if apart else 1) <= 0:
        raise FieldError(
            "data.path", corpus.name, "has no token to predict: each document is one token", "give more text"
        )
    return Dataset(
        tokens,
        sequence_length=settings.sequence_length,
        packing=settings.packing,
        cross_documents=settings.cross_documents,
        seed=seed,
        tokenizer=tokenizer,
    )


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
