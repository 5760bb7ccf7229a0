"""Where documents come from: files, tables, the built-in corpus, and the datasets door. Imports no torch.

What a row becomes is said by a `Form`: a text here, a conversation in `conversations`.
"""

from __future__ import annotations

import glob
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from cuboid.parallel.errors import FieldError, UserError
from cuboid.trainer.foreign import JSON_BYTES, open_plain, parse_json, reason

PACKAGES = ("package:stdlib",)
TEXT_SUFFIXES = (".txt", ".md", ".py")
TABLE_SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow", ".json": "json"}
"""Files that datasets reads, and the name of its reader; `.json` only where the file itself is named."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_NOT_CORPUS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_ROWS = 1000
_PACKED = (
    b"\x1f\x8b",
    b"PK\x03\x04",
    b"BZh",
    b"\xfd7zXZ\x00",
    b"7z\xbc\xaf",
    b"Rar!",
    b"\x28\xb5\x2f\xfd",
    b"\x04\x22\x4d\x18",
)
"""How files of gzip, zip, bzip2, xz, 7z, rar, zstandard and lz4 begin."""
_PACKED_SUFFIXES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar")
_UNPACKED, _UNPACKED_BYTES = 100, 64 << 20
"""How much a parquet may unfold to, by its footer: text alone shrinks to a tenth."""


@dataclass(frozen=True)
class Example:
    """A document of which only a part is predicted."""

    text: str
    predicted: tuple[tuple[int, int], ...]
    """[start, stop) of the characters that are predicted, in order."""
    ends: bool
    """Whether the tokenizer's end token follows, predicted too; a chat template has written its own."""


@dataclass(frozen=True)
class Pair:
    """Two answers to the same prompt, each behind it; of each the answer alone is predicted."""

    chosen: Example
    rejected: Example


Document = str | Example | Pair
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Form:
    """What is made of a row."""

    key: list[Any]
    """JSON that changes with what is made."""
    columns: tuple[str, ...]
    """Columns that every row has."""
    optional: tuple[str, ...]
    """Columns that are read where they are there."""
    field: str
    """Field of the recipe that names the columns."""
    document: Callable[[Row], Document]
    """Raises UserError where the row is broken."""
    examples: bool = True
    """Whether it makes an `Example` or a `Pair` of a row; else a text, and a whole text file is a document too."""


@dataclass(frozen=True)
class Corpus:
    """Documents that were found and not yet read."""

    name: str
    """As the recipe names it."""
    key: list[Any]
    """JSON that changes when the content may have changed: files with size and times, or the hub id and split."""
    num_bytes: int | None
    """Bytes to read, where known beforehand."""
    read: Callable[[], Iterator[Document | UserError]]
    """Reads the documents, always in the same order; at one that is broken it raises, or gives the error in its place
    where broken ones are skipped."""
    examples: bool = False
    """Whether its documents are examples or pairs of them."""


@dataclass(frozen=True)
class _Part:
    """One entry of a corpus: a file, or a data set that datasets loads."""

    key: Any
    num_bytes: int | None
    read: Callable[[], Iterable[Document | UserError]]


def text_form(column: str) -> Form:
    """A row is the text in ``column``; null is an empty one."""

    def text(row: Row) -> str:
        value = row[column]
        if value is not None and not isinstance(value, str):
            raise UserError(f"column {column} holds {type(value).__name__}, not text; set data.text_column")
        return value or ""

    return Form([column], (column,), (), "data.text_column", text, examples=False)


def find_corpus(
    path: str | Sequence[str],
    *,
    text_column: str = "text",
    split: str = "train",
    subset: str | None = None,
    form: Form | None = None,
    skip_broken: bool = False,
) -> Corpus:
    """Finds what `data.path` names and reads nothing yet.

    Args:
        path: a file (.txt, .md, .py or any text; .jsonl; .parquet, .csv, .json, .arrow through datasets), a folder of
            them, a glob, a hub id of datasets, `package:stdlib`, or a list of these, read in the order given.
        text_column: the column of tables and .jsonl files that holds the text.
        split: of a data set that datasets loads by hub id or folder.
        subset: of a data set that has several (their config name).
        form: what is made of a row; None: the text of ``text_column``.
        skip_broken: give the error of a broken document in its place and go on.

    Raises:
        UserError: something named is not there.
    """
    names = [path] if isinstance(path, str) else list(path)
    select = {"split": split} | ({} if subset is None else {"name": subset})
    form = form or text_form(text_column)
    parts = [part for name in names for part in _parts(name, form, select)]
    sizes = [part.num_bytes for part in parts]
    known = [size for size in sizes if size is not None]

    def read() -> Iterator[Document | UserError]:
        for part in parts:
            for document in part.read():
                if isinstance(document, UserError) and not skip_broken:
                    raise document
                yield document

    key = [*form.key, *(part.key for part in parts), *(["skip"] if skip_broken else [])]
    return Corpus(", ".join(names), key, sum(known) if len(known) == len(sizes) else None, read, form.examples)


def _parts(name: str, form: Form, select: dict[str, str]) -> list[_Part]:
    if name.startswith("package:"):
        return _package(name, form)
    place = Path(name).expanduser()
    if place.is_dir():
        return _folder(name, place, form, select)
    if place.is_file():
        return [_file(place, form)]
    if glob.has_magic(name):
        found = sorted(Path(match) for match in glob.glob(str(place), recursive=True) if os.path.isfile(match))
        if not found:
            raise FieldError("data.path", name, "matches no file", "look at the pattern and the working directory")
        return [_file(file, form) for file in found]
    if _HUB_ID.fullmatch(name) and place.suffix not in (*TEXT_SUFFIXES, *TABLE_SUFFIXES, ".jsonl"):
        return [_Part(["hub", name, select], None, lambda: _load(name, name, form, select=select))]
    remedy = f"give a file, a folder, a glob, a hub id or {PACKAGES[0]} (relative to {Path.cwd()})"
    raise FieldError("data.path", name, "does not exist", remedy)


def _package(name: str, form: Form) -> list[_Part]:
    """The source text of Python's standard library, sorted by path: always there, the same for one Python release."""
    if name not in PACKAGES:
        raise FieldError("data.path", name, "is no built-in corpus", f"use {PACKAGES[0]}")
    _refuse_text(name, form)
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, inner, files in os.walk(root):
        inner[:] = [entry for entry in inner if entry not in _NOT_CORPUS]
        found += [Path(folder, file) for file in files if file.endswith(".py")]
    if not found:
        raise FieldError(
            "data.path", name, f"finds no source files in {root}", "use a Python with its standard library"
        )
    found.sort(key=lambda file: file.relative_to(root).as_posix())

    return [_Part(_stat_key(file), file.stat().st_size, partial(_source, file)) for file in found]


def _refuse_text(name: object, form: Form) -> None:
    if form.examples:
        constraint = f"is running text, without the columns {', '.join(form.columns)}"
        remedy = "give .jsonl, .parquet, .csv or a hub id, or use data.kind=text"
        raise FieldError("data.path", name, constraint, remedy)


def _source(file: Path) -> Iterator[str]:
    try:
        yield file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):  # a few sources have another encoding on purpose
        return


def _folder(name: str, folder: Path, form: Form, select: dict[str, str]) -> list[_Part]:
    """All readable files below a folder, sorted by path; a folder with tables is a data set and goes to datasets."""
    files = [
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    files.sort(key=lambda file: file.relative_to(folder).as_posix())
    tables = [file for file in files if file.suffix in TABLE_SUFFIXES and file.suffix != ".json"]
    if tables:
        key = ["folder", select, *(_stat_key(file) for file in files)]
        size = sum(file.stat().st_size for file in files)
        return [_Part(key, size, lambda: _load(name, str(folder), form, files=files, select=select))]
    texts = [file for file in files if file.suffix in (*TEXT_SUFFIXES, ".jsonl")]
    if not texts:
        suffixes = ", ".join((*TEXT_SUFFIXES, ".jsonl", ".parquet", ".csv"))
        raise FieldError("data.path", name, f"holds no file that ends in {suffixes}", "name the files themselves")
    return [_file(file, form) for file in texts]


def _file(file: Path, form: Form) -> _Part:
    key, size = _stat_key(file), file.stat().st_size
    if file.suffix == ".jsonl":
        return _Part(key, size, lambda: _json_lines(file, form))
    if reader := TABLE_SUFFIXES.get(file.suffix):
        place = {"train": [str(file)]}
        return _Part(
            key,
            size,
            lambda: _load(str(file), reader, form, files=[file], select={"split": "train", "data_files": place}),
        )
    _refuse_text(file, form)
    return _Part(key, size, lambda: _text(file))


def _stat_key(file: Path) -> list[Any]:
    # ctime moves with every write and cannot be set back, so that a changed file is never taken for the old one
    facts = file.stat()
    return [str(file.resolve()), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]


def _text(file: Path) -> Iterator[str | UserError]:
    try:
        yield file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise FieldError("data.path", file, f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        constraint = f"is not UTF-8 text (byte {error.start})"
        yield FieldError("data.path", file, constraint, "convert it or leave it out")


def _json_lines(file: Path, form: Form) -> Iterator[Document | UserError]:
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(_lines(lines), start=1):
                if line := line.strip():
                    yield _made(line, f"{file}, line {number}", form)
    except OSError as error:
        raise FieldError("data.path", file, f"cannot be read ({error.strerror})") from error


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines, and of one that no row can be as long as its beginning alone: it is not read into memory."""
    while line := file.readline(JSON_BYTES + 1):
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(JSON_BYTES)
        yield line


def _json_row(line: bytes, form: Form) -> Row:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"not JSON ({error}); mend or remove the line") from error
    if not isinstance(row, dict):
        raise UserError(f"a JSON object is needed, this is {type(row).__name__}")
    _refuse_missing(row, form)
    return row


def _refuse_missing(row: Iterable[str], form: Form) -> None:
    have = list(row)
    for column in form.columns:
        if column not in have:
            raise UserError(f"no column {column} (there are: {', '.join(have) or 'none'}); set {form.field}")


def _made(given: bytes | Row, place: str, form: Form) -> Document | UserError:
    """The document of a row (JSON in bytes), or what is wrong with the row, and where."""
    try:
        return form.document(_json_row(given, form) if isinstance(given, bytes) else given)
    except UserError as error:
        return UserError(f"{place}: {error}")


def _refuse_packed(file: Path) -> None:
    """Raises FieldError where datasets would unpack a file, whatever its name, or where little becomes very much."""
    try:
        with open_plain(file) as opened:
            begins = opened.read(512)
    except OSError as error:
        raise FieldError("data.path", file, f"cannot be read ({error.strerror})") from error
    if file.suffix in _PACKED_SUFFIXES or begins.startswith(_PACKED) or begins[257:262] == b"ustar":
        raise FieldError("data.path", file, "is packed, and may unfold to any size", "unpack it, or leave it out")
    if file.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            footer = parquet.read_metadata(file)
            unpacked = sum(footer.row_group(number).total_byte_size for number in range(footer.num_row_groups))
        except (pyarrow.ArrowException, OSError) as error:
            raise FieldError("data.path", file, f"is no readable parquet ({reason(error)})") from error
        size = file.stat().st_size
        if unpacked > _UNPACKED_BYTES + _UNPACKED * size or footer.num_rows > size:
            constraint = f"makes {unpacked / 1e6:,.0f} MB and {footer.num_rows:,} rows out of {size:,} bytes"
            raise FieldError("data.path", file, constraint, "write it again with less compression, if it is yours")


def _load(
    label: str, source: str, form: Form, *, select: Mapping[str, Any], files: Sequence[Path] = ()
) -> Iterator[Document | UserError]:
    """The datasets door: rows of a hub data set, a local data set folder or a table file; ``files`` are the local ones.

    A hub data set is tokenised once for its id and split; remove the cache folder to read a newer version of it.
    """
    try:
        import datasets
    except ImportError as error:
        raise FieldError("data.path", label, "needs the package datasets", "pip install 'cuboid[data]'") from error
    for file in files:
        _refuse_packed(file)
    try:
        table = datasets.load_dataset(source, **select)
    except Exception as error:  # not found, no network, no such split or config: datasets has many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        missing = "" if os.path.exists(label) else "is no file or folder here, and "
        constraint = f"{missing}cannot be loaded by datasets ({reason})"
        raise FieldError("data.path", label, constraint) from error
    try:
        _refuse_missing(table.column_names, form)
    except UserError as error:
        raise UserError(f"{label}: {error}") from error
    columns = [*form.columns, *(column for column in form.optional if column in table.column_names)]
    number = 0
    for rows in table.select_columns(columns).iter(batch_size=_ROWS):
        for values in zip(*(rows[column] for column in columns), strict=True):
            number += 1
            row = dict(zip(columns, values, strict=True))
            yield _made(row, f"{label}, row {number}", form)
