"""The command line: help in a blink, versions, exit codes, and mistakes told in words."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from math import log
from pathlib import Path

import pytest
import standin
import transformers  # noqa: F401  (its log handler keeps the stream that it finds first; not the runner's)
from harness import run_ranks
from stores import flip
from typer.testing import CliRunner

from cuboid.launch import cli, failures, recipe_options, training
from cuboid.launch.run_folder import open_run_folder
from cuboid.parallel.errors import RunFailed, UserError
from cuboid.trainer.loop import train
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.recipe_file import load_recipe
from cuboid.trainer.runlog import read_metrics

MINI = """\
# cuboid train mini.yaml
name: mini
model:
  config:
    model_type: llama
    vocab_size: 264
    hidden_size: 32
    intermediate_size: 64
    num_hidden_layers: 2
    num_attention_heads: 2
    bos_token_id: null
    eos_token_id: 256
data: {kind: text, path: text.txt, tokenizer: bytes, sequence_length: 16}
train: {steps: 3, global_batch: 4}
checkpoint: {every: 2}
track: {to: none, timeline_every: 0}
launch: {launcher: local, device: cpu}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "mini.yaml").write_text(MINI)
    (tmp_path / "text.txt").write_text("All that is gold does not glitter, not all those who wander are lost. " * 20)


def cuboid(*arguments):
    """Exit code, standard output and standard error of a command in this process."""
    done = CliRunner().invoke(cli.app, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return done.exit_code, done.stdout, done.stderr


def process(*arguments, kilobytes="unlimited"):
    """A command in a process of its own, whose files may have so many kilobytes."""
    limited = ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "bash"]
    words = [*limited, sys.executable, "-m", "cuboid.launch.cli", *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def test_help_answers_in_a_blink():
    heavy = {"torch", "ray", "transformers", "pydantic", "numpy", "yaml", "cuboid.trainer.recipe"}
    code = (
        "import sys\nfrom cuboid.launch.cli import main\n"
        "try: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    )  # fmt: skip
    spent = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=60)
        after = os.times()
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0
    assert not heavy & set(done.stderr.split())
    assert all(command in done.stdout for command in ("train", "export", "checkpoint", "schema"))
    # the goal, in processor time, which depends least on what else the machine does
    assert min(spent) < 0.3


def test_version_tells_the_revision():
    code, out, _ = cuboid("--version")
    assert code == 0
    git = ["git", "-C", str(Path(__file__).parents[1]), "rev-parse", "--short", "HEAD"]
    revision = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    assert re.fullmatch(rf"cuboid \d+\.\d+\.\d+\+g{revision}(\.dirty)?\n", out)


def test_schema_is_json():
    code, out, _ = cuboid("schema")
    assert code == 0
    assert set(json.loads(out)["properties"]) == set(Recipe.model_fields)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trane"], "No such command 'trane'"),
        (["train"], "Missing argument 'RECIPE'"),
        (["train", "mini.yaml", "--launcher", "pbs"], "'pbs' is not one of 'ray', 'local', 'slurm'"),
        (["export", "runs/x", "--to", "int2", "--out", "x"], "'int2' is not"),
        (["train", "mine"], "no recipe is called mine; shipped recipes, by bare name: distill, "),
        (["train", "mine.yaml"], "there is no recipe file mine.yaml"),
        (["train", "mini.yaml", "parallel.tensr=2"], "parallel.tensr is not a key; did you mean parallel.tensor?"),
        (["train", "mini.yaml", "train.steps=many"], '`train.steps=many`: train.steps="many" is not a whole number'),
        (["train", "mini.yaml", "parallel.tensor=4"], "`parallel.tensor=4`: parallel.tensor=4 does not divide"),
        (["train", "mini.yaml", "parallel.data=3"], "train.global_batch=4 is not a multiple of data x microbatches"),
        (["train", "mini.yaml", "data.path=nowhere.txt"], "`data.path=nowhere.txt`: data.path=nowhere.txt does not"),
        (["train", "mini.yaml", "model.config.vocab_size=100"], "mini.yaml:13: data.tokenizer=bytes has ids up to 256"),
        (["train", "mini.yaml", "seed=!!python/object/apply:os.abort []"], "the tag !!python/object/apply:os.abort is"),
        (["train", "mini.yaml", "runs=text.txt"], "runs=text.txt cannot be written"),
        (["train", "mini.yaml", "--resume"], "there is nothing to resume"),
        (["drill", "mini.yaml", "--faults", "boom"], "--faults: boom is no fault; use kill, segv, "),
        (["checkpoint", "list", "."], "holds no checkpoint"),
        (["checkpoint", "inspect", "text.txt"], "text.txt is a file; a checkpoint is a folder with manifest.json"),
        (["checkpoint", "verify", "nowhere"], "nowhere does not exist"),
        (["checkpoint", "verify", "model.pt"], "model.pt is a pickle (torch.save), which can run code when read;"),
        (["export", "nowhere", "--out", "x"], "nowhere does not exist"),
    ],
)  # fmt: skip
def test_mistakes_end_with_2_and_in_words(tmp_path, arguments, words):
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"weight": 1}))
    code, out, err = cuboid(*arguments)
    assert code == 2, out + err
    assert words in re.sub(r"[\s│]+", " ", err), err
    assert "Traceback" not in out + err


def test_a_mistake_that_a_rank_finds_ends_with_2_too(tmp_path):
    (tmp_path / "empty.txt").touch()
    done = process("train", "mini.yaml", "data.path=empty.txt")
    words = "cuboid: data.path=empty.txt has no usable document: all are empty; give some text\n"
    assert (done.returncode, done.stderr) == (2, words)
    assert all(line.startswith("memory: ") for line in done.stdout.splitlines())


def test_exit_codes_of_what_goes_wrong():
    for error, code in ((UserError("a\nb"), 2), (RunFailed("lost"), 1), (KeyboardInterrupt(), 130)):
        with pytest.raises(cli.typer.Exit) as caught, cli.told():
            raise error
        assert caught.value.exit_code == code
    with pytest.raises(cli.typer.Exit) as caught, cli.told():
        raise ModuleNotFoundError("no", name="ray.train")
    assert caught.value.exit_code == 2
    with pytest.raises(ModuleNotFoundError), cli.told():  # ours, not the user's
        raise ModuleNotFoundError("no", name="cuboid.nothing")


def test_completion_offers_recipes():
    assert recipe_options.recipe_names("qu") == ["quickstart"]
    assert recipe_options.recipe_names("mi") == ["mini.yaml"]


def test_a_run_folder_is_held_moved_and_compared(tmp_path):
    recipe = load_recipe("mini.yaml")
    with open_run_folder(recipe, "auto") as folder:
        assert folder == tmp_path / "runs" / "mini"
        assert load_recipe(folder / "recipe.yaml") == recipe
        with pytest.raises(UserError, match=r"runs/mini is in use by process \d+ on .*; stop it first"):
            open_run_folder(recipe, "auto").__enter__()
        with pytest.raises(UserError, match="in use"):
            open_run_folder(recipe, "fresh").__enter__()
    other = load_recipe("mini.yaml", ["optimizer.learning_rate=1.0"])
    with pytest.raises(UserError, match=r"optimizer.learning_rate=1.0 differs from the run's 0.0003") as caught:
        open_run_folder(other, "auto").__enter__()
    assert "--fresh begins anew" in str(caught.value)
    with open_run_folder(other, "fresh") as folder:
        assert load_recipe(folder / "recipe.yaml") == other
    assert load_recipe(tmp_path / "runs/mini.1/recipe.yaml") == recipe
    with open_run_folder(recipe, "fresh"):
        assert (tmp_path / "runs/mini.2").is_dir()
    (tmp_path / "runs/theirs").mkdir()
    (tmp_path / "runs/theirs/thesis.tex").touch()
    with pytest.raises(UserError, match="is not empty and not a run's folder"):
        open_run_folder(load_recipe("mini.yaml", ["name=theirs"]), "auto").__enter__()


def test_the_command_is_told_as_it_can_be_typed_again(tmp_path, monkeypatch):
    script = tmp_path / "my env/bin/cuboid"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert training.this_command() == "'my env/bin/cuboid'"
    monkeypatch.setenv("PATH", str(script.parent))
    assert training.this_command() == "cuboid"
    monkeypatch.chdir(script.parent)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", ["./cuboid"])
    assert training.this_command() == "./cuboid"
    (tmp_path / "cuboid").touch(mode=0o755)  # of another environment
    monkeypatch.setenv("PATH", str(tmp_path))
    assert training.this_command() == "./cuboid"


@pytest.mark.timeout(400)
def test_a_pipeline_is_killed_stopped_and_goes_on_as_the_screen_says(tmp_path):
    """Ends as a run that nobody disturbed, to the last bit; and the commands that it prints do what they say."""
    stages = ["parallel.pipeline=2", "parallel.microbatches=2", "train.steps=120", "checkpoint.every=4"]
    calm = load_recipe("mini.yaml", ["name=calm", *stages])
    with open_run_folder(calm, "auto") as folder:
        assert run_ranks(train, 2, calm, folder) == [None, None]
    losses = [record["loss"] for record in read_metrics(folder)]
    assert abs(losses[0] - log(264)) < 0.3  # of the last stage, as the first one's driver tells it
    assert losses[-1] < losses[0] - 0.5

    folder, script = tmp_path / "runs/mini", Path(sys.executable).with_name("cuboid")
    words = [str(script), "train", "mini.yaml", *stages, "--fresh"]
    with standin.command(words, folder) as driver:
        standin.wait_until(lambda: failures.newest_step(folder) >= 4, driver, seconds=150)
        os.kill(standin.ranks_of(folder)[1], signal.SIGKILL)
        standin.wait_until(lambda: len(standin.events(folder, "start")) == 2, driver, seconds=150)
        again = standin.events(folder, "start")[1]["step"]
        standin.wait_until(lambda: read_metrics(folder)[-1]["step"] > again, driver)
        os.kill(driver.pid, signal.SIGINT)
        out, err = driver.communicate(timeout=60)
    stopped = read_metrics(folder)[-1]["step"]
    assert (driver.returncode, err) == (130, f"cuboid: stopped after step {stopped} of 120\n")
    assert 4 <= again < stopped == failures.newest_step(folder)
    lines = out.splitlines()
    assert f"going on after step {again}" in lines
    told = [(int(step), loss) for step, loss in re.findall(r"^step (\d+)/120  loss (\S+)  .* tokens/s ", out, re.M)]
    assert all(loss == f"{losses[step - 1]:.4f}" for step, loss in told)
    assert {step for step, _ in told} >= set(range(1, stopped + 1))  # and steps that the kill undid

    assert lines[-1] == f"go on with: {script} train mini.yaml {' '.join(stages)}"
    done = subprocess.run(["bash", "-c", lines[-1].partition(": ")[2]], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"going on after step {stopped}" in done.stdout
    assert [record["loss"] for record in read_metrics(folder)] == losses
    following = re.findall(r"^next +(.*)$", done.stdout, re.M)
    assert following == [f"{script} export runs/mini --to hf --out mini-hf"]
    subprocess.run(["bash", "-c", following[0]], check=True, capture_output=True, timeout=120)
    assert (tmp_path / "mini-hf/model.safetensors").exists()


def test_a_checkpoint_that_cannot_be_written_is_told_at_once_and_ends_the_run(tmp_path):
    """On a disk that takes small files only: logs, but no tensors."""
    done = process("train", "mini.yaml", kilobytes=100)
    assert done.returncode == 1
    told = [line for line in done.stdout.splitlines() if not line.startswith(("step ", "memory: "))]
    assert told == ["checkpoint failed: shard-00000-00000.safetensors: File too large"] * 2
    words = "step 3 could not be saved (rank 0: shard-00000-00000.safetensors: File too large); there is no checkpoint"
    assert done.stderr.startswith(f"cuboid: {words}")
    assert not list((tmp_path / "runs/mini/checkpoints").glob("step-*"))


def test_a_run_from_the_command_to_its_end(tmp_path):
    """Trains, ends with the places of its results, goes on, and does not begin anew by accident."""

    def steps():
        return [json.loads(line)["step"] for line in (tmp_path / "runs/mini/metrics.jsonl").read_text().splitlines()]

    done = process("train", "mini.yaml")
    assert done.returncode == 0, done.stderr
    ending = done.stdout.splitlines()[-3:]
    assert ending == [
        "metrics     runs/mini/metrics.jsonl",
        "checkpoint  runs/mini/checkpoints/step-00000003",
        f"next        {sys.executable} -m cuboid.launch.cli export runs/mini --to hf --out mini-hf",
    ]
    assert steps() == [1, 2, 3]
    code, out, _ = cuboid("train", "mini.yaml")
    assert code == 0
    assert out.splitlines() == ["mini is complete; train.steps=6 goes on, --fresh begins anew", *ending]
    code, _, err = cuboid("train", "mini.yaml", "data.sequence_length=32", "seed=5", "parallel.data=2")
    assert code == 2
    assert "data.sequence_length=32 differs from the run's 16; set data.sequence_length=16" in err
    assert "seed=5 differs from the run's 1234; set seed=1234" in err
    assert "parallel" not in err
    done = process("train", "mini.yaml", "train.steps=5", "--resume")
    assert done.returncode == 0, done.stderr
    assert "going on after step 3" in done.stdout
    assert steps() == [1, 2, 3, 4, 5]
    code, out, _ = cuboid("checkpoint", "list", "runs/mini")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["5", "4", "3"]
    code, out, _ = cuboid("checkpoint", "inspect", "runs/mini")
    assert code == 0
    assert "step        5" in out
    assert "model.embed_tokens.weight" in out
    assert cuboid("checkpoint", "verify", "runs/mini")[0] == 0
    shard = max(
        (tmp_path / "runs/mini/checkpoints/step-00000005").glob("*.safetensors"), key=lambda path: path.stat().st_size
    )
    flip(shard, -1)
    code, out, _ = cuboid("checkpoint", "verify", "runs/mini")
    assert code == 1
    assert shard.name in out
