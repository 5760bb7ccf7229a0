"""A run's two logs: metrics.jsonl (a line a step, rank 0) and events.jsonl (any process). Imports no torch."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cuboid.parallel.errors import UserError

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
STOP_FILE = "stop"
"""A launcher writes a file of this name into the run's folder to end the run at the next step's edge; its content says
why."""
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
_CHUNK_BYTES = 1 << 16
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|JWT|PAT|ACCESS_KEY_ID|CONNECTION_STRING)$",
    re.IGNORECASE,
)
_SECRET_CHARACTERS = 8
_SECRET_IN_URL = re.compile(
    r"((?:token|api_key|password|secret|signature)=)[^&\s\"'\\]+|(://[^/\s:@\"]*:)[^/\s@\"\\]+(?=@)", re.IGNORECASE
)
_SECRET_BY_FORM = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_\w{30,}|github_pat_\w{30,}|(?:AKIA|ASIA)[A-Z0-9]{16}|xox[abprs]-[\w-]{10,})\b"
    r"|(?<=Bearer )[\w.~+/=-]{16,}",
)
"""Tokens of Hugging Face, GitHub, AWS and Slack, and what an Authorization header bears, wherever they come from."""


class RunLog:
    """Writes a run's logs. Every rank may hold one; only rank 0 calls `metrics` and `truncate`.

    A failing disk never raises in `metrics` and `event`: a metrics line that does not fit is kept and written
    (once, whole) when there is space again, an event goes to standard error instead.

    Raises:
        UserError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.folder / EVENTS, _APPEND, 0o644))
        except OSError as error:
            raise UserError(f"the run's folder {self.folder} cannot be written: {error.strerror}") from error
        self._metrics_fd: int | None = None
        self._pending = b""
        self._told = False

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Append one step's record. A number that is not finite becomes null, since JSON has no word for it."""
        self._pending += _encode(record)
        try:
            if self._metrics_fd is None:
                self._metrics_fd = self._open_metrics()
            while self._pending:
                self._pending = self._pending[os.write(self._metrics_fd, self._pending) :]
        except OSError as error:
            if not self._told:
                self._told = True
                self.event(
                    "log_failed",
                    cause=f"{METRICS}: {error.strerror}; its lines are kept in memory until they can be written",
                )

    def event(self, kind: str, /, **fields: Any) -> None:
        """Append one event with the time in seconds since 1970. One write, so that lines of several processes never mix
        (local file systems; NFS does not promise it)."""
        record = {"time": round(time.time(), 6), "kind": kind, **fields}
        line = redact(_encode(record).decode()).encode()
        try:
            descriptor = os.open(self.folder / EVENTS, _APPEND, 0o644)
            try:
                written = os.write(descriptor, line)
                if written != len(line):
                    raise OSError(28, f"{written} of {len(line)} bytes written")
            finally:
                os.close(descriptor)
        except OSError as error:
            sys.stderr.write(f"cuboid: events.jsonl cannot be written ({error.strerror}): {line.decode()}")

    def truncate(self, step: int) -> None:
        """Cut metrics.jsonl to the steps <= `step`, atomically, so that after a resume each step stands once."""
        path = self.folder / METRICS
        self.close()
        self._pending = b""
        if not path.exists():
            return
        kept = {
            record["step"]: record
            for record in _records(path)
            if isinstance(record.get("step"), int) and record["step"] <= step
        }
        content = b"".join(_encode(kept[number]) for number in sorted(kept))
        if content == path.read_bytes():
            return
        new = path.with_name(f".{METRICS}.{os.getpid()}")
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)

    def close(self) -> None:
        """Close the files; a later call opens them again."""
        if self._metrics_fd is not None:
            os.close(self._metrics_fd)
            self._metrics_fd = None

    def _open_metrics(self) -> int:
        descriptor = os.open(self.folder / METRICS, _APPEND & ~os.O_WRONLY | os.O_RDWR, 0o644)
        size = os.fstat(descriptor).st_size
        # A process killed inside a write leaves half a line; the next record must not be glued to it.
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            self._pending = b"\n" + self._pending
        return descriptor


def redact(text: str) -> str:
    """The text without secrets: values of the environment's keys, tokens and passwords, also as Python, JSON and
    URLs spell them; those written in URLs; and what has the form of a well-known token.

    The one place that knows what a secret is: events, tracebacks, a rank's output and the command's errors pass it.
    """
    for name, value in os.environ.items():
        if len(value) >= _SECRET_CHARACTERS and _SECRET_NAME.search(name):
            for spelt in (value, repr(value)[1:-1], json.dumps(value)[1:-1], quote(value, safe="")):
                text = text.replace(spelt, f"[{name}]")
    return _SECRET_BY_FORM.sub("[redacted]", _SECRET_IN_URL.sub(r"\1\2[redacted]", text))


def read_metrics(folder: Path, *, num_bytes: int | None = None) -> list[dict[str, Any]]:
    """The records of metrics.jsonl in the order written, or those in its first bytes; a torn line is left out, and a
    missing file is empty."""
    return list(_records(Path(folder) / METRICS, num_bytes))


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The records of events.jsonl in the order written; a torn line is left out, a missing file is empty."""
    return list(_records(Path(folder) / EVENTS))


class Tail:
    """Follows both logs of a run that another process writes.

    Each record is delivered once. When a file is replaced (`RunLog.truncate`, a fresh run), only what follows the
    common beginning of the old and the new file is delivered.
    """

    def __init__(self, folder: Path, *, from_start: bool = True) -> None:
        self._metrics = _FileTail(Path(folder) / METRICS, from_start)
        self._events = _FileTail(Path(folder) / EVENTS, from_start)

    def poll(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(new metrics records, new events) since the last call; never waits."""
        return self._metrics.poll(), self._events.poll()

    def close(self) -> None:
        self._metrics.close()
        self._events.close()


class _FileTail:
    """One file. The descriptor stays open between polls: its inode cannot be reused, so a replacement is always
    seen, and the old content stays readable to find where the new file departs from it."""

    def __init__(self, path: Path, from_start: bool) -> None:
        self._path = path
        self._fd: int | None = None
        self._offset = 0
        if not from_start and self._reopen() and self._fd is not None:
            # Skip what is there now, up to its last whole line.
            self._offset = os.fstat(self._fd).st_size
            self._offset = _line_start(self._fd, self._offset)

    def poll(self) -> list[dict[str, Any]]:
        if not self._reopen() or self._fd is None:
            return []
        size = os.fstat(self._fd).st_size
        # Cut in place: what stood before the cut was delivered already.
        self._offset = min(self._offset, size)
        content = _read(self._fd, self._offset, size)
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return list(_parse(whole))

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _reopen(self) -> bool:
        """Open the file that has the name now; False where there is none."""
        try:
            now = os.stat(self._path)
            if self._fd is not None:
                held = os.fstat(self._fd)
                if (held.st_dev, held.st_ino) == (now.st_dev, now.st_ino):
                    return True
            new = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        if self._fd is not None:
            self._offset = _line_start(new, _common_bytes(self._fd, new, self._offset))
            os.close(self._fd)
        self._fd = new
        return True


def _common_bytes(old: int, new: int, limit: int) -> int:
    """How many leading bytes two files share, at most `limit`."""
    position = 0
    while position < limit:
        size = min(_CHUNK_BYTES, limit - position)
        first, second = os.pread(old, size, position), os.pread(new, size, position)
        if first != second or not first:
            pairs = enumerate(zip(first, second, strict=False))
            return position + next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
        position += len(first)
    return position


def _line_start(descriptor: int, offset: int) -> int:
    """The start of the line that holds byte `offset`: the place after the last newline before it."""
    while offset > 0:
        start = max(0, offset - _CHUNK_BYTES)
        newline = _read(descriptor, start, offset).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        offset = start
    return 0


def _read(descriptor: int, start: int, stop: int) -> bytes:
    parts = []
    while start < stop:
        part = os.pread(descriptor, stop - start, start)
        if not part:
            break
        parts.append(part)
        start += len(part)
    return b"".join(parts)


def _records(path: Path, num_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    try:
        content = path.read_bytes()[:num_bytes]
    except FileNotFoundError:
        return iter(())
    return _parse(content)


def _parse(content: bytes) -> Iterator[dict[str, Any]]:
    for line in content.split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:  # empty or torn
            continue
        if isinstance(record, dict):
            yield record


def _encode(record: Mapping[str, Any]) -> bytes:
    return (
        json.dumps(_plain(record), ensure_ascii=False, allow_nan=False, separators=(", ", ": ")).encode(
            "utf-8", "replace"
        )
        + b"\n"
    )


def _plain(value: Any) -> Any:
    """JSON's own types: numpy and torch scalars as numbers, what is not finite as null, anything else in words."""
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)
