"""The two logs of a run: written by many, cut on resume, followed by the driver."""

import json
import multiprocessing
import os
import subprocess
import sys

import pytest

from cuboid.parallel.errors import UserError
from cuboid.trainer.runlog import RunLog, Tail, read_events, read_metrics


def steps(records):
    return [record["step"] for record in records]


def test_metrics_are_on_disk_at_once_and_plain_json(tmp_path):
    import numpy as np

    log = RunLog(tmp_path / "new" / "run")
    log.metrics(
        {
            "step": 1,
            "loss": np.float32(0.5),
            "grad_norm": float("nan"),
            "bubble_by_stage": np.array([0.25, 0.5]),
            "where": tmp_path,
        }
    )
    line = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()
    assert json.loads(line) == {
        "step": 1,
        "loss": 0.5,
        "grad_norm": None,
        "bubble_by_stage": [0.25, 0.5],
        "where": str(tmp_path),
    }


def test_truncate_leaves_each_step_once(tmp_path):
    log = RunLog(tmp_path)
    for step in range(1, 8):
        log.metrics({"step": step, "life": 1})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 8, "lo')  # killed inside a write
    assert steps(read_metrics(tmp_path)) == list(range(1, 8))
    log = RunLog(tmp_path)
    log.truncate(5)
    for step in range(6, 9):
        log.metrics({"step": step, "life": 2})
    assert [(r["step"], r["life"]) for r in read_metrics(tmp_path)] == [(n, 1) for n in range(1, 6)] + [
        (n, 2) for n in range(6, 9)
    ]
    log.truncate(0)
    assert read_metrics(tmp_path) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["events.jsonl", "metrics.jsonl"]


def test_a_torn_line_does_not_swallow_the_next_record(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "l')
    RunLog(tmp_path).metrics({"step": 3})
    assert steps(read_metrics(tmp_path)) == [1, 3]


def _write_events(folder, rank):
    log = RunLog(folder)
    for number in range(200):
        log.event("note", rank=rank, number=number, text="x" * 300)


def test_events_of_several_processes_never_mix(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_events, args=(tmp_path, rank)) for rank in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len((tmp_path / "events.jsonl").read_bytes().splitlines()) == 800
    events = read_events(tmp_path)
    for rank in range(4):
        assert [e["number"] for e in events if e["rank"] == rank] == list(range(200))
    assert all(e["kind"] == "note" and e["time"] > 1e9 for e in events)


def test_a_full_disk_keeps_the_lines_and_tells_once(tmp_path):
    """A file size limit stands for the full disk: the lines of that time appear whole when it is gone."""
    program = """
import resource, signal, sys
from cuboid.trainer.runlog import RunLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = RunLog(sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
log.metrics({"step": 1, "text": "y" * 100})
resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
for step in (2, 3, 4): log.metrics({"step": step, "text": "y" * 100})
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.metrics({"step": 5})
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert steps(read_metrics(tmp_path)) == [1, 2, 3, 4, 5]
    told = [e for e in read_events(tmp_path) if e["kind"] == "log_failed"]
    assert len(told) + done.stderr.count("log_failed") == 1


def test_tail_delivers_each_record_once_through_resume_and_a_fresh_run(tmp_path):
    folder = tmp_path / "run"
    tail = Tail(folder)
    assert tail.poll() == ([], [])
    log = RunLog(folder)
    log.event("start")
    for step in range(1, 6):
        log.metrics({"step": step, "life": 1})
    metrics, events = tail.poll()
    assert steps(metrics) == [1, 2, 3, 4, 5]
    assert [e["kind"] for e in events] == ["start"]
    assert tail.poll() == ([], [])

    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 6, "li')
    assert tail.poll()[0] == []  # not whole yet

    resumed = RunLog(folder)
    resumed.truncate(3)
    resumed.metrics({"step": 4, "life": 2})
    assert [(r["step"], r["life"]) for r in tail.poll()[0]] == [(4, 2)]
    resumed.truncate(2)
    assert tail.poll()[0] == []
    resumed.metrics({"step": 3, "life": 3})
    assert [(r["step"], r["life"]) for r in tail.poll()[0]] == [(3, 3)]

    os.rename(folder, tmp_path / "run.1")
    assert tail.poll() == ([], [])
    fresh = RunLog(folder)
    fresh.metrics({"step": 1, "life": 4})
    fresh.event("start")
    metrics, events = tail.poll()
    assert [(r["step"], r["life"]) for r in metrics] == [(1, 4)]
    assert len(events) == 1
    tail.close()


def test_tail_can_start_at_the_end(tmp_path):
    log = RunLog(tmp_path)
    for step in range(1, 5):
        log.metrics({"step": step, "text": "z" * 50_000})
    tail = Tail(tmp_path, from_start=False)
    log.truncate(3)
    log.metrics({"step": 4})
    assert tail.poll()[0] == [{"step": 4}]


def test_a_folder_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run's folder .*file/run cannot be written: Not a directory"):
        RunLog(tmp_path / "file" / "run")


def test_secrets_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a1b2c3d4e5")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "disabled!")
    log = RunLog(tmp_path)
    cause = 'key a1b2c3d4e5 at "http://x/?write_token=tok&a=1" and http://me:pass@host:80 tcp://host:29500 disabled!'
    log.event("failed", cause=cause)
    (event,) = read_events(tmp_path)
    assert event["cause"] == (
        'key [WANDB_API_KEY] at "http://x/?write_token=[redacted]&a=1" and http://me:[redacted]@host:80 '
        "tcp://host:29500 disabled!"
    )
