"""Files that others made, looked at before a library reads them: plain, bounded, and nothing that unfolds.

What is wrong in them costs at most about 200 MB and a second. Imports no torch.
"""

from __future__ import annotations

import gc
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

from cuboid.parallel.errors import UserError

JSON_BYTES = 16 << 20
JSON_VALUES = 500_000
"""Signs that begin or part values: so many unfold to at most 70 MB of Python's objects, in half a second."""
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
JSON_DEPTH = 64
HEADER_BYTES = 16 << 20
"""Of a safetensors file: 100,000 tensors; the library alone takes 100 MB, which unfold to a gigabyte."""
_VOCABULARY_BYTES = 64 << 20
"""Of a tokenizer's file; the largest of well-known models has 33 MB."""
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "adapter_config.json",
)
"""JSON that transformers and peft read; a folder may hold more, which nobody does."""
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")
_CODE_IN_ANY_WORDS = re.compile(r"trust_remote_code|custom code", re.IGNORECASE)
NO_CODE = "asks for code of its own, which is never run: only families that transformers itself knows can be used"


def open_plain(path: Path, *, follow: bool = True) -> BufferedReader:
    """Open a file that is one: no pipe that never ends, no device; ``follow``: links are (the hub's cache has them).

    Raises:
        OSError: missing, unreadable, a link that is not followed, or not a plain file; ``strerror`` says which.
    """
    link = 0 if follow else os.O_NOFOLLOW
    descriptor = os.open(path, os.O_RDONLY | link | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "is not a plain file", str(path))
    return BufferedReader(FileIO(descriptor))


def parse_json(content: bytes, *, beside: int = 0) -> Any:
    """JSON in which no key stands twice and which nests and unfolds little.

    Args:
        beside: bytes of what the JSON describes; it may be larger by as many.

    Raises:
        ValueError: it is not, in words.
    """
    if len(content) > JSON_BYTES + beside:
        raise ValueError(f"larger than {JSON_BYTES + beside} bytes")
    most = JSON_VALUES + beside
    if _values(content) > most and _values(_TEXT.sub(b"", content)) > most:
        raise ValueError(f"more than {most} values")
    with _uncollected():
        try:
            parsed = json.loads(content, object_pairs_hook=_unique)
        except RecursionError:
            raise ValueError(f"nested deeper than {JSON_DEPTH} levels") from None
        _refuse_deep(parsed)
    return parsed


def read_json(path: Path, *, beside: int = 0) -> dict[str, Any]:
    """The JSON object of a file; ``beside`` as for `parse_json`.

    Raises:
        UserError: there is none, by the file's name.
    """
    try:
        with open_plain(path) as file:
            parsed = parse_json(file.read(JSON_BYTES + beside + 1), beside=beside)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; refused") from error
    except ValueError as error:
        raise UserError(f"{path} is not the JSON that it should be ({error}); refused") from error
    if not isinstance(parsed, dict):
        raise UserError(f"{path} is not a JSON object; refused")
    return parsed


def check_tensors_file(path: Path) -> None:
    """Before safetensors opens a file: it is a plain one, and its header within bounds.

    Raises:
        UserError: it is not, by its name.
    """
    try:
        with open_plain(path) as file:
            header = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; refused") from error
    if header > HEADER_BYTES:
        words = f"a header of {header} bytes, and {HEADER_BYTES} at most are read"
        raise UserError(f"{path} is no readable safetensors: {words}; refused")


def check_folder(folder: Path) -> None:
    """Before transformers or peft reads a folder: every file is plain, what they read is bounded, an index
    names files of the folder, and no config names kernels, which would be fetched and run.

    Raises:
        UserError: the first that is not, by its name.
    """
    try:
        entries = sorted(Path(folder).iterdir())
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error
    tensors = [path for path in entries if path.suffix == ".safetensors" and path.exists()]
    for path in tensors:
        check_tensors_file(path)
    beside = sum(path.stat().st_size for path in tensors)
    for path in entries:
        if not path.exists() or path.is_dir() or path in tensors:
            continue
        if not path.is_file():
            raise UserError(f"{path} is not a plain file; refused")
        if path.name in _VOCABULARIES:
            if path.stat().st_size > _VOCABULARY_BYTES:
                raise UserError(f"{path} is larger than {_VOCABULARY_BYTES} bytes; refused")
        elif path.name in _SETTINGS or path.name.endswith(".index.json"):
            values = read_json(path, beside=beside if path.name.endswith(".index.json") else 0)
            if path.name.endswith(".index.json"):
                _check_index(path, values)
            if kernels := next(_kernels(values), None):
                raise UserError(f"{path} asks for the kernels {kernels}, which are code; refused: remove the line")


def _check_index(path: Path, values: dict[str, Any]) -> None:
    names = values.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{path} has no weight_map of tensors to files; refused")
    if outside := sorted({file for file in names.values() if Path(file).name != file}):
        raise UserError(f"{path} points outside its folder: {outside[0]}; only names of files beside it are read")


def reason(error: Exception) -> str:
    """The part of a library's message that says what is wrong, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if _CODE_IN_ANY_WORDS.search(str(error)):
        return NO_CODE  # and not the advice to trust it
    last = lines[-1] if lines[0].endswith(":") else lines[0]
    return re.sub(r"^\w*Error: ", "", last)


@contextmanager
def _uncollected() -> Iterator[None]:
    """A few hundred thousand new lists have the garbage collector walk through all that the process holds, again and
    again; here nothing is dropped in cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _values(content: bytes) -> int:
    return sum(content.count(sign) for sign in b"[{,:")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(unique := dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return unique


def _refuse_deep(value: Any) -> None:
    level, depth = [value], 0
    while level := [item for outer in level for item in _inner(outer)]:
        depth += 1
        if depth > JSON_DEPTH:
            raise ValueError(f"nested deeper than {JSON_DEPTH} levels")


def _inner(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _kernels(value: Any) -> Iterator[str]:
    """Attention and experts that a config names by a repository, from which transformers would load them."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key.lstrip("_").startswith(("attn_implementation", "experts_implementation")):
                yield from (name for name in _texts(inner) if "/" in name)
    for inner in _inner(value):
        yield from _kernels(inner)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in _inner(value):
        yield from _texts(inner)
