"""Runs sent to a real Ray cluster that asks for a token: followed, left alone, stopped, gone on with elsewhere."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import standin
import yaml

from cuboid.launch.worker import free_port
from cuboid.trainer.manifest import steps
from cuboid.trainer.runlog import read_metrics

pytestmark = [pytest.mark.timeout(400), pytest.mark.alone, pytest.mark.full]

BIN = Path(sys.executable).parent
TOKEN = "a-token-of-this-test-alone"


class Cluster:
    """A head without CPUs, a node with four, the laptop that sends runs there, and the storage that all of them see."""

    def __init__(self, laptop: Path, shared: Path, token: Path) -> None:
        self.laptop, self.shared = laptop, shared
        self.environment = os.environ | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",  # a node without its head goes on for long
        }
        # Ray's sockets lie there, and their names may be 107 bytes long
        self.place = Path("/tmp", f"ray-{os.getpid()}")
        self.nodes: list[subprocess.Popen[bytes]] = []
        self._numbers = itertools.count()

    def begin(self) -> None:
        """A new head and a new node, on ports of their own."""
        port, board, agent, other = (free_port() for _ in range(4))
        ports = [f"--port={port}", f"--dashboard-port={board}", f"--dashboard-agent-listen-port={agent}"]
        self.url = f"http://127.0.0.1:{board}"
        self._add("--head", *ports, "--dashboard-host=127.0.0.1", "--num-cpus=0")
        deadline = time.monotonic() + 120
        while subprocess.run(self.command("jobs"), env=self.environment, capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, "the head does not start"
        self._add(f"--address=127.0.0.1:{port}", f"--dashboard-agent-listen-port={other}", "--num-cpus=4")

    def _add(self, *options: str) -> None:
        """Each with a folder of its own: two that share one remove each other's copies of a job's files."""
        options = (*options, f"--temp-dir={self.place}/{next(self._numbers)}")
        common = ["--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", "--object-store-memory=80000000"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        self.nodes.append(subprocess.Popen([BIN / "ray", "start", *common, *options], env=self.environment, **quiet))

    def processes(self, nodes: Sequence[subprocess.Popen[bytes]]) -> list[psutil.Process]:
        found = [psutil.Process(node.pid) for node in nodes]
        return [*found, *(child for process in found for child in process.children(recursive=True))]

    def command_lines(self) -> dict[psutil.Process, str]:
        """Of the processes that have not ended meanwhile."""
        found = {}
        for process in self.processes(self.nodes):
            with suppress(psutil.NoSuchProcess):
                found[process] = " ".join(process.cmdline())
        return found

    def kill(self, nodes: Sequence[subprocess.Popen[bytes]]) -> None:
        """As machines that go dark: nothing of them can say a word."""
        killed = self.processes(nodes)
        for process in killed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for node in nodes:
            node.wait(60)
        standin.wait_until_gone(killed)
        self.nodes = [node for node in self.nodes if node not in nodes]

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
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    token = tmp_path_factory.mktemp("secret") / "token"
    token.touch(mode=0o600)
    token.write_text(TOKEN)
    made = Cluster(tmp_path_factory.mktemp("laptop"), tmp_path_factory.mktemp("shared"), token)
    try:
        made.begin()
        write_recipe(made.laptop, made.shared)
        yield made
    finally:
        made.kill(made.nodes)
        shutil.rmtree(made.place, ignore_errors=True)


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


def test_a_run_outlives_the_laptop_and_is_stopped_with_a_checkpoint(cluster: Cluster) -> None:
    environment = cluster.environment | {"RAY_AUTH_TOKEN_PATH": os.devnull, "RAY_AUTH_TOKEN": "another"}
    refused = subprocess.run(cluster.command("jobs"), env=environment, capture_output=True, text=True, check=False)
    assert (refused.returncode, "does not take the token of the environment" in refused.stderr) == (2, True)

    laptop = cluster.start("submit", "far.yaml")
    printed = wait_for("loss", laptop)
    assert re.search(r"sending \d\.\d MB \(code \d\.\d MB, data\.path 0\.0 MB\) to http://127", printed)
    job, sent = re.search(r"^job (\S+), cuboid (\S+), run", printed, re.MULTILINE).groups()
    assert f"cuboid {sent} on " in printed
    laptop.kill()
    laptop.communicate()

    assert re.search(rf"^{job}  running    \d{{4}}-.*  {cluster.shared}/far$", cluster.run("jobs"), re.MULTILINE)
    follower = cluster.start("logs", "--follow", job)
    assert printed.split("Running entrypoint")[1].splitlines()[1] in wait_for("loss", follower)
    os.kill(follower.pid, signal.SIGINT)
    said, _ = follower.communicate(timeout=30)
    assert follower.returncode == 130
    assert f"{job} goes on. follow it: " in said
    assert f"stop {job} --address {cluster.url}" in said

    commands = cluster.command_lines()
    stopped = cluster.run("stop", job)
    folder = cluster.shared / "far"
    last = read_metrics(folder)[-1]["step"]
    assert max(steps(folder / "checkpoints")) == last
    assert f"cuboid: stopped after step {last} of 100000\n{job}: stopped" in stopped
    assert re.search(rf"^{job}  stopped ", cluster.run("jobs"), re.MULTILINE)
    ranks = standin.worker_pids(folder)
    assert ranks
    own = [process for process, line in commands.items() if process.pid in ranks or "cuboid.launch.cli train" in line]
    assert len(own) >= len(set(ranks)) + 2, "the driver, its host process, and the ranks"
    standin.wait_until_gone(own)
    assert TOKEN.encode() not in b"".join(path.read_bytes() for path in cluster.shared.rglob("*") if path.is_file())
    assert f"knows no job {job}0" in cluster.run("stop", f"{job}0", code=2)


def test_rays_own_command_does_too(cluster: Cluster) -> None:
    """With the code that the cluster has."""
    ray = [BIN / "ray", "job", "submit", "--address", cluster.url, "--working-dir", "."]
    command = [*ray, "--", "cuboid", "train", "far.yaml", "name=plain", "train.steps=20"]
    asked = {"cwd": cluster.laptop, "env": cluster.environment, "capture_output": True, "text": True, "check": False}
    done = subprocess.run(command, timeout=180, **asked)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^cuboid \S+ on ", done.stdout, re.MULTILINE)
    assert "done: 20 steps" in done.stdout
    assert [record["step"] for record in read_metrics(cluster.shared / "plain")] == list(range(1, 21))


def test_a_lost_head_costs_no_more_than_since_the_checkpoint(cluster: Cluster) -> None:
    """Head, driver and job are gone at once; ranks on the other node train on, until those of the next start."""
    folder, every = cluster.shared / "far", 50
    sent = ("submit", "far.yaml", "--detach", f"checkpoint.every={every}", "checkpoint.asynchronous=false")
    begun = len(standin.events(folder, "start"))
    cluster.run(*sent)
    lost = next_start(folder, begun)
    wait(lambda: done(folder) > lost["step"] + every)
    ranks = [psutil.Process(place["pid"]) for place in lost["ranks"].values()]
    dark = time.time()
    cluster.kill(cluster.nodes[:1])
    stood_at = done(folder)
    assert all(map(standin.is_alive, ranks)), "of the other node"

    cluster.begin()
    cluster.run(*sent)
    standin.wait_until_gone(ranks, 200)
    gone, came_to = time.time(), done(folder)
    again = next_start(folder, begun + 1)
    wait(lambda: done(folder) > came_to)
    assert stood_at - every <= again["step"], "from the newest checkpoint"
    assert came_to - again["step"] <= every
    assert "a newer start of this run has begun" in (folder / "logs" / "rank-0.txt").read_text()
    assert not standin.events(folder, "rank_error")
    found = [record["step"] for record in read_metrics(folder)]
    assert found == list(range(found[0], found[0] + len(found))), "each step stands once"
    seats = standin.events(folder, "workers")[-1]["time"]
    assert gone - seats < 15, "they look each second"
    assert again["time"] - dark < 120, "60 are promised; on two idle cores it takes 40, a new head included"


def done(folder: Path) -> int:
    """The newest step of a run."""
    return max((record["step"] for record in read_metrics(folder)), default=0)


def next_start(folder: Path, begun: int) -> dict[str, Any]:
    """Of ranks, once there are more starts than ``begun``."""
    wait(lambda: len(standin.events(folder, "start")) > begun)
    return standin.events(folder, "start")[begun]


def wait(holds: Callable[[], object], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.1)
