"""The tracker: wandb, trackio or none behind the same calls. The only file that imports either.

A tracker is company, not crew: everything happens on a thread of its own, a call of the loop costs microseconds, and a
fault (no network, full disk, crash, exception) becomes one event while training and metrics.jsonl go on.

A run has one id for its whole life, in its checkpoints. A resumed run repeats the steps since its checkpoint: what the
tracker already has is left out, what a killed process had not yet handed over is added from metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import importlib.util
import netrc
import os
import shutil
import ssl
import struct
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cuboid.parallel.errors import FieldError
from cuboid.trainer.manifest import MANIFEST
from cuboid.trainer.recipe import TrackSettings
from cuboid.trainer.runlog import RunLog
from cuboid.trainer.tracking import FINISH_SECONDS, Backend, Tracker

_WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
_REACH_SECONDS = 3.0
_INIT_SECONDS = 6.0
"""How long the server of wandb may take to answer, and to open a run: with all else offline comes within 10 s."""
_FLUSH_SECONDS = 1.0


@dataclass(frozen=True)
class _Run:
    """What a tracker is told about the run."""

    run_id: str
    name: str
    project: str
    recipe: Mapping[str, Any]
    folder: Path
    artifacts: str


def open_tracker(
    settings: TrackSettings, *, run_id: str | None, name: str, recipe: Mapping[str, Any], folder: Path
) -> Tracker:
    """The tracker of a run; it opens in the background. Call it on rank 0, after `RunLog.truncate`.

    Args:
        settings: the recipe's `track`.
        run_id: from the checkpoint that is resumed; None begins a new run.
        name: of the run.
        recipe: resolved; stored as the run's config.
        folder: the run's folder.

    Raises:
        FieldError: the tracker asked for by name is not installed.
    """
    kind, reason = choose_tracker(settings)
    run = _Run(run_id or uuid.uuid4().hex[:12], name, settings.project, recipe, Path(folder), settings.artifacts)
    events = RunLog(run.folder)

    def open_backend() -> Backend:
        backend: Backend = _Wandb(run) if kind == "wandb" else _Trackio(run)
        events.event("tracker", to=kind, run_id=run.run_id, page=backend.page, reason=reason)
        return backend

    if kind == "none":
        events.event("tracker", to=kind, run_id=run.run_id, page="", reason=reason)
    return Tracker(
        None if kind == "none" else open_backend, run_id=run.run_id, folder=run.folder, artifacts=run.artifacts
    )


def choose_tracker(settings: TrackSettings) -> tuple[str, str]:
    """(wandb, trackio or none; why). Imports neither and needs no network.

    Raises:
        FieldError: the tracker asked for by name is not installed.
    """
    mode = os.environ.get("WANDB_MODE", "online")
    if settings.to == "wandb" and mode == "disabled":
        return "none", "WANDB_MODE is disabled"
    if settings.to != "auto":
        if settings.to != "none" and not _installed(settings.to):
            raise FieldError("track.to", settings.to, "is not installed", "pip install 'cuboid[track]', or use none")
        return settings.to, "as track.to says"
    if _installed("wandb") and mode != "disabled":
        if mode == "offline":
            return "wandb", "WANDB_MODE is offline"
        if where := _wandb_key():
            return "wandb", f"a key is configured in {where}"
    if _installed("trackio"):
        return "trackio", "no key for wandb is configured"
    return "none", "no key for wandb is configured and trackio is not installed (pip install 'cuboid[track]')"


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _wandb_key() -> str:
    """Where a key for wandb is, or nothing. The key itself is not looked at."""
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(variable):
            return variable
    own = urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc
    for file in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        if file:
            with contextlib.suppress(OSError, netrc.NetrcParseError):
                hosts = netrc.netrc(Path(file).expanduser()).hosts
                if any(host in hosts for host in ([own] if own else _WANDB_HOSTS)):
                    return file
    return ""


class _Wandb:
    """Online where a key and a network are, else offline: a folder that `wandb sync` sends later."""

    def __init__(self, run: _Run) -> None:
        # Before the import: it says nothing, and artifacts that wait to be sent wait in the run's folder.
        os.environ.setdefault("WANDB_SILENT", "true")
        # Its own telemetry waits up to 20 s for a silent server when the process ends.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_DATA_DIR", str(run.folder.resolve() / "wandb"))
        import wandb

        self._wandb, self._about = wandb, run
        self._run: Any = None
        cause = self._offline_cause()
        if not cause:
            try:
                self._run = self._init(None)
            except Exception as error:  # the network went, or the server does not take the key
                cause = (str(error).strip() or type(error).__name__).splitlines()[0]
                wandb.teardown()
        if self._run is None:
            RunLog(run.folder).event("tracker_offline", cause=cause)
            self._run = self._init("offline")
        offline = bool(self._run.settings.mode == "offline")
        # Online the server knows what it has; offline the files of earlier sessions do.
        self.next_step = _next_step_on_disk(run.folder, run.run_id) if offline else int(self._run.step)
        self.page = f"wandb sync {run.folder}/wandb/*run-*-{run.run_id}" if offline else str(self._run.url)

    def _offline_cause(self) -> str:
        """Why wandb cannot be online, or nothing: a short look, since wandb itself waits long for a dead network."""
        if os.environ.get("WANDB_MODE") == "offline":
            return "WANDB_MODE is offline"
        if not _wandb_key():
            return "no key for wandb is configured"
        url = self._wandb.setup().settings.base_url
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_REACH_SECONDS).close()
        except urllib.error.HTTPError:  # an answer
            return ""
        except OSError as error:
            reason = getattr(error, "reason", error)
            return "" if isinstance(reason, ssl.SSLError) else f"{url} does not answer ({reason})"
        return ""

    def _init(self, mode: Literal["offline"] | None) -> Any:
        run = self._about
        wanted = {
            "silent": True,
            "quiet": True,
            "console": "off",
            "save_code": False,
            "init_timeout": _INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS - 10,
            # A killed process loses what is not yet in the file.
            "x_transaction_log_flush_interval": _FLUSH_SECONDS,
        }
        known = self._wandb.Settings.model_fields
        return self._wandb.init(
            project=run.project,
            name=run.name,
            id=run.run_id,
            resume="allow",
            config=dict(run.recipe),
            dir=str(run.folder),
            mode=mode,
            settings=self._wandb.Settings(**{key: value for key, value in wanted.items() if key in known}),
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def checkpoint(self, step: int, path: Path, facts: dict[str, Any]) -> None:
        artifact = self._wandb.Artifact(f"{self._about.name}-{self._about.run_id}", type="model", metadata=facts)
        _fill(artifact, path, self._about.artifacts)
        self._run.log_artifact(artifact, aliases=["latest", f"step-{step}"])

    def finish(self, failed: bool) -> None:
        try:
            self._run.finish(exit_code=1 if failed else 0)
        finally:
            self.abandon()

    def abandon(self) -> None:
        # Takes wandb's hook off the interpreter's exit, which would wait again, or end with a traceback.
        self._wandb.teardown()


class _Trackio:
    """One sqlite file beside the runs, so that every node that resumes the run finds it; no server runs."""

    def __init__(self, run: _Run) -> None:
        place = Path(os.environ.setdefault("TRACKIO_DIR", str(run.folder.resolve().parent / ".trackio")))
        place.mkdir(parents=True, exist_ok=True)
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        self._trackio, self._about = trackio, run
        # trackio finds a run again by its name alone, so that the name carries the id.
        self._name = f"{run.name}-{run.run_id}"
        self._run = trackio.init(
            project=run.project,
            name=self._name,
            resume="allow",
            config=dict(run.recipe),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._newest_stored = lambda: SQLiteStorage.get_max_step_for_run(run.project, self._name) or 0
        self.next_step = self._newest_stored() + 1
        # The URL of its server carries a token that allows writing: we give the command, never the URL.
        script = shutil.which("trackio") or str(Path(sys.executable).with_name("trackio"))
        self.page = f"TRACKIO_DIR={place} {script} show --project {run.project}"

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._trackio.Image(str(path))}, step=step)

    def checkpoint(self, step: int, path: Path, facts: dict[str, Any]) -> None:
        artifact = self._trackio.Artifact(self._name, type="model", metadata=facts)
        _fill(artifact, path, self._about.artifacts)
        self._run.log_artifact(artifact, aliases=[f"step-{step}"])

    def abandon(self) -> None:
        """Nothing waits for trackio at the interpreter's exit."""

    def finish(self, failed: bool) -> None:
        self._run.finish()
        # trackio swallows its own write errors.
        if (stored := self._newest_stored()) < self.next_step - 1:
            raise OSError(f"trackio stored steps up to {stored} of {self.next_step - 1}; metrics.jsonl has every step")


def _fill(artifact: Any, path: Path, how: str) -> None:
    if how == "bytes":
        artifact.add_dir(str(path))
    else:
        artifact.add_file(str(path / MANIFEST))


def _next_step_on_disk(folder: Path, run_id: str) -> int:
    """The step after the newest one in wandb's files of this run, from any session."""
    files = folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")
    records = (record for file in files for record in wandb_records(file))
    return 1 + max((int(record.history.step.num) for record in records if record.HasField("history")), default=0)


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file, as far as it was written: a LevelDB log (blocks of 32 KiB, fragments with a header
    of checksum, length and kind) of protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = file.read_bytes()
    position, parts = 7, b""  # after the file's own header
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:  # the rest of a block is empty
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        body = content[position + 7 : position + 7 + length]
        if kind == 0 or len(body) < length:
            return
        position += 7 + length
        parts += body
        if kind in (1, 4):  # a whole record, or its last fragment
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record
