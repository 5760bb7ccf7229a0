"""Tokenised once, memory-mapped by everybody: the cache of token files. Imports no torch.

An entry is a folder `<cache>/tokens/<key>/` with `tokens.bin` (uint16 or uint32, all documents one after another),
`starts.bin` (int64, where each document starts, and the end of the last), for examples `predicted.bin` (a byte a token)
and `facts.json`: see `cache`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cuboid.parallel.errors import FieldError, UserError
from cuboid.trainer.cache import Facts, cached, flush, mapped, say
from cuboid.trainer.corpus import Corpus, Document, Example, Pair
from cuboid.trainer.tokenizer import Tokenizer

_FORMAT = 1
_BATCH_CHARACTERS = 1 << 21
_PIECE_CHARACTERS = 1 << 18
_GAP = re.compile(r"[^\W\d] [^\W\d]")
_GAP_CHARACTERS = 2000
_PROGRESS_SECONDS = 5.0
_ERRORS_TOLD = 3


@dataclass
class Skipped:
    """Documents of a corpus that are not in the token files."""

    broken: int = 0
    """Lines, rows or files that are not what was expected."""
    first: list[str] = field(default_factory=list)
    """What is wrong with the first few of them, and where they are."""
    unpredicted: int = 0
    """Examples that leave nothing to predict, and pairs with such an answer."""

    def words(self) -> str:
        """In a line; empty where nothing was skipped."""
        parts = [f"without a token to predict: {self.unpredicted}"] if self.unpredicted else []
        if self.broken:
            more = "; ..." if self.broken > len(self.first) else ""
            parts.append(f"broken and skipped: {self.broken} ({'; '.join(self.first)}{more})")
        return ", ".join(parts)


@dataclass(frozen=True)
class Tokens:
    """All documents as ids, and where each begins."""

    ids: np.ndarray
    """uint16 or uint32, [num_tokens], memory-mapped."""
    starts: np.ndarray
    """int64, [num_documents + 1]; the last one is num_tokens. A pair is two documents, one after the other."""
    sha256: str
    """Over all arrays."""
    predicted: np.ndarray | None = None
    """bool, [num_tokens]; None where each token is predicted."""
    skipped: Skipped = field(default_factory=Skipped)


def cache_folder() -> Path:
    """`$CUBOID_CACHE`, else `$XDG_CACHE_HOME/cuboid`, else `~/.cache/cuboid`."""
    if own := os.environ.get("CUBOID_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cuboid"


def prepare_tokens(corpus: Corpus, *, tokenizer: Tokenizer, cache: Path, verify: bool = False) -> Tokens:
    """The corpus as ids: from the cache, or tokenised now by the first process that asks while the others wait.

    An entry of another size than was written is made again; ``verify`` reads it all and compares the bytes too.

    Raises:
        UserError: a document is broken, none is usable, the cache folder cannot be written, or bytes in it changed.
    """
    identity = json.dumps([_FORMAT, corpus.key, tokenizer.identity], sort_keys=True)
    entry = Path(cache) / "tokens" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    facts = cached(entry, lambda folder: _write(folder, corpus, tokenizer))
    if verify and _sha256(_digest(entry / name) for name in facts["bytes"]) != facts["sha256"]:
        raise UserError(f"the token files in {entry} are not as they were written; delete the folder, and start again")
    return Tokens(
        mapped(entry / "tokens.bin", facts["dtype"]),
        mapped(entry / "starts.bin", np.int64),
        facts["sha256"],
        mapped(entry / "predicted.bin", np.bool_) if corpus.examples else None,
        Skipped(**facts.get("skipped", {})),
    )


def _write(folder: Path, corpus: Corpus, tokenizer: Tokenizer) -> Facts:
    """Writes the arrays and returns the facts that describe them."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    names = ["tokens.bin", "starts.bin", *(["predicted.bin"] if corpus.examples else [])]
    shas = [hashlib.sha256() for _ in names]
    encode = _encode_examples if corpus.examples else _encode
    total = documents = 0
    skipped, progress = Skipped(), _Progress(corpus)
    with ExitStack() as opened:
        files = [opened.enter_context(open(folder / name, "wb")) for name in names]
        for batch in _batches(corpus, skipped):
            found = encode(batch, tokenizer)
            skipped.unpredicted += found.unpredicted
            if found.rows:
                # copied once, into the type of the file
                ids = np.concatenate(found.rows, dtype=dtype, casting="unsafe")
                starts = np.array(found.starts, np.int64) + total
                arrays = [ids, starts, *([np.concatenate(found.predicted)] if corpus.examples else [])]
                for array, file, sha in zip(arrays, files, shas, strict=True):
                    file.write(array.data)
                    sha.update(array.data)
                total += len(ids)
                documents += len(starts)
            progress.show(sum(len(piece.text) for piece in batch), total)
        end = np.array([total], np.int64).tobytes()
        files[1].write(end)
        shas[1].update(end)
        for file in files:
            flush(file)
    if told := skipped.words():
        say(f"{corpus.name}: {documents} documents; {told}")
    if documents == 0:
        constraint = f"has no usable document: {told or 'all are empty'}"
        raise FieldError("data.path", corpus.name, constraint, "give some text")
    return {
        "format": _FORMAT,
        "corpus": corpus.name,
        "tokenizer": tokenizer.identity,
        "documents": documents,
        "tokens": total,
        "dtype": dtype.name,
        "bytes": {name: (folder / name).stat().st_size for name in names},
        "skipped": asdict(skipped),
        "sha256": _sha256(sha.digest() for sha in shas),
    }


def _digest(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _sha256(digests: Iterable[bytes]) -> str:
    """Over all arrays, by those of each."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


class _Piece(NamedTuple):
    """A document, or a part of a long one; or an answer, the first or the last of its pair."""

    text: str
    first: bool
    last: bool
    example: Example | None = None


class _Encoded(NamedTuple):
    """A batch as ids, one row after another; where its documents start; of examples, which ids are predicted."""

    rows: list[np.ndarray]
    starts: list[int]
    predicted: list[np.ndarray]
    unpredicted: int = 0
    """Examples that were left out."""


def _batches(corpus: Corpus, skipped: Skipped) -> Iterator[list[_Piece]]:
    """Documents with text, in order, in pieces, about `_BATCH_CHARACTERS` at a time; counts those that are broken."""
    batch: list[_Piece] = []
    size = 0
    for document in corpus.read():
        if isinstance(document, UserError):
            skipped.broken += 1
            skipped.first += [str(document)] if skipped.broken <= _ERRORS_TOLD else []
            continue
        for piece in _pieces(document):
            batch.append(piece)
            size += len(piece.text)
            if size >= _BATCH_CHARACTERS and (piece.last or piece.example is None):  # a pair stays together
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: Sequence[_Piece], tokenizer: Tokenizer) -> _Encoded:
    """Each document between the tokenizer's begin and end."""
    begin = [np.array([tokenizer.begin])] if tokenizer.begin is not None else []
    end = [np.array([tokenizer.end])] if tokenizer.end is not None else []
    rows: list[np.ndarray] = []
    starts, offset = [], 0
    # One call for all: tokenizers of transformers spread a batch over the cores.
    for piece, ids in zip(batch, tokenizer.encode([piece.text for piece in batch]), strict=True):
        if piece.first:
            starts.append(offset)
        parts = [*(begin if piece.first else ()), ids, *(end if piece.last else ())]
        rows += parts
        offset += sum(map(len, parts))
    return _Encoded(rows, starts, [])


def _encode_examples(batch: Sequence[_Piece], tokenizer: Tokenizer) -> _Encoded:
    """Each example as its template has written it. A token is predicted where the character it begins with is."""
    rows: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    whole: list[tuple[np.ndarray, np.ndarray]] = []  # of the example or pair that is under way
    unpredicted = 0
    for piece, (ids, places) in zip(batch, tokenizer.encode_placed([piece.text for piece in batch]), strict=True):
        assert piece.example is not None
        borders = np.array(piece.example.predicted, np.int64).reshape(-1)
        mask = np.searchsorted(borders, places, side="right") % 2 == 1
        if piece.example.ends and tokenizer.end is not None:
            ids, mask = np.append(ids, tokenizer.end), np.append(mask, True)
        whole.append((ids, mask))
        if not piece.last:
            continue
        if all(mask[1:].any() for _, mask in whole):  # the first token follows none that could predict it
            rows += [ids for ids, _ in whole]
            masks += [mask for _, mask in whole]
        else:
            unpredicted += 1
        whole = []
    starts = np.cumsum([0, *map(len, rows)])[:-1]
    return _Encoded(rows, starts.tolist(), masks, unpredicted)


def _pieces(document: Document) -> Iterator[_Piece]:
    """A long text in pieces, so that a file of gigabytes is not tokenised as one string; none of an empty one.

    Cut before a space between two words, where a tokenizer divides the text anyway; else after a line, else anywhere.
    """
    if isinstance(document, Pair):
        yield _Piece(document.chosen.text, True, False, document.chosen)
        yield _Piece(document.rejected.text, False, True, document.rejected)
        return
    if isinstance(document, Example):
        if document.text:
            yield _Piece(document.text, True, True, document)
        return
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
        say(f"tokenising {self._name}: {so_far}")
