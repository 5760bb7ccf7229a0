"""The script that `cuboid slurm` writes, and the requests that it refuses; the script at work: tests/test_slurm.py."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import runs
import transformers  # noqa: F401  (its log handler keeps the stream that it finds first; not the runner's)
from typer.testing import CliRunner

from cuboid.launch import cli, slurm
from cuboid.launch.placement import ranks_per_node
from cuboid.launch.slurm_options import SlurmOptions
from cuboid.parallel.errors import UserError
from cuboid.parallel.layout import Layout
from cuboid.trainer.recipe_file import dump_recipe, load_recipe


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = runs.recipe_on("2x2x2").model_copy(update={"runs": str(tmp_path / "my runs")})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))


def cuboid_slurm(*options: str, command: str = "slurm") -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, [command, "recipe.yaml", *options])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return done.exit_code, done.stdout, re.sub(r"[\s│]+", " ", done.stderr)


def test_the_script_asks_for_what_was_asked(tmp_path: Path) -> None:
    code, out, _ = cuboid_slurm(
        "--nodes", "2", "--cpus-per-node", "16", "--time", "1-12", "--partition", "main", "seed=5"
    )
    assert code == 0
    assert out == "wrote my runs/resume.sbatch\nsubmit it with: sbatch 'my runs/resume.sbatch'\n"
    script = tmp_path / "my runs/resume.sbatch"
    text = script.read_text()
    asked = re.findall(r"^#SBATCH --(.*)$", text, re.MULTILINE)
    assert asked == [
        "job-name=resume",
        "nodes=2",
        "ntasks-per-node=1",
        "cpus-per-task=16",
        "time=1-12",
        "partition=main",
        f"output='{tmp_path}/my runs/resume-%j.txt'",
        "open-mode=append",
        "requeue",
        "signal=B:USR1@120",
    ]
    assert " train recipe.yaml seed=5 launch.launcher=slurm launch.device=cpu &\n" in text
    subprocess.run(["bash", "-n", script], check=True)


def test_a_ray_cluster_is_one_option_away(tmp_path: Path) -> None:
    assert cuboid_slurm("--nodes", "2", "--launcher", "ray")[0] == 0
    text = (tmp_path / "my runs/resume.sbatch").read_text()
    assert " train recipe.yaml launch.launcher=ray launch.address=slurm launch.device=cpu &\n" in text


def test_the_page_shows_the_script_that_is_written(tmp_path: Path) -> None:
    runs_folder = "/proc/none"  # nothing is written there: the script is only rendered
    overrides = ["launch.launcher=slurm", "launch.device=cuda"]
    recipe = load_recipe("quickstart", [f"runs={runs_folder}", *overrides])
    options = SlurmOptions(
        recipe="quickstart", overrides=[f"runs={runs_folder}"], nodes=2, gpus_per_node=4, time="12:00:00"
    )
    text = slurm.script(recipe, Path(runs_folder, "quickstart.sbatch"), options).replace(runs_folder, "/shared/runs")
    page = (Path(__file__).parents[1] / "docs/slurm.md").read_text()
    shown = page.partition("```bash\n")[2].partition("```")[0]
    by_place = re.compile(r"^(# quickstart, by cuboid |cd |\S.* train ).*$", re.MULTILINE)
    assert by_place.sub("", shown) == by_place.sub("", text)
    (command,) = re.findall(r" train .*", shown)
    assert f"{command}\n" in text


@pytest.mark.parametrize(
    ("number", "restarts", "ending"),
    [
        (signal.SIGUSR1, 0, "scontrol requeue 7"),
        (signal.SIGUSR1, 100, "the job goes on with: sbatch 'my runs/resume.sbatch'"),
        (signal.SIGTERM, 0, "the job goes on with: sbatch 'my runs/resume.sbatch'"),
    ],
)
def test_a_signal_before_the_run_can_listen_stops_the_job_like_any_other(tmp_path, number, restarts, ending) -> None:
    """The script as it is, but for its command, which stands for Python at its start: any signal kills it."""
    assert cuboid_slurm("--nodes", "1")[0] == 0
    text = (tmp_path / "my runs/resume.sbatch").read_text()
    (tmp_path / "early.sbatch").write_text(
        re.sub(r"^.* train .* &$", "sleep 30 & touch begun", text, flags=re.MULTILINE)
    )
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho scontrol "$@"\n')
    (tmp_path / "scontrol").chmod(0o700)
    within = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    with subprocess.Popen(["bash", "early.sbatch"], env=os.environ | within, stdout=subprocess.PIPE, text=True) as job:
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        time.sleep(0.2)  # bash is at its traps within a millisecond
        job.send_signal(number)
        out, _ = job.communicate(timeout=10)
    assert (job.returncode, out.strip().endswith(ending)) == (85, True), out


def test_whole_nodes_unless_it_is_said_how_many_cpus(tmp_path: Path) -> None:
    assert cuboid_slurm("--nodes", "4", "--account", "us", "--qos", "high")[0] == 0
    text = (tmp_path / "my runs/resume.sbatch").read_text()
    assert {"exclusive", "account=us", "qos=high"} <= set(re.findall(r"^#SBATCH --(.*)$", text, re.MULTILINE))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nodes", "3"], "3 nodes: 8 ranks, of which 2 (parallel.tensor) stay together, do not divide by that;"),
        (["--nodes", "8"], "use 1, 2 or 4"),
        (["--nodes", "2", "--gpus-per-node", "8"], "16 GPUs for 8 ranks; use --gpus-per-node 4, or another"),
        (["--nodes", "2", "--time", "soon"], "--time soon is no time; use minutes, hours:minutes:seconds or days-"),
        (["--nodes", "2", "--time", "3"], "--time 3 leaves no time to train before --save-seconds 120 and"),
        (["--nodes", "2", "parallel.data=auto"], "parallel.data=auto cannot be settled before the cluster is reached"),
        (["--nodes", "2", "launch.launcher=ray"], "launch.launcher is settled by the job (--launcher); leave it out"),
        (["--nodes", "2", "runs=here"], "runs=here is relative"),
        (["--nodes", "0"], "Invalid value for '--nodes'"),
        ([], "Missing option '--nodes'"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_told_before_a_script_is_written(tmp_path: Path, options, words) -> None:
    code, _, err = cuboid_slurm(*options)
    assert (code, words in err) == (2, True), err
    assert not list(tmp_path.glob("**/*.sbatch"))


def test_ranks_start_on_the_nodes_of_a_job_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    code, _, err = cuboid_slurm("--launcher", "slurm", command="train")
    words = "launch.launcher=slurm runs within a Slurm job, and this is none; write a job with `cuboid slurm`"
    assert (code, words in err) == (2, True), err


def test_there_is_no_sbatch_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    code, out, err = cuboid_slurm("--nodes", "1", "--submit")
    assert (code, "there is no sbatch here; run it on the cluster's login node" in err) == (2, True)
    assert out == "wrote my runs/resume.sbatch\n"


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("5:30", 330), ("1:05:30", 3930), ("2-3", 183600), ("2-3:30", 185400), ("1-0:0:7", 86407)],
)
def test_time_limits_are_read_as_sbatch_reads_them(limit: str, seconds: int) -> None:
    assert slurm._seconds(limit) == seconds


def test_nodes_share_the_ranks_evenly() -> None:
    layout = Layout(pipeline=2, data=3, tensor=2)
    assert [ranks_per_node(layout, nodes) for nodes in (1, 2, 3, 6)] == [12, 6, 4, 2]
    with pytest.raises(UserError, match=r"^4 nodes: .* use 1, 2, 3 or 6$"):
        ranks_per_node(layout, 4)
