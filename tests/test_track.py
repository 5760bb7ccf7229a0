"""Trackers: real wandb and trackio, read back; resumed after a kill; broken in every way while the run goes on."""

import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from cuboid.parallel.errors import FieldError
from cuboid.trainer import track
from cuboid.trainer.recipe import TrackSettings
from cuboid.trainer.runlog import read_events, read_metrics
from cuboid.trainer.track import choose_tracker, open_tracker, wandb_records

RUN_ID = "abc123def456"

SESSION = """
import json, os, signal, statistics, subprocess, sys, time
from pathlib import Path
from cuboid.trainer.recipe import TrackSettings
from cuboid.trainer.runlog import RunLog, read_events
from cuboid.trainer.track import open_tracker

about = json.loads(sys.argv[1])
folder = Path(about["folder"])
log = RunLog(folder)
log.truncate(about["first"] - 1)
settings = TrackSettings(to=about.get("to", "auto"), project="tests", artifacts=about.get("artifacts", "reference"))
recipe = {"model": {"config": {"x": 7}}}
tracker = open_tracker(settings, run_id=about["run_id"], name="quick", recipe=recipe, folder=folder)
if "wait" in about:
    while not any(event["kind"] == "tracker" for event in read_events(folder)):
        time.sleep(0.05)
exec(about.get("before", ""))
seconds = []
for step in range(about["first"], about["last"] + 1):
    record = {"step": step, "loss": 1 / step, "bubble_by_stage": [0.25, 0.5], "slow_stage": None}
    log.metrics(record)
    started = time.perf_counter()
    tracker.log(step, record)
    seconds.append(time.perf_counter() - started)
    if step == 3:
        tracker.image("timeline", folder / "timeline.png")
        tracker.checkpoint(folder / "step-00000003", 3)
if about.get("kill"):
    print("all told", flush=True)
    time.sleep(100)
tracker.close()
print(json.dumps({"page": tracker.page, "run_id": tracker.run_id, "median": statistics.median(seconds)}))
"""


def clean_environment(home, **variables):
    """Nothing of the machine's own trackers."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "TRACKIO", "NETRC"))}
    return kept | {"HOME": str(home)} | variables


def session(folder, *, first, last, kill_when=None, variables=None, **about):
    """One process of a run; what it printed, or None where it was killed: when `kill_when` was true of its disk."""
    folder.mkdir(parents=True, exist_ok=True)
    from PIL import Image

    Image.new("RGB", (8, 8)).save(folder / "timeline.png")
    (folder / "step-00000003").mkdir(exist_ok=True)
    (folder / "step-00000003" / "manifest.json").write_text('{"files": {}}')
    (folder / "step-00000003" / "model.safetensors").write_bytes(b"weights" * 100)
    about |= {"folder": str(folder), "first": first, "last": last, "run_id": RUN_ID, "kill": kill_when is not None}
    environment = clean_environment(folder.parent, **(variables or {}))
    command = [sys.executable, "-c", SESSION, json.dumps(about)]
    if kill_when:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            try:
                assert process.stdout.readline() == "all told\n"
                wait_until(kill_when, seconds=60)
            finally:
                process.kill()
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a tracker talks"
    assert done.stdout.count("\n") == 1, "a tracker talks"
    return json.loads(done.stdout)


def wait_until(true, *, seconds):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.05)


def trackio(root, query):
    """What the run's database answers; nothing while it is made or written."""
    try:
        with contextlib.closing(sqlite3.connect(root / ".trackio" / "tests.db")) as database:
            return database.execute(query).fetchall()
    except sqlite3.OperationalError:
        return []


def trackio_rows(root):
    return trackio(root, "select run_name, step, metrics from metrics order by id")


def wandb_history(folder):
    """(step, {name: value}) of all sessions in order."""
    files = sorted((folder / "wandb").glob(f"offline-run-*-{RUN_ID}/*.wandb"))
    for file in files:
        for record in wandb_records(file):
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                yield record.history.step.num, items


def wandb_models(file):
    """Checkpoints among the artifacts of one session."""
    for record in wandb_records(file):
        found = record.request.log_artifact.artifact if record.HasField("request") else record.artifact
        if found.type == "model":
            yield found


@pytest.mark.parametrize(
    ("to", "variables", "installed", "expected"),
    [
        ("auto", {}, {"wandb", "trackio"}, ("trackio", "no key for wandb is configured")),
        ("auto", {"WANDB_API_KEY": "x"}, {"wandb", "trackio"}, ("wandb", "a key is configured in WANDB_API_KEY")),
        ("auto", {"WANDB_API_KEY": "x"}, {"trackio"}, ("trackio", "no key for wandb is configured")),
        ("auto", {"WANDB_API_KEY": "x", "WANDB_MODE": "disabled"}, {"wandb", "trackio"}, ("trackio", "no key")),
        ("auto", {"WANDB_MODE": "offline"}, {"wandb", "trackio"}, ("wandb", "WANDB_MODE is offline")),
        ("auto", {}, set(), ("none", "trackio is not installed (pip install 'cuboid[track]')")),
        ("none", {"WANDB_API_KEY": "x"}, {"wandb"}, ("none", "as track.to says")),
        ("wandb", {}, {"wandb"}, ("wandb", "as track.to says")),
        ("wandb", {"WANDB_MODE": "disabled"}, {"wandb"}, ("none", "WANDB_MODE is disabled")),
    ],
)
def test_which_tracker(tmp_path, monkeypatch, to, variables, installed, expected):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": str(tmp_path)} | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(track, "_installed", installed.__contains__)
    kind, reason = choose_tracker(TrackSettings(to=to))
    assert kind == expected[0]
    assert expected[1] in reason


def test_a_key_in_netrc_counts(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(track, "_installed", lambda name: True)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password 0123456789\n")
    assert choose_tracker(TrackSettings()) == ("wandb", "a key is configured in ~/.netrc")
    (tmp_path / ".netrc").write_text("machine example.org login user password 0123456789\n")
    assert choose_tracker(TrackSettings())[0] == "trackio"


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(track, "_installed", lambda name: False)
    with pytest.raises(
        FieldError, match=r"track.to=trackio is not installed; pip install 'cuboid\[track\]', or use none"
    ):
        open_tracker(TrackSettings(to="trackio"), run_id=None, name="x", recipe={}, folder=tmp_path)
    tracker = open_tracker(TrackSettings(to="auto"), run_id=None, name="x", recipe={}, folder=tmp_path)
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    (event,) = read_events(tmp_path)
    assert event["to"] == "none"
    assert "is not installed" in event["reason"]
    assert len(tracker.run_id) == 12


def test_trackio_two_sessions_are_one_run_with_each_step_once(tmp_path):
    folder = tmp_path / "runs" / "quick"

    def all_is_stored():
        steps = {row[1] for row in trackio_rows(folder.parent)}
        return steps == set(range(1, 31)) and trackio(folder.parent, "select id from artifact_versions")

    session(folder, first=1, last=30, kill_when=all_is_stored, wait=True)
    # The session that was killed told the tracker up to step 30; the checkpoint was at 20.
    told = session(folder, first=21, last=50)
    numbers = [(name, step) for name, step, metrics in trackio_rows(folder.parent) if b"loss" in bytes(metrics)]
    assert numbers == [(f"quick-{RUN_ID}", step) for step in range(1, 51)]
    assert told["run_id"] == RUN_ID
    assert told["page"].endswith("trackio show --project tests")
    assert f"TRACKIO_DIR={folder.parent}/.trackio" in told["page"]
    assert "token" not in (folder / "events.jsonl").read_text()
    assert told["median"] < 200e-6
    with sqlite3.connect(folder.parent / ".trackio" / "tests.db") as database:
        (config,) = database.execute("select config from configs").fetchone()
        assert json.loads(config)["model"] == {"config": {"x": 7}}
        (facts, manifest) = database.execute("select metadata, manifest from artifact_versions").fetchone()
        assert json.loads(facts)["step"] == 3
        assert json.loads(facts)["path"] == str(folder / "step-00000003")
        assert [entry["path"] for entry in json.loads(manifest)] == ["manifest.json"]
    (picture,) = (json.loads(m) for _, step, m in trackio_rows(folder.parent) if step == 3 and b"timeline" in bytes(m))
    assert picture["timeline"]["_type"] == "trackio.image"


def test_wandb_offline_two_sessions_are_one_run_with_each_step_once(tmp_path):
    folder = tmp_path / "runs" / "quick"
    offline = {"WANDB_MODE": "offline"}
    # The newest step is written when the next one begins.
    stored = lambda: any(step == 29 for step, _ in wandb_history(folder))  # noqa: E731
    session(folder, first=1, last=30, kill_when=stored, wait=True, variables=offline)
    told = session(folder, first=21, last=50, variables=offline)
    history = list(wandb_history(folder))
    numbers = [(step, float(items["loss"])) for step, items in history if "loss" in items]
    assert numbers == [(step, 1 / step) for step in range(1, 51)]
    assert [items["bubble_by_stage/1"] for _, items in history] == ["0.5"] * 50
    assert any("timeline" in name for step, items in history if step == 3 for name in items)
    assert told["page"] == f"wandb sync {folder}/wandb/*run-*-{RUN_ID}"
    first, second = sorted((folder / "wandb").glob(f"offline-run-*-{RUN_ID}/*.wandb"))
    runs = [record.run for file in (first, second) for record in wandb_records(file) if record.HasField("run")]
    assert {(run.run_id, run.display_name, run.project) for run in runs} == {(RUN_ID, "quick", "tests")}
    configs = {update.key: update.value_json for run in runs for update in run.config.update}
    assert json.loads(configs["model"]) == {"config": {"x": 7}}
    (artifact,) = wandb_models(first)
    assert json.loads(artifact.metadata)["step"] == 3
    assert [entry.path for entry in artifact.manifest.contents] == ["manifest.json"]


def test_the_bytes_of_a_checkpoint_where_asked(tmp_path):
    folder = tmp_path / "runs" / "quick"
    session(folder, first=1, last=3, artifacts="bytes")
    ((manifest,),) = trackio(folder.parent, "select manifest from artifact_versions")
    assert [entry["path"] for entry in json.loads(manifest)] == ["manifest.json", "model.safetensors"]
    session(tmp_path / "other" / "quick", first=1, last=3, artifacts="none")
    assert trackio(tmp_path / "other", "select count(*) from artifact_versions") == [(0,)]


def test_the_bytes_of_a_checkpoint_in_an_offline_wandb(tmp_path):
    folder = tmp_path / "runs" / "quick"
    session(folder, first=1, last=3, artifacts="bytes", variables={"WANDB_MODE": "offline"})
    (file,) = (folder / "wandb").glob(f"offline-run-*-{RUN_ID}/*.wandb")
    (artifact,) = wandb_models(file)
    weights = (folder / "step-00000003" / "model.safetensors").read_bytes()
    entries = {entry.path: entry for entry in artifact.manifest.contents}
    assert sorted(entries) == ["manifest.json", "model.safetensors"]
    assert entries["model.safetensors"].size == len(weights)
    assert Path(entries["model.safetensors"].local_path).read_bytes() == weights


def test_a_tracker_switched_on_late_has_the_earlier_steps(tmp_path):
    folder = tmp_path / "runs" / "quick"
    session(folder, first=1, last=10, to="none")
    session(folder, first=11, last=12)
    assert [step for _, step, metrics in trackio_rows(folder.parent)] == list(range(1, 13))


class HalfDead(BaseHTTPRequestHandler):
    """Answers a look, but never a call."""

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        time.sleep(60)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def server(kind):
    """The worst networks: a server that takes connections and never answers, and one that stops answering later.

    Its address, and a list that gets the time of each connection.
    """
    times = []
    if kind == "silent":
        with socket.create_server(("127.0.0.1", 0)) as silent:
            taken = []

            def take():
                with contextlib.suppress(OSError):
                    while True:
                        taken.append(silent.accept())
                        times.append(time.time())

            Thread(target=take, daemon=True).start()
            yield f"http://127.0.0.1:{silent.getsockname()[1]}", times
            silent.shutdown(socket.SHUT_RDWR)
        return
    half_dead = ThreadingHTTPServer(("127.0.0.1", 0), HalfDead)
    half_dead.verify_request = lambda *_: times.append(time.time()) or True
    half_dead.daemon_threads, half_dead.block_on_close = True, False
    Thread(target=half_dead.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{half_dead.server_port}", times
    half_dead.shutdown()
    half_dead.server_close()


@pytest.mark.alone
@pytest.mark.parametrize(
    ("kind", "cause"), [("silent", "does not answer (timed out)"), ("half dead", "context deadline exceeded")]
)
def test_wandb_without_a_network_is_offline_within_ten_seconds(tmp_path, kind, cause):
    folder = tmp_path / "runs" / "quick"
    key = "0123456789abcdef" * 2 + "01234567"
    with server(kind) as (url, times):
        variables = {"WANDB_API_KEY": key, "WANDB_BASE_URL": url}
        told = session(folder, first=1, last=5, wait=True, variables=variables)
        ended = time.time()
    events = {event["kind"]: event for event in read_events(folder)}
    assert events["tracker_offline"]["cause"].endswith(cause)
    assert events["tracker_offline"]["time"] - times[0] < track._REACH_SECONDS + track._INIT_SECONDS + 1
    assert ended - events["tracker"]["time"] < 10, "the end of the run waits for a dead network"
    assert told["page"].startswith("wandb sync")
    assert [step for step, _ in wandb_history(folder)] == [1, 2, 3, 4, 5], "what `wandb sync` sends later"
    assert told["median"] < 200e-6, "a step waits for the network"
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert key.encode() not in written, "the key was written"


KILL_WANDB = """
for name in Path("/proc").glob("[0-9]*/cmdline"):
    if b"wandb-core" in name.read_bytes() and str(os.getpid()).encode() in name.read_bytes():
        os.kill(int(name.parent.name), signal.SIGKILL)
"""

FULL_DISK = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
import warnings
warnings.simplefilter("ignore")  # trackio tells it on standard error too
"""


@pytest.mark.parametrize(
    ("to", "before", "variables"),
    [
        ("wandb", KILL_WANDB, {"WANDB_MODE": "offline"}),
        ("trackio", FULL_DISK, {}),
        ("trackio", "", {"TRACKIO_DIR": "/proc/nowhere"}),
    ],
)
def test_a_broken_tracker_stops_nothing(tmp_path, to, before, variables):
    folder = tmp_path / "runs" / "quick"
    wait = {} if "TRACKIO_DIR" in variables else {"wait": True}
    timed = session(folder, first=1, last=300, to=to, before=before, variables=variables, **wait)
    assert timed["median"] < 200e-6, "more than 1% of a step of 20 ms"
    assert [record["step"] for record in read_metrics(folder)] == list(range(1, 301))
    told = [event["call"] for event in read_events(folder) if event["kind"] == "tracker_failed"]
    assert told, "nobody heard of it"
    assert len(told) == len(set(told)), "told more than once"
    if before == FULL_DISK:  # there is room again: what was not stored is sent by the run's next process
        session(folder, first=301, last=302, to=to)
        stored = {step for _, step, metrics in trackio_rows(folder.parent) if b"loss" in bytes(metrics)}
        assert stored == set(range(1, 303))


def test_nothing_of_a_tracker_is_imported_before_it_is_opened():
    code = (
        "import sys, cuboid.trainer.track; sys.exit(any(name in sys.modules for name in ('wandb', 'trackio', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
