"""Promise 3, end to end: a run that was killed goes on bit for bit, and on any other mesh within rounding."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from harness import RanksFailed, run_ranks
from runs import EVERY, STEPS, check_resumed, events, losses, recipe_on, run, saved_facts, shards
from samples import said, write_rows
from stores import flip, kill_at_file_operation

from cuboid.launch.progress import told
from cuboid.trainer.checkpoint import load
from cuboid.trainer.engine import NativeEngine, StepResult
from cuboid.trainer.inspection import listing
from cuboid.trainer.loop import train
from cuboid.trainer.manifest import PARTIAL, read_manifest
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.runlog import read_metrics
from cuboid.trainer.tensor_table import read_table


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(recipe_on(), folder)
    return folder


def tensors(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    path = checkpoint_of(folder, step)
    table = read_table(path, read_manifest(path))
    whole = {name: torch.empty(record.shape) for name, record in table.items()}
    load(path, whole)
    return whole


def before_step(number: int, call: Callable[[], None]) -> None:
    """In this rank, do something when the batch of a step has been read; what is asked for later comes first."""
    backward, steps = NativeEngine.backward, iter(range(1, STEPS + 1))

    def called(engine: NativeEngine, *args: Any, **told: Any) -> StepResult:
        if next(steps) == number:
            call()
        return backward(engine, *args, **told)

    NativeEngine.backward = called  # type: ignore[method-assign]


def checkpoint_of(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def wait_for(path: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.005)


def _train_and_die_in_a_save(recipe: Recipe, folder: Path, victim: int, save: int, operation: int) -> None:
    """SIGKILL at the n-th file operation from the rank's first one in the partial folder on."""
    if os.environ["RANK"] == str(victim):
        kill_at_file_operation(operation, folder=folder / "checkpoints", begin=f"{PARTIAL}{save:08d}")
    train(recipe, folder)


def _train_and_die_in_a_step(recipe: Recipe, folder: Path, victim: int, step: int, delay: float) -> None:
    """SIGKILL some time after a step began, when the checkpoint before it is whole; the last step does not end."""

    def light_the_fuse() -> None:
        wait_for(checkpoint_of(folder, (step - 1) // EVERY * EVERY))
        Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    if os.environ["RANK"] == str(victim):
        before_step(STEPS, lambda: time.sleep(60))
        before_step(step, light_the_fuse)
    train(recipe, folder)


def run_and_kill(work: Callable[..., None], folder: Path, victim: int, *when: Any) -> None:
    with pytest.raises(RanksFailed, match=rf"rank {victim} failed:\ndied with exit code -9"):
        run_ranks(work, 8, recipe_on(), folder, victim, *when, timeout=120)


def go_on(undisturbed: Path, folder: Path) -> None:
    """Start again; the end is the same, bit for bit."""
    run(recipe_on(), folder)
    assert losses(folder) == losses(undisturbed)
    assert shards(folder, STEPS) == shards(undisturbed, STEPS)


# rank 5 in front of its own file, rank 0 in front of the manifest
@pytest.mark.parametrize(("victim", "operation"), [(5, 2), (0, 5)])
def test_a_run_killed_in_a_save_goes_on_bit_for_bit(
    undisturbed: Path, tmp_path: Path, victim: int, operation: int
) -> None:
    run_and_kill(_train_and_die_in_a_save, tmp_path, victim, 6, operation)
    (partial,) = (tmp_path / "checkpoints").glob(f"{PARTIAL}00000006-*")
    assert not (partial / "manifest.json").exists()
    go_on(undisturbed, tmp_path)
    check_resumed(tmp_path, at=3)
    assert not partial.exists()


def test_a_run_killed_in_a_step_goes_on_bit_for_bit(undisturbed: Path, tmp_path: Path) -> None:
    run_and_kill(_train_and_die_in_a_step, tmp_path, 7, 8, 0.0)
    assert len(losses(tmp_path)) == 7
    go_on(undisturbed, tmp_path)
    check_resumed(tmp_path, at=6)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(4))
def test_a_kill_at_any_moment_loses_nothing(undisturbed: Path, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    victim = draw.choice([0, draw.randrange(8)])
    if seed % 2:
        step, delay = draw.randrange(EVERY + 1, STEPS + 1), draw.random() * 0.3
        run_and_kill(_train_and_die_in_a_step, tmp_path, victim, step, delay)
        at_least = (step - 1) // EVERY * EVERY
    else:
        save, operation = draw.choice([6, 9]), draw.randrange(1, 3 if victim else 15)
        run_and_kill(_train_and_die_in_a_save, tmp_path, victim, save, operation)
        at_least = save - EVERY
    go_on(undisturbed, tmp_path)
    (at,) = (event["step"] for event in events(tmp_path, "start")[1:])
    assert at_least <= at <= at_least + EVERY
    check_resumed(tmp_path, at=at)


MESHES: list[tuple[str, dict[str, Any]]] = [
    ("1x1x1", {}),
    ("4x1x1", {}),
    ("1x4x1", {"microbatches": 2}),
    ("2x1x2", {"schedule": "interleaved_1f1b"}),
    ("1x2x2", {"shard": False, "activation_checkpointing": "full"}),
    ("2x2x1", {"schedule": "zbv"}),  # both copies of the tied embedding on one rank
    ("1x4x2", {"shard": 2, "microbatches": 2}),
]


@pytest.mark.parametrize(("mesh", "parallel"), MESHES, ids=lambda value: value if isinstance(value, str) else "")
def test_another_mesh_goes_on_within_rounding(
    undisturbed: Path, tmp_path: Path, mesh: str, parallel: dict[str, Any]
) -> None:
    """Optimizer and data position included: a lost or repeated sample, or a moment, would show in the next loss."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    for step in (6, 9):
        shutil.rmtree(checkpoint_of(tmp_path, step))
    run(recipe_on(mesh, **parallel), tmp_path)
    check_resumed(tmp_path, at=3)
    for (step, loss, norm), (_, expected, expected_norm) in zip(losses(tmp_path), losses(undisturbed), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5), step
        assert norm == pytest.approx(expected_norm, rel=1e-4), step
    start, expected_end, end = tensors(undisturbed, 3), tensors(undisturbed), tensors(tmp_path)
    for name, tensor in expected_end.items():
        update = (tensor - start[name]).norm()
        assert (end[name] - tensor).norm() <= 1e-3 * update, name


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    shard = sorted(checkpoint_of(tmp_path, 9).glob("*.safetensors"))[3]
    flip(shard)
    go_on(undisturbed, tmp_path)
    check_resumed(tmp_path, at=6)
    (refused,) = events(tmp_path, "checkpoint_refused")
    assert shard.name in str(refused["faults"])


def test_another_run_is_not_continued(undisturbed: Path, tmp_path: Path) -> None:
    """Ranks refuse together, in words: no launcher restarts what can never work."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    other = recipe_on("1x2x1").model_copy(update={"seed": 7})
    with pytest.raises(RanksFailed, match=r"UserErrors: seed=7 differs from the run's 1234"):
        run_ranks(train, 2, other, tmp_path, timeout=60)
    text = tmp_path / "other.txt"
    text.write_text("other words " * 100)
    changed = recipe_on("1x2x1")
    changed = changed.model_copy(update={"data": changed.data.model_copy(update={"path": str(text)})})
    with pytest.raises(RanksFailed, match=r"data.path"):
        run_ranks(train, 2, changed, tmp_path, timeout=60)


def test_stop_file_saves_and_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "stop").write_text("interrupt")
    recipe = recipe_on("2x1x1")
    assert run_ranks(train, 2, recipe, tmp_path, timeout=60) == ["interrupt"] * 2
    assert [row["step"] for row in listing(tmp_path)] == [1]
    (tmp_path / "stop").unlink()
    assert [record["step"] for record in run(recipe, tmp_path)] == list(range(1, STEPS + 1))
    check_resumed(tmp_path, at=1)


def test_draws_are_repeated(undisturbed: Path, tmp_path: Path) -> None:
    """Dropout: no generator state is saved, since every draw is a function of seed, step and place."""
    recipe = recipe_on("1x2x1", changes={"config": {"attention_dropout": 0.1}})
    run(recipe, tmp_path)
    assert abs(losses(tmp_path)[0][1] - losses(undisturbed)[0][1]) > 1e-3, "nothing was dropped"
    whole, files = losses(tmp_path), shards(tmp_path, STEPS)
    for step in (6, 9):
        shutil.rmtree(checkpoint_of(tmp_path, step))
    run(recipe, tmp_path)
    check_resumed(tmp_path, at=3)
    assert losses(tmp_path) == whole
    assert shards(tmp_path, STEPS) == files


@pytest.mark.parametrize("mesh", ["2x2x1", pytest.param("1x1x2", marks=pytest.mark.full)])
def test_conversations_go_on_at_the_same_sample(tmp_path: Path, mesh: str) -> None:
    """Packed, some too long, one broken; evaluated on others."""
    words = [(f"{number}?" * (1 + number % 9), "yes" * (1 + number * number % 21)) for number in range(90)]
    for name, chosen in (("train", words[:70]), ("held-out", words[70:])):
        write_rows(tmp_path / f"{name}.jsonl", [{"messages": said(*turn)} for turn in chosen] + ["no JSON"])
    data = {"kind": "chat", "chat_template": "chatml", "sequence_length": 112, "broken": "skip", "truncation": "drop"}
    paths = {"path": str(tmp_path / "train.jsonl"), "eval_path": str(tmp_path / "held-out.jsonl")}
    changes = {"data": data | paths, "train": {"eval_every": STEPS}}
    folder = tmp_path / "run"
    run(recipe_on("2x2x1", changes=changes), folder)
    whole, evaluated = losses(folder), read_metrics(folder)[-1]["eval_loss"]
    trained, held_out = events(folder, "data")
    assert (trained["documents"], held_out["documents"]) == (70, 20)
    left_out = r"broken and skipped: 1 \(.*train.jsonl, line 71: not JSON.*, dropped as too long: 24"
    assert re.fullmatch(left_out, trained["left_out"])
    assert told(held_out) == f"evaluation data: {held_out['left_out']}"
    for step in (6, 9):
        shutil.rmtree(checkpoint_of(folder, step))
    shutil.rmtree(Path(os.environ["CUBOID_CACHE"]) / "packs")  # packed once more
    run(recipe_on(mesh, changes=changes), folder)
    check_resumed(folder, at=3)
    if mesh == "2x2x1":
        assert losses(folder) == whole
    for (_, loss, norm), (_, expected, expected_norm) in zip(losses(folder), whole, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
    assert read_metrics(folder)[-1]["eval_loss"] == pytest.approx(evaluated, rel=1e-5)


def test_the_data_goes_on_where_it_stood(undisturbed: Path) -> None:
    for step, facts in saved_facts(undisturbed).items():
        assert facts["data"]["next_sample"] == step * 8


def test_a_checkpoint_holds_safetensors_and_json_only(undisturbed: Path) -> None:
    """Of a real run; the first bytes too, since a pickle or a zip file may be called anything."""
    files = list(checkpoint_of(undisturbed, STEPS).iterdir())
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    for file in files:
        begin = file.read_bytes()[:9]
        assert begin[:1] == b"{" if file.suffix == ".json" else begin[8:] == b"{", file.name
