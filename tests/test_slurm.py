"""`cuboid slurm` with a real Slurm: whatever ends a job, the run goes on with no step lost, to the same last bit."""

import math
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest
import runs
import slurm_cluster
import standin
from slurm_cluster import Cluster, signal_daemon

from cuboid.launch import slurm_step
from cuboid.launch.failures import newest_step, step_in_work
from cuboid.parallel.errors import UserError
from cuboid.trainer.recipe_file import dump_recipe
from cuboid.trainer.runlog import STOP_FILE

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

STEPS, EVERY = 240, 20
RECIPE = runs.recipe_on("2x2x1", changes={"train": {"steps": STEPS}, "checkpoint": {"every": EVERY, "keep": 3}})
PATIENCE = 240.0
"""Seconds for a job to start again and train: on an idle machine it takes 20."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="cuboid-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        patch.setenv("OMP_NUM_THREADS", "1")
        with slurm_cluster.cluster(Path(folder)) as running:
            yield running


@pytest.fixture(autouse=True)
def _no_job_is_left(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.cancel()


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run, undisturbed and without Slurm."""
    folder = tmp_path_factory.mktemp("calm")
    runs.run(RECIPE, folder)
    return folder


class Job:
    """A recipe's job: submitted, watched, and compared."""

    def __init__(self, cluster: Cluster, folder: Path, *options: str) -> None:
        self.cluster = cluster
        recipe = RECIPE.model_copy(update={"runs": str(folder)})
        self.folder, self.script = folder / recipe.name, folder / f"{recipe.name}.sbatch"
        (folder / "recipe.yaml").write_text(dump_recipe(recipe))
        words = ["slurm", "recipe.yaml", "--nodes", "2", "--cpus-per-node", "4", "--submit", *options]
        command = [sys.executable, "-m", "cuboid.launch.cli", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        self.id = re.search(r"Submitted batch job (\d+)", done.stdout)[1]

    def submit_again(self) -> None:
        self.id = self.cluster.ask("sbatch", "--parsable", str(self.script)).strip()

    def preempt(self) -> None:
        """By a job that has its nodes for a moment."""
        urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--parsable"]
        other = self.cluster.ask("sbatch", *urgent, "--wrap=true").strip()
        self.wait(lambda: self.cluster.state(other) == "COMPLETED")

    def printed(self) -> str:
        return self.script.with_name(f"{self.script.stem}-{self.id}.txt").read_text()

    def starts(self) -> list[int]:
        """The step after which each attempt went on."""
        return [event["step"] for event in standin.events(self.folder, "start")]

    def trains(self, attempt: int, *, until_saved: bool = False) -> None:
        """Wait until that attempt has done a step, or saved one as its interval says."""

        def holds() -> bool:
            if len(self.starts()) < attempt:
                return False
            done = newest_step(self.folder) if until_saved else step_in_work(self.folder) - 1
            return done > self.starts()[-1]

        self.wait(holds)

    def wait_for(self, state: str) -> None:
        self.wait(lambda: self.cluster.state(self.id) == state)

    def wait(self, holds) -> None:
        try:
            self.cluster.wait(holds, seconds=PATIENCE)
        except AssertionError as error:
            raise AssertionError(f"{self.printed()}\nlauncher: {self.launcher_log()}\n{error}") from None

    def launcher_log(self) -> str:
        return (self.folder / "logs/launcher.txt").read_text()

    def rank(self, rank: int) -> psutil.Process:
        return self.cluster.process(**standin.events(self.folder, "start")[-1]["ranks"][str(rank)])

    def is_like(self, calm: Path) -> None:
        """Done, to the same last bit, each step recorded once, and nobody left behind."""
        assert runs.losses(self.folder) == runs.losses(calm)
        assert runs.shards(self.folder, STEPS) == runs.shards(calm, STEPS)
        assert newest_step(self.folder) == STEPS
        left = [process for process in psutil.process_iter() if standin.is_alive(process) and self.owns(process)]
        assert not left

    def owns(self, process: psutil.Process) -> bool:
        try:
            return any(str(self.folder.parent) in word for word in process.cmdline())
        except psutil.NoSuchProcess:
            return False


def test_no_signal_costs_a_step(cluster: Cluster, calm: Path, tmp_path: Path) -> None:
    """Before the time limit, to one rank, twice, by preemption and scancel; back in the queue as often as allowed."""
    job = Job(cluster, tmp_path, "--time", "30", "--save-seconds", "90", "--max-requeues", "4")
    job.trains(1)
    cluster.ask("scancel", "--batch", "--signal=USR1", job.id)  # as Slurm sends it before the time limit

    job.trains(2)
    job.rank(3).send_signal(signal.SIGUSR1)

    job.trains(3)
    job.preempt()

    job.trains(4)
    slow = job.rank(0)
    slow.suspend()  # a step that lasts until Slurm has looked at its clock, every 30 seconds
    minutes = math.ceil((slurm_seconds(cluster.job(job.id)["RunTime"]) + 60) / 60)
    cluster.ask("scontrol", "update", f"jobid={job.id}", f"timelimit={minutes}")
    job.wait((job.folder / STOP_FILE).exists)
    slow.resume()
    job.wait_for("PENDING")
    cluster.ask("scontrol", "update", f"jobid={job.id}", "timelimit=30")

    job.trains(5)
    for _ in range(2):
        cluster.ask("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for("FAILED")  # the cap
    assert cluster.job(job.id)["ExitCode"] == "85:0"
    assert cluster.job(job.id)["Restarts"] == "4"
    assert job.printed().endswith(f"goes on with: sbatch {job.script.name}\n")

    job.submit_again()
    job.trains(6)
    cluster.ask("scancel", job.id)
    job.wait_for("CANCELLED")

    job.submit_again()
    job.wait_for("COMPLETED")
    stops = [event["step"] for event in standin.events(job.folder, "stop")]
    assert len(stops) == 7
    assert job.starts() == [0, *stops[:-1]]  # none lost, none repeated
    job.is_like(calm)


def allocation(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> str:
    """The number of a job of both nodes, without a script, in which this process is from now on."""
    subprocess.run(["salloc", "--no-shell", "--nodes=2", "--job-name=held"], check=True, capture_output=True)
    job = cluster.ask("squeue", "--noheader", "--format=%i", "--name=held").strip()
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    return job


def slurm_seconds(clock: str) -> int:
    hours, minutes, seconds = map(int, clock.split(":"))
    return (hours * 60 + minutes) * 60 + seconds


def test_a_hang_a_lost_rank_and_a_lost_node_cost_an_interval_at_most(
    cluster: Cluster, calm: Path, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, "launch.timeout_seconds=20")
    job.trains(1, until_saved=True)
    stopped = job.rank(3)
    stopped.suspend()
    job.trains(2, until_saved=True)
    standin.wait_until_gone([stopped])
    is_told_once(job, hung=3)
    (failure,) = standin.events(job.folder, "failure")
    assert (failure["rank"], failure["cause"].startswith("hung ")) == (3, True)
    assert failure["step"] - 1 - job.starts()[1] <= EVERY

    job.rank(2).kill()
    job.trains(3, until_saved=True)
    failure = standin.events(job.folder, "failure")[-1]
    assert (failure["rank"], failure["cause"]) == (2, "was killed by SIGKILL")
    assert failure["step"] - 1 - job.starts()[2] <= EVERY

    agent = job.rank(2).parent()
    agent.kill()
    job.trains(4, until_saved=True)
    failure = standin.events(job.folder, "failure")[-1]
    assert (failure["rank"], failure["cause"]) == (2, "was lost with its node n2")

    cluster.daemons["n2"].kill()  # with all that runs on the node, which cannot begin again
    job.wait(lambda: cluster.job(job.id)["Restarts"] == "1")
    cluster.start("n2")
    job.trains(5, until_saved=True)
    assert standin.events(job.folder, "failure")[-1]["step"] - 1 - job.starts()[4] <= EVERY

    cluster.ask("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    job.wait_for("PENDING")
    reached = step_in_work(job.folder) - 1
    cluster.ask("scontrol", "update", "nodename=n2", "state=resume")
    job.wait_for("COMPLETED")
    assert cluster.job(job.id)["Restarts"] == "2"
    assert reached - job.starts()[5] <= EVERY
    job.is_like(calm)


def is_told_once(job: Job, *, hung: int) -> None:
    """A hang of ranks on two machines, with what each machine knows of its own."""
    places = [place["host"] for place in standin.events(job.folder, "start")[0]["ranks"].values()]
    assert places == [socket.gethostname()] * 2 + ["n2"] * 2
    (hang,) = standin.events(job.folder, "hang")
    assert hang["waits"][0].startswith(f"rank {hung} hangs ")
    assert hang["waits"][0].endswith(", stopped by a signal")
    assert [path.name for path in (job.folder / "logs").glob("hang-*")] == ["hang-1.txt"]
    ranks = (job.folder / hang["details"]).read_text().split("\n--- rank ")[1:]
    stopped = [", state T: " in text for text in ranks]
    assert stopped == [rank == hung for rank in range(4)]
    assert ["most recent call first" in text for text in ranks] == [not is_stopped for is_stopped in stopped]


def test_a_node_that_does_not_begin_or_see_the_folder_is_named_and_none_outlives_the_driver(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocation(cluster, monkeypatch)
    nodes = slurm_step.job_nodes()
    assert nodes == list(slurm_cluster.NODES)
    with pytest.raises(
        UserError, match=r"node n[12] does not see the run's folder .*; give `runs` as an absolute path"
    ):
        slurm_step.run_step(tmp_path / "elsewhere", nodes, 1)
    assert not (tmp_path / "elsewhere").exists()

    halted, killed = tmp_path / "halted", tmp_path / "killed"
    for folder in (halted, killed):
        folder.mkdir()
        (folder / "recipe.yaml").write_text(dump_recipe(RECIPE))
    monkeypatch.setattr(slurm_step, "_START_SECONDS", 6.0)
    signal_daemon(cluster.daemons["n2"], signal.SIGSTOP)
    try:
        with pytest.raises(slurm_step.NodesMissing, match=r"^node n2 did not begin within 6 s \(.*launcher.txt\)$"):
            slurm_step.run_step(halted, nodes, 2)
    finally:
        signal_daemon(cluster.daemons["n2"], signal.SIGCONT)

    monkeypatch.setattr(slurm_step, "_START_SECONDS", 60.0)
    driver = get_context("fork").Process(target=slurm_step.run_step, args=(killed, nodes, 2))
    driver.start()
    cluster.wait(lambda: len(standin.worker_pids(killed)) == 4, seconds=PATIENCE)
    places = [place for event in standin.events(killed, "workers") for place in event["ranks"].values()]
    ranks = [cluster.process(**place) for place in places]
    agents = {rank.parent() for rank in ranks}
    assert len(agents) == 2
    driver.kill()
    standin.wait_until_gone([*ranks, *agents])


def test_a_ray_cluster_of_the_jobs_own_trains_and_loses_no_step(cluster: Cluster, calm: Path, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "--launcher", "ray", "--save-seconds", "90")
    job.trains(1)
    assert stat.S_IMODE((job.folder / ".ray/token").stat().st_mode) == 0o600
    ray = [psutil.Process(pid) for pid in pids_of_ray(job.id)]
    assert len({process.name() for process in ray} & {"gcs_server", "raylet"}) == 2
    places = standin.events(job.folder, "workers")[-1]["ranks"]
    assert len(places) == 4
    job.preempt()

    job.trains(2)
    standin.wait_until_gone(ray)
    cluster.ask("scancel", job.id)
    job.wait_for("CANCELLED")

    job.submit_again()
    job.wait_for("COMPLETED")
    stops = [event["step"] for event in standin.events(job.folder, "stop")]
    assert len(stops) == 3
    assert job.starts() == [0, *stops[:-1]]
    job.is_like(calm)
    assert not pids_of_ray(job.id)
    assert not Path(f"/tmp/cuboid-{os.getuid()}-{job.id}").exists()


IMPATIENT = "from cuboid.launch import cli, slurm_ray; slurm_ray.JOIN_SECONDS = 6.0; cli.main()"
"""The command, with less time than a minute for nodes to join."""


def test_a_node_that_does_not_join_the_jobs_ray_cluster_is_named(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its agent dies before it has started Ray."""
    job = allocation(cluster, monkeypatch)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(RECIPE.model_copy(update={"runs": str(tmp_path)})))
    words = ["train", str(tmp_path / "recipe.yaml"), "launch.launcher=ray", "launch.address=slurm"]
    folder = tmp_path / RECIPE.name
    agents: list[psutil.Process] = []

    def begins() -> list[psutil.Process]:
        with suppress(psutil.Error):
            agents.extend(p for p in cluster.second_node() if "cuboid.launch.slurm_ray" in p.cmdline())
        return agents

    with standin.command([sys.executable, "-c", IMPATIENT, *words], folder) as command:
        cluster.wait(begins, seconds=PATIENCE)
        agents[0].kill()
        _, err = command.communicate(timeout=PATIENCE)
    assert (command.returncode, err) == (1, "cuboid: node n2 did not join the Ray cluster within 6 s\n")
    (end,) = standin.events(folder, "end")
    assert (end["code"], end["cause"]) == (1, "node n2 did not join the Ray cluster within 6 s")
    assert not (folder / ".ray").exists()
    assert not pids_of_ray(job)


def pids_of_ray(job: str) -> list[int]:
    """Of the job's cluster, by the folder that all its processes know."""
    place = f"/tmp/cuboid-{os.getuid()}-{job}/"
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(place in word for word in process.cmdline()):
                found.append(process.pid)
    return found
