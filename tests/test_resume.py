"""Promise 3, end to end: a run that was killed goes on bit for bit, and on any other mesh within rounding."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from harness import RanksFailed, run_ranks

from cuboid.parallel.loss import SummedCrossEntropy
from cuboid.trainer.checkpoint import load
from cuboid.trainer.inspection import listing
from cuboid.trainer.loop import train
from cuboid.trainer.manifest import read_manifest
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.runlog import read_events, read_metrics
from cuboid.trainer.tensor_table import read_table

STEPS, EVERY = 9, 3


def recipe_on(mesh: str = "2x2x2", **parallel: Any) -> Recipe:
    pipeline, data, tensor = (int(size) for size in mesh.split("x"))
    config = {
        "model_type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 264,
        "tie_word_embeddings": True,
    }
    return Recipe.model_validate(
        {
            "name": "resume",
            "model": {"config": config},
            "data": {"kind": "text", "path": str(Path(__file__).parents[1] / "LICENSE"), "sequence_length": 32},
            "parallel": {"pipeline": pipeline, "data": data, "tensor": tensor, "microbatches": 4, **parallel},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
            "train": {"steps": STEPS, "global_batch": 8},
            "checkpoint": {"every": EVERY, "keep": 10},
            "track": {"to": "none", "timeline_every": 0},
            "launch": {"device": "cpu", "timeout_seconds": 60},
        }
    )


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    os.environ["CUBOID_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["CUBOID_CACHE"]


def run(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """Train in forked ranks; the metrics of the run's folder."""
    assert set(run_ranks(train, recipe.layout.world_size, recipe, folder, timeout=120)) == {None}
    return read_metrics(folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(recipe_on(), folder)
    return folder


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in read_metrics(folder)]


def shards(folder: Path, step: int) -> dict[str, str]:
    """SHA-256 of every file of tensors."""
    files = read_manifest(folder / "checkpoints" / f"step-{step:08d}").files
    return {name: record.sha256 for name, record in files.items() if name.endswith(".safetensors")}


def tensors(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    path = folder / "checkpoints" / f"step-{step:08d}"
    table = read_table(path, read_manifest(path))
    whole = {name: torch.empty(record.shape) for name, record in table.items()}
    load(path, whole)
    return whole


def run_and_kill(recipe: Recipe, folder: Path, *, victim: int, after_step: int, delay: float) -> None:
    """SIGKILL one rank some time after a step was recorded, whatever it is doing then."""

    def kill() -> None:
        while not any(record["step"] >= after_step for record in read_metrics(folder)):
            time.sleep(0.005)
        time.sleep(delay)
        place = next(event for event in read_events(folder) if event["kind"] == "start")["ranks"][str(victim)]
        os.kill(place["pid"], signal.SIGKILL)

    Thread(target=kill, daemon=True).start()
    with pytest.raises(RanksFailed):
        run_ranks(train, recipe.layout.world_size, recipe, folder, timeout=120)


# a checkpoint is begun after step 6: with little delay the kill falls into its writing
@pytest.mark.parametrize(("victim", "delay"), [(0, 0.0), (5, 0.02), (7, 0.3)])
def test_a_killed_run_goes_on_bit_for_bit(undisturbed: Path, tmp_path: Path, victim: int, delay: float) -> None:
    run_and_kill(recipe_on(), tmp_path, victim=victim, after_step=6, delay=delay)
    assert len(losses(tmp_path)) < STEPS, "it was killed too late to show anything"
    run(recipe_on(), tmp_path)
    assert losses(tmp_path) == losses(undisturbed)
    assert shards(tmp_path, STEPS) == shards(undisturbed, STEPS)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(8))
def test_a_kill_at_any_moment_loses_nothing(undisturbed: Path, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    after, delay = draw.randrange(1, STEPS - 1), draw.random() * 0.3
    run_and_kill(recipe_on(), tmp_path, victim=draw.randrange(8), after_step=after, delay=delay)
    run(recipe_on(), tmp_path)
    assert losses(tmp_path) == losses(undisturbed)
    assert shards(tmp_path, STEPS) == shards(undisturbed, STEPS)


MESHES: list[tuple[str, dict[str, Any]]] = [
    ("1x1x1", {}),
    ("4x1x1", {}),
    ("1x4x1", {"microbatches": 2}),
    ("2x1x2", {"schedule": "interleaved_1f1b"}),
    ("1x2x2", {"shard": False, "activation_checkpointing": "full"}),
]


@pytest.mark.parametrize(("mesh", "parallel"), MESHES, ids=lambda value: value if isinstance(value, str) else "")
def test_another_mesh_goes_on_within_rounding(
    undisturbed: Path, tmp_path: Path, mesh: str, parallel: dict[str, Any]
) -> None:
    """Optimizer and data position included: a lost or repeated sample, or a moment, would show in the next loss."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    for step in (6, 9):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{step:08d}")
    run(recipe_on(mesh, **parallel), tmp_path)
    for (step, loss, norm), (_, expected, expected_norm) in zip(losses(tmp_path), losses(undisturbed), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5), step
        assert norm == pytest.approx(expected_norm, rel=1e-4), step
    start, expected_end, end = tensors(undisturbed, 3), tensors(undisturbed), tensors(tmp_path)
    for name, tensor in expected_end.items():
        update = (tensor - start[name]).norm()
        assert (end[name] - tensor).norm() <= 5e-3 * update, name


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "step-00000009"
    shard = sorted(newest.glob("*.safetensors"))[3]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    run(recipe_on(), tmp_path)
    (refused,) = [event for event in read_events(tmp_path) if event["kind"] == "checkpoint_refused"]
    assert shard.name in str(refused["faults"])
    assert losses(tmp_path) == losses(undisturbed)
    assert shards(tmp_path, STEPS) == shards(undisturbed, STEPS)


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


def _poisoned(recipe: Recipe, folder: Path) -> None:
    """A rank of data coordinate 1 computes a loss that is not a number in step 5."""
    loss = SummedCrossEntropy.__call__

    def call(self: SummedCrossEntropy, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        bad = os.environ["RANK"] == "6" and len(read_metrics(folder)) == 4
        return loss(self, logits, labels) * (float("nan") if bad else 1.0)

    SummedCrossEntropy.__call__ = call  # type: ignore[method-assign]
    train(recipe, folder)


def test_a_loss_that_is_nan_stops_before_the_update(undisturbed: Path, tmp_path: Path) -> None:
    words = r"RunFailed: step 5: the loss is nan, first on rank 6 \(samples 36 to 39\); nothing was updated"
    with pytest.raises(RanksFailed, match=words):
        run_ranks(_poisoned, 8, recipe_on(), tmp_path, timeout=60)
    assert losses(tmp_path) == losses(undisturbed)[:4]
    run(recipe_on(), tmp_path)
    assert losses(tmp_path) == losses(undisturbed)
