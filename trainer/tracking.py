"""The tracker's thread: calls wait in a queue, faults become events, and the loop never waits.

Which tracker is behind it, and how it is opened, is told in `track`.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from cuboid.trainer.manifest import MANIFEST
from cuboid.trainer.runlog import METRICS, RunLog, read_metrics

FINISH_SECONDS = 60.0
"""How long the end of a run waits for its tracker."""
_QUEUE_LENGTH = 10_000


class Backend(Protocol):
    next_step: int
    """The first step that the tracker does not have."""
    page: str

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def image(self, step: int, name: str, path: Path) -> None: ...

    def checkpoint(self, step: int, path: Path, facts: dict[str, Any]) -> None: ...

    def finish(self, failed: bool) -> None: ...

    def abandon(self) -> None:
        """Give up a tracker that does not answer, so that the process can end."""


class Tracker:
    """A run's tracker. Every call returns at once and never raises."""

    def __init__(
        self, open_backend: Callable[[], Backend] | None, *, run_id: str, folder: Path, artifacts: str
    ) -> None:
        self.run_id = run_id
        self.page = ""
        """Where to look: a URL or a command. Known when the tracker is open, at the latest after `close`."""
        self._folder, self._artifacts = folder, artifacts
        self._events = RunLog(folder)
        self._told: set[str] = set()
        self._queue: queue.Queue[tuple[str, Callable[[Backend], None]] | None] = queue.Queue(_QUEUE_LENGTH)
        self._newest = self._first_step = 0
        # What an earlier session wrote, as far as the tracker lacks it, is handed over first.
        metrics = Path(folder) / METRICS
        self._earlier_bytes = metrics.stat().st_size if metrics.exists() else 0
        self._failed = False
        self._backend: Backend | None = None
        self._thread: threading.Thread | None = None
        if open_backend is not None:
            self._thread = threading.Thread(target=self._work, args=(open_backend,), name="tracker", daemon=True)
            self._thread.start()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One step's numbers; a list becomes name/0, name/1, ...; what is no number is left out."""
        self._newest = step
        self._put("log", lambda backend: _log(backend, step, metrics))

    def image(self, name: str, path: Path) -> None:
        """A picture, beside the numbers of the newest step. The file must stay."""
        step = self._newest

        def send(backend: Backend) -> None:
            if step >= self._first_step:
                backend.image(step, name, path)

        self._put("image", send)

    def checkpoint(self, path: Path, step: int) -> None:
        """A finished checkpoint with its manifest: a reference, its bytes, or nothing, as `track.artifacts` says."""
        if self._artifacts != "none":
            self._put("checkpoint", lambda backend: backend.checkpoint(step, path, _checkpoint_facts(path, step)))

    def close(self, *, failed: bool = False) -> None:
        """Hands over what is left, for at most a minute. `failed` marks the run so."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._failed = failed
        try:
            self._queue.put(None, timeout=FINISH_SECONDS)
            thread.join(FINISH_SECONDS)
        except queue.Full:
            pass
        if thread.is_alive():
            if self._backend is not None:
                abandon = threading.Thread(target=self._backend.abandon, daemon=True)
                abandon.start()
                abandon.join(1.0)
            self._tell("close", f"not done after {FINISH_SECONDS:.0f} s; metrics.jsonl has every step")

    def _put(self, what: str, call: Callable[[Backend], None]) -> None:
        if self._thread is None:
            return
        try:
            self._queue.put_nowait((what, call))
        except queue.Full:
            self._tell("queue", f"{_QUEUE_LENGTH} calls behind; newer ones are left out, metrics.jsonl has every step")

    def _work(self, open_backend: Callable[[], Backend]) -> None:
        with self._guard("open"), _quiet():
            self._backend = open_backend()
        backend = self._backend
        if backend is not None:
            self.page, self._first_step = backend.page, backend.next_step
            with self._guard("log"):
                for record in read_metrics(self._folder, num_bytes=self._earlier_bytes):
                    _log(backend, int(record["step"]), record)
        while (item := self._queue.get()) is not None:
            if backend is not None:
                what, call = item
                with self._guard(what), _quiet() if what == "checkpoint" else contextlib.nullcontext():
                    call(backend)
        if backend is not None:
            with self._guard("close"), _quiet():
                backend.finish(self._failed)

    @contextlib.contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._tell(what, f"{type(error).__name__}: {error}")

    def _tell(self, what: str, cause: str) -> None:
        """Once for each kind of call."""
        if what not in self._told:
            self._told.add(what)
            self._events.event("tracker_failed", call=what, cause=cause)


def _log(backend: Backend, step: int, metrics: Mapping[str, Any]) -> None:
    if step >= backend.next_step:
        backend.log(step, dict(_numbers(metrics)))
        backend.next_step = step + 1


def _numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, list | tuple):
            yield from _numbers(dict(zip(map(str, range(len(value))), value, strict=True)), f"{prefix}{name}/")
        elif isinstance(value, int | float) and (prefix or name != "step"):
            yield f"{prefix}{name}", value


def _checkpoint_facts(path: Path, step: int) -> dict[str, Any]:
    sha256 = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
    return {"step": step, "path": str(path.resolve()), "manifest_sha256": sha256}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Swallows what this thread prints to standard output; other threads print as before."""
    proxy = _Quiet(sys.stdout)
    sys.stdout = proxy
    try:
        yield
    finally:
        if sys.stdout is proxy:
            sys.stdout = proxy.stream


class _Quiet:
    def __init__(self, stream: Any) -> None:
        self.stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
