"""Runs sent to a real Ray cluster that asks for a token: followed, left alone, stopped, gone on with."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import standin
import yaml

from cuboid.launch.worker import free_port
from cuboid.trainer.manifest import steps
from cuboid.trainer.runlog import read_events, read_metrics

pytestmark = [pytest.mark.timeout(400), pytest.mark.alone, pytest.mark.full]

BIN = Path(sys.executable).parent
TOKEN = "a-token-of-this-test-alone"


@dataclass(frozen=True)
class Head:
    """A cluster of one node, the laptop that sends runs there, and the storage that both see."""

    url: str
    laptop: Path
    shared: Path
    process: psutil.Process
    environment: dict[str, str]

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "cuboid.launch.cli", *words, "--address", self.url]

    def run(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            self.command(*words), cwd=self.laptop, env=self.environment, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*words),
            cwd=self.laptop,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    laptop, shared = tmp_path_factory.mktemp("laptop"), tmp_path_factory.mktemp("shared")
    token = tmp_path_factory.mktemp("secret") / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    environment = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    ports = {name: free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    place = Path("/tmp", f"ray-{os.getpid()}")  # Ray's sockets lie in it, and their names may be 107 bytes long
    options = [*(f"--{name}={port}" for name, port in ports.items()), f"--temp-dir={place}", "--num-cpus=4"]
    options += ["--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", "--object-store-memory=80000000"]
    started = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", *options],
        env=environment | {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        made = Head(url, laptop, shared, psutil.Process(started.pid), environment)
        deadline = time.monotonic() + 60
        while subprocess.run(made.command("jobs"), env=environment, capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, "the head does not start"
        write_recipe(laptop, shared)
        yield made
    finally:
        family = [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]
        for process in family:  # asked to end, Ray's command waits half a minute
            with suppress(psutil.NoSuchProcess):
                process.kill()
        started.wait(60)
        standin.wait_until_gone(family)
        shutil.rmtree(place, ignore_errors=True)


def write_recipe(laptop: Path, shared: Path) -> None:
    shutil.copy(Path(__file__).parents[1] / "LICENSE", laptop / "text.txt")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    recipe = {
        "name": "far",
        "model": {"config": {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 264, **sizes}},
        "data": {"kind": "text", "path": "text.txt", "sequence_length": 16},
        "parallel": {"data": 2},
        "train": {"steps": 100_000, "global_batch": 2, "log_every": 10},
        "checkpoint": {"every": 1_000_000},
        "track": {"to": "none", "timeline_every": 0},
        "launch": {"device": "cpu"},
        "runs": str(shared),
    }
    (laptop / "far.yaml").write_text(yaml.safe_dump(recipe))


def wait_for(text: str, process: subprocess.Popen[str]) -> str:
    """What a command prints until a line with this text."""
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def test_a_run_outlives_the_laptop_and_is_stopped_with_a_checkpoint(head: Head) -> None:
    environment = head.environment | {"RAY_AUTH_TOKEN_PATH": os.devnull, "RAY_AUTH_TOKEN": "another"}
    refused = subprocess.run(head.command("jobs"), env=environment, capture_output=True, text=True, check=False)
    assert (refused.returncode, "does not take the token of the environment" in refused.stderr) == (2, True)

    laptop = head.start("submit", "far.yaml")
    printed = wait_for("loss", laptop)
    assert re.search(r"sending \d\.\d MB \(code \d\.\d MB, data\.path 0\.0 MB\) to http://127", printed)
    job, sent = re.search(r"^job (\S+), cuboid (\S+), run", printed, re.MULTILINE).groups()
    assert f"cuboid {sent} on " in printed
    laptop.kill()
    laptop.communicate()

    assert re.search(rf"^{job}  running    \d{{4}}-.*  {head.shared}/far$", head.run("jobs"), re.MULTILINE)
    follower = head.start("logs", "--follow", job)
    assert printed.split("Running entrypoint")[1].splitlines()[1] in wait_for("loss", follower)
    os.kill(follower.pid, signal.SIGINT)
    said, _ = follower.communicate(timeout=30)
    assert follower.returncode == 130
    assert f"{job} goes on. follow it: " in said
    assert f"stop {job} --address {head.url}" in said

    commands = {process: " ".join(process.cmdline()) for process in head.process.children(recursive=True)}
    stopped = head.run("stop", job)
    folder = head.shared / "far"
    last = read_metrics(folder)[-1]["step"]
    assert max(steps(folder / "checkpoints")) == last
    assert f"cuboid: stopped after step {last} of 100000\n{job}: stopped" in stopped
    assert re.search(rf"^{job}  stopped ", head.run("jobs"), re.MULTILINE)
    ranks = [place["pid"] for event in read_events(folder) for place in event.get("ranks", {}).values()]
    assert ranks
    own = [process for process, line in commands.items() if process.pid in ranks or "cuboid.launch.cli train" in line]
    assert len(own) >= len(set(ranks)) + 2, "the driver, its host process, and the ranks"
    standin.wait_until_gone(own)
    assert TOKEN.encode() not in b"".join(path.read_bytes() for path in head.shared.rglob("*") if path.is_file())
    assert f"knows no job {job}0" in head.run("stop", f"{job}0", code=2)


def test_rays_own_command_does_too(head: Head) -> None:
    """With the code that the cluster has."""
    ray = [BIN / "ray", "job", "submit", "--address", head.url, "--working-dir", "."]
    command = [*ray, "--", "cuboid", "train", "far.yaml", "name=plain", "train.steps=20"]
    asked = {"cwd": head.laptop, "env": head.environment, "capture_output": True, "text": True, "check": False}
    done = subprocess.run(command, timeout=180, **asked)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^cuboid \S+ on ", done.stdout, re.MULTILINE)
    assert "done: 20 steps" in done.stdout
    assert [record["step"] for record in read_metrics(head.shared / "plain")] == list(range(1, 21))
