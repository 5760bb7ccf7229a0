"""What the loop records, refuses and survives: metrics, pictures, the tracker's run, other data, NaN, a full disk."""

from __future__ import annotations

import itertools
import json
import os
import resource
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import RanksFailed, run_ranks
from runs import STEPS, check_resumed, events, losses, recipe_on, run, saved_facts
from stores import sign

from cuboid.parallel.loss import SummedCrossEntropy
from cuboid.trainer import inspection, loop, recorder
from cuboid.trainer.engine import NativeEngine, StepResult
from cuboid.trainer.loop import train
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.runlog import read_metrics


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of two ranks that was stopped after its first step and went on, with trackio and pictures."""
    folder = tmp_path_factory.mktemp("runs") / "tracked"
    folder.mkdir()
    (folder / "stop").write_text("pause")
    track = {"to": "trackio", "project": "tests", "timeline_every": 4}
    recipe = recipe_on("2x1x1", changes={"track": track})
    assert run_ranks(train, 2, recipe, folder, timeout=120) == ["pause"] * 2
    (folder / "stop").unlink()
    run(recipe, folder)
    return folder


def test_a_resumed_run_is_one_run_of_the_tracker(tracked: Path) -> None:
    check_resumed(tracked, at=1)
    (run_id,) = {facts["run_id"] for facts in saved_facts(tracked).values()}
    assert [event["run_id"] for event in events(tracked, "tracker")] == [run_id] * 2
    assert events(tracked, "tracker_failed") == []
    with sqlite3.connect(tracked.parent / ".trackio" / "tests.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    told = [(name, step) for name, step, metrics in rows if b"bubble_measured" in bytes(metrics)]
    assert told == [(f"resume-{run_id}", step) for step in range(1, STEPS + 1)]


def test_every_step_has_its_numbers(tracked: Path) -> None:
    records = read_metrics(tracked)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:
        assert record["tokens"] == record["step"] * 8 * 32
        assert 0 < record["tokens_predicted"] <= 8 * 32
        assert record["memory_peak_bytes"] > 50 << 20, "a process with torch in it is larger"
        assert record["tokens_per_second"] * record["step_seconds"] == pytest.approx(8 * 32)
        assert len(record["bubble_by_stage"]) == 2
        assert all(0 <= share < 1 for share in record["bubble_by_stage"])
        assert record["bubble_measured"] == pytest.approx(sum(record["bubble_by_stage"]) / 2)
        assert record["bubble_ideal"] == pytest.approx(1 / 5)  # (p - 1) / (m + p - 1) of 1F1B
        parts = ("ideal", "imbalance", "optimizer", "input", "communication")
        assert record["bubble_measured"] == pytest.approx(sum(record[f"bubble_{part}"] for part in parts))
        assert 0 < record["bubble_expected"] < 1
        assert 0 < record["pipeline_seconds"] <= record["step_seconds"]


def test_chosen_steps_have_a_picture_and_a_trace(tracked: Path) -> None:
    """Step 2, each fourth, and the last."""
    steps = [f"step-{step:08d}" for step in (2, 4, 8, 9)]
    assert sorted(file.name for file in (tracked / "timeline").iterdir()) == sorted(
        f"{step}{suffix}" for step in steps for suffix in (".png", ".trace.json")
    )
    for step in steps:
        assert (tracked / "timeline" / f"{step}.png").read_bytes().startswith(b"\x89PNG")


def _order_of_imports(recipe: Recipe, folder: Path) -> list[str]:
    order = []

    def watch(name: str) -> None:
        call = getattr(recorder, name)
        setattr(recorder, name, lambda *a, **k: (order.append(name), call(*a, **k))[1])

    watch("import_matplotlib")
    watch("open_tracker")
    train(recipe, folder)
    return order


@pytest.mark.parametrize(("every", "expected"), [(4, ["import_matplotlib", "open_tracker"]), (0, ["open_tracker"])])
def test_what_draws_is_loaded_before_the_tracker_works(tmp_path: Path, every: int, expected: list[str]) -> None:
    """While matplotlib is loaded by half, trackio drops every number it is given."""
    changes = {"track": {"timeline_every": every}, "train": {"steps": 1}, "checkpoint": {"every": 0}}
    assert run_ranks(_order_of_imports, 1, recipe_on("1x1x1", changes=changes), tmp_path) == [expected]


# What cannot go on is refused by every rank, in words.


def test_another_text_in_the_same_file_is_refused(tmp_path: Path) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("one thing after another " * 50)
    recipe = recipe_on("1x1x1", changes={"data": {"path": str(text)}, "train": {"steps": 2}})
    run(recipe, folder)
    text.write_text("one thing after another " * 49 + "one thing before another")
    words = r"UserError: the data \(fingerprint \w{12}\) is not what step-00000002 was trained on \(\w{12}\); .*--fresh"
    with pytest.raises(RanksFailed, match=words):
        run_ranks(train, 1, recipe, folder, timeout=60)
    text.write_text("one thing after another " * 50)
    run(recipe, folder)
    check_resumed(folder, at=2)


def _train_in_a_place_of_its_own(recipe: Recipe, folder: Path) -> None:
    os.chdir(folder / os.environ["RANK"])
    train(recipe, folder / "run")


def test_ranks_that_read_different_data_are_refused(tmp_path: Path) -> None:
    for rank in "01":
        (tmp_path / rank).mkdir()
        (tmp_path / rank / "text.txt").write_text(f"the words of rank {rank} " * 100)
    recipe = recipe_on("1x2x1", changes={"data": {"path": "text.txt"}})
    words = r"UserError: the data's fingerprint differs: \w{12} on rank 0, \w{12} on rank 1"
    with pytest.raises(RanksFailed, match=words):
        run_ranks(_train_in_a_place_of_its_own, 2, recipe, tmp_path, timeout=60)


def test_a_checkpoint_that_stands_at_another_sample_is_refused(tmp_path: Path) -> None:
    recipe = recipe_on("1x1x1", changes={"train": {"steps": 2}})
    run(recipe, tmp_path)
    path = tmp_path / "checkpoints" / "step-00000002"
    facts = json.loads((path / "facts.json").read_text())
    assert facts["data"]["next_sample"] == 16
    facts["data"]["next_sample"] = 17
    (path / "facts.json").write_text(json.dumps(facts))
    sign(path)
    with pytest.raises(
        RanksFailed, match="step-00000002 stands at sample 17, and the step after it begins with sample 16"
    ):
        run_ranks(train, 1, recipe, tmp_path, timeout=60)


def _train_poisoned(recipe: Recipe, folder: Path, rank: str, poison: Callable[[NativeEngine], None]) -> None:
    """The rank is poisoned as its step 5 begins: it counts for itself, for rank 0 may yet have to write of step 4."""
    backward, steps = NativeEngine.backward, itertools.count(1)

    def called(engine: NativeEngine, *args: Any, **told: Any) -> StepResult:
        if next(steps) == 5 and os.environ["RANK"] == rank:
            poison(engine)
        return backward(engine, *args, **told)

    NativeEngine.backward = called  # type: ignore[method-assign]
    train(recipe, folder)


def _poison_loss(engine: NativeEngine) -> None:
    """The rank computes a loss that is not a number."""
    loss = SummedCrossEntropy.__call__

    def call(self: SummedCrossEntropy, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return loss(self, logits, labels) * float("nan")

    SummedCrossEntropy.__call__ = call  # type: ignore[method-assign]


POISONED = "model.layers.3.mlp.down_proj.weight"


def _poison_gradient(engine: NativeEngine) -> None:
    """One gradient of the second stage is not a number; the loss is finite."""
    dict(engine.parameters)[POISONED].register_hook(lambda gradient: gradient * float("nan"))


@pytest.mark.parametrize(
    ("mesh", "rank", "poison", "words"),
    [
        ("2x2x1", "3", _poison_loss, r"the loss is nan, first on rank 3 \(samples 36 to 39\)"),
        (
            "2x1x1",
            "1",
            _poison_gradient,
            rf"the gradient norm is nan, first on rank 1 in {POISONED} \(samples 32 to 39\)",
        ),
    ],
    ids=["loss", "gradient"],
)
def test_what_is_not_finite_stops_before_the_update(
    tracked: Path, tmp_path: Path, mesh: str, rank: str, poison: Callable[[NativeEngine], None], words: str
) -> None:
    recipe = recipe_on(mesh)
    with pytest.raises(RanksFailed, match=f"RunFailed: step 5: {words}; nothing was updated"):
        run_ranks(_train_poisoned, recipe.layout.world_size, recipe, tmp_path, rank, poison, timeout=60)
    assert [step for step, *_ in losses(tmp_path)] == [1, 2, 3, 4]
    run(recipe, tmp_path)
    check_resumed(tmp_path, at=3)
    for (step, loss, norm), (_, expected, expected_norm) in zip(losses(tmp_path), losses(tracked), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5), step
        assert norm == pytest.approx(expected_norm, rel=1e-4), step


# A disk that refuses: a size limit stands for it, under which every log fits and no shard.


def _train_with_a_full_disk(recipe: Recipe, folder: Path, step: int) -> None:
    """No shard of this step's checkpoint can be written."""
    begin, unlimited = loop.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(run: loop.Run) -> None:
        if run.step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        begin(run)
        run.checkpointer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    loop.save = save
    train(recipe, folder)


def test_a_run_outlives_a_checkpoint_that_could_not_be_written(tmp_path: Path) -> None:
    assert run_ranks(_train_with_a_full_disk, 1, recipe_on("1x1x1"), tmp_path, 6, timeout=60) == [None]
    assert [step for step, *_ in losses(tmp_path)] == list(range(1, STEPS + 1))
    (failed,) = events(tmp_path, "checkpoint_failed")
    assert failed["step"] == 6
    assert "File too large" in failed["cause"]
    assert failed["newest"] == str(tmp_path / "checkpoints" / "step-00000003")
    assert [event["step"] for event in events(tmp_path, "checkpoint")] == [3, 9]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-00000003", "step-00000009"]
    assert events(tmp_path, "stop")[-1]["reason"] == "done"


def test_a_run_whose_last_checkpoint_could_not_be_written_has_failed(tmp_path: Path) -> None:
    """Done, it would not be restarted, and its end would be lost."""
    newest = tmp_path / "checkpoints" / "step-00000006"
    words = rf"RunFailed: step 9 could not be saved \(rank 0: .*File too large\); the newest checkpoint is {newest}"
    with pytest.raises(RanksFailed, match=words):
        run_ranks(_train_with_a_full_disk, 1, recipe_on("1x1x1"), tmp_path, STEPS, timeout=60)
    assert events(tmp_path, "stop") == []
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-00000003", "step-00000006"]
    run(recipe_on("1x1x1"), tmp_path)
    check_resumed(tmp_path, at=6)
    assert inspection.verify(tmp_path / "checkpoints" / "step-00000009") == []
