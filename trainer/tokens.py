"""Tokenised once, memory-mapped by everybody: the cache of token files. Imports no torch.

An entry is a folder `<cache>/tokens/<key>/` with `tokens.bin` (uint16 or uint32, all documents one after another),
`starts.bin` (int64, where each document starts, and the end of the last) and `facts.json`, written last. It gets its
name by one rename when everything is on disk, so that an entry is whole or not there. Processes that share the file
system agree through a file lock; the kernel frees the lock of a killed one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cuboid.parallel.errors import FieldError, UserError
from cuboid.trainer.corpus import Corpus
from cuboid.trainer.tokenizer import Tokenizer

_FORMAT = 1
_BATCH_CHARACTERS = 1 << 21
_PIECE_CHARACTERS = 1 << 18
_GAP = re.compile(r"[^\W\d] [^\W\d]")
_GAP_CHARACTERS = 2000
_LOCK_POLL_SECONDS = 0.1
_WAIT_TOLD_SECONDS = 10.0
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class Tokens:
    """All documents as ids, and where each begins."""

    ids: np.ndarray
    """uint16 or uint32, [num_tokens], memory-mapped."""
    starts: np.ndarray
    """int64, [num_documents + 1]; the last one is num_tokens."""
    sha256: str
    """Over both arrays."""


def cache_folder() -> Path:
    """`$CUBOID_CACHE`, else `$XDG_CACHE_HOME/cuboid`, else `~/.cache/cuboid`."""
    if own := os.environ.get("CUBOID_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cuboid"


def prepare_tokens(corpus: Corpus, *, tokenizer: Tokenizer, cache: Path) -> Tokens:
    """The corpus as ids: from the cache, or tokenised now by the first process that asks while the others wait.

    Raises:
        UserError: a document is broken, none is usable, or the cache folder cannot be written.
    """
    identity = json.dumps([_FORMAT, corpus.key, tokenizer.identity], sort_keys=True)
    entry = Path(cache) / "tokens" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if tokens := _open(entry):
        return tokens
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _lock(entry.with_suffix(".lock")):
            tokens = _open(entry)
            if tokens is None:
                _build(entry, corpus, tokenizer)
                tokens = _open(entry)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"the cache of token files {entry.parent} cannot be written ({reason}); set CUBOID_CACHE"
        ) from error
    assert tokens is not None, f"{entry} was written and cannot be read"
    return tokens


def _open(entry: Path) -> Tokens | None:
    """The entry, or None where there is none that is whole."""
    try:
        facts = json.loads((entry / "facts.json").read_bytes())
        sizes = {name: (entry / name).stat().st_size for name in facts["bytes"]}
        if facts["format"] != _FORMAT or sizes != facts["bytes"]:
            return None
        # As plain arrays: each access through the memmap class would make a new object of it.
        ids = np.memmap(entry / "tokens.bin", dtype=facts["dtype"], mode="r").view(np.ndarray)
        starts = np.memmap(entry / "starts.bin", dtype=np.int64, mode="r").view(np.ndarray)
        return Tokens(ids, starts, facts["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(entry: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    # We hold the lock: what lies here under a passing name was left by a process that was killed.
    for left in entry.parent.glob(f".{entry.name}.*"):
        shutil.rmtree(left, ignore_errors=True)
    passing = entry.parent / f".{entry.name}.{socket.gethostname()}.{os.getpid()}"
    passing.mkdir()
    try:
        facts = _write(passing, corpus, tokenizer)
        with open(passing / "facts.json", "w") as file:
            json.dump(facts, file, indent=1)
            _flush(file)
        shutil.rmtree(entry, ignore_errors=True)
        os.rename(passing, entry)
    finally:
        shutil.rmtree(passing, ignore_errors=True)


def _write(folder: Path, corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes both arrays and returns the facts that describe them."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    sha_ids, sha_starts = hashlib.sha256(), hashlib.sha256()
    total = documents = 0
    progress = _Progress(corpus)
    with open(folder / "tokens.bin", "wb") as ids_file, open(folder / "starts.bin", "wb") as starts_file:
        for batch in _batches(corpus):
            rows, starts = _encode(batch, tokenizer, total)
            # copied once, into the type of the file
            ids = np.concatenate(rows, dtype=dtype, casting="unsafe")
            total += len(ids)
            documents += len(starts)
            for array, file, sha in ((ids, ids_file, sha_ids), (np.array(starts, np.int64), starts_file, sha_starts)):
                file.write(array.data)
                sha.update(array.data)
            progress.show(sum(len(piece.text) for piece in batch), total)
        end = np.array([total], np.int64).tobytes()
        starts_file.write(end)
        sha_starts.update(end)
        _flush(ids_file)
        _flush(starts_file)
    if documents == 0:
        raise FieldError("data.path", corpus.name, "has no usable document: all are empty", "give some text")
    return {
        "format": _FORMAT,
        "corpus": corpus.name,
        "tokenizer": tokenizer.identity,
        "documents": documents,
        "tokens": total,
        "dtype": dtype.name,
        "bytes": {"tokens.bin": total * dtype.itemsize, "starts.bin": (documents + 1) * 8},
        "sha256": hashlib.sha256(sha_ids.digest() + sha_starts.digest()).hexdigest(),
    }


class _Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    first: bool
    last: bool


def _batches(corpus: Corpus) -> Iterator[list[_Piece]]:
    """Documents with text, in order, in pieces, about `_BATCH_CHARACTERS` at a time."""
    batch: list[_Piece] = []
    size = 0
    for document in corpus.read():
        for piece in _pieces(document):
            batch.append(piece)
            size += len(piece.text)
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: list[_Piece], tokenizer: Tokenizer, offset: int) -> tuple[list[np.ndarray], list[int]]:
    """(ids in rows, where documents start) after `offset` ids; each document between the tokenizer's begin and end."""
    begin = [np.array([tokenizer.begin])] if tokenizer.begin is not None else []
    end = [np.array([tokenizer.end])] if tokenizer.end is not None else []
    rows: list[np.ndarray] = []
    starts = []
    # One call for all: tokenizers of transformers spread a batch over the cores.
    for piece, ids in zip(batch, tokenizer.encode([piece.text for piece in batch]), strict=True):
        if piece.first:
            starts.append(offset)
        parts = [*(begin if piece.first else ()), ids, *(end if piece.last else ())]
        rows += parts
        offset += sum(map(len, parts))
    return rows, starts


def _pieces(document: str) -> Iterator[_Piece]:
    """A long document in pieces, so that a file of gigabytes is not tokenised as one string; none of an empty one.

    Cut before a space between two words, where a tokenizer divides the text anyway; else after a line, else anywhere.
    """
    start = 0
    while len(document) - start > _PIECE_CHARACTERS:
        limit = start + _PIECE_CHARACTERS
        gaps = [gap.start() + 1 for gap in _GAP.finditer(document, limit - _GAP_CHARACTERS, limit)]
        stop = gaps[-1] if gaps else document.rfind("\n", start, limit) + 1
        if stop <= start:
            stop = limit
        yield _Piece(document[start:stop], start == 0, False)
        start = stop
    if document:
        yield _Piece(document[start:], start == 0, True)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds the file lock; says whom it waits for. Where there are no locks it goes on: the rename is atomic anyhow."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        started, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told and time.monotonic() - started > _WAIT_TOLD_SECONDS:
                    told = True
                    holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace")
                    _say(f"waiting for {holder or 'another process'}, which prepares the data ({path})")
                time.sleep(_LOCK_POLL_SECONDS)
            except OSError:
                break
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


class _Progress:
    """A line on standard error every few seconds, for corpora that take longer than that."""

    def __init__(self, corpus: Corpus) -> None:
        self._name, self._of = corpus.name, corpus.num_bytes
        self._read = 0
        self._started = self._shown = time.monotonic()

    def show(self, num_characters: int, num_tokens: int) -> None:
        self._read += num_characters
        now = time.monotonic()
        if now - self._shown < _PROGRESS_SECONDS:
            return
        self._shown = now
        share = f" of {self._of / 1e6:.0f} MB" if self._of else " million characters"
        rate = num_tokens / (now - self._started)
        so_far = f"{self._read / 1e6:.0f}{share}, {num_tokens / 1e6:.1f} M tokens, {rate:,.0f} tokens/s"
        _say(f"tokenising {self._name}: {so_far}")


def _say(words: str) -> None:
    sys.stderr.write(f"cuboid: {words}\n")
    sys.stderr.flush()
