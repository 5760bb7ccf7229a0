"""The checkpoint with the lowest held-out loss: saved, marked, kept and found, whatever is killed between."""

import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from harness import RanksFailed, run_ranks
from runs import events, losses, recipe_on, run
from stores import kill_at_file_operation, placed, save
from test_checkpoint_faults import in_child
from typer.testing import CliRunner

from cuboid.launch import cli
from cuboid.parallel.errors import UserErrors
from cuboid.parallel.layout import Layout
from cuboid.trainer import inspection
from cuboid.trainer.check import Devices, check
from cuboid.trainer.checkpoint import Checkpointer
from cuboid.trainer.loop import train
from cuboid.trainer.manifest import BEST, CheckpointError, incomplete, marked, steps
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.runlog import read_metrics


def recipe_that_keeps_the_best(text: Path, mesh: str = "2x1x1") -> Recipe:
    """Nine steps, each evaluated, saved every fourth; so fast that the loss of the text falls, and rises at the end."""
    text.write_text("Deeds will not be less valiant because they are unpraised. " * 9)
    changes = {
        "data": {"eval_path": str(text)},
        "optimizer": {"learning_rate": 3e-2},
        "train": {"eval_every": 1, "eval_batches": 1},
        "checkpoint": {"every": 4, "keep": 1, "best": "eval_loss"},
    }
    return recipe_on(mesh, changes=changes)


def evaluated(folder: Path) -> dict[int, float]:
    return {record["step"]: record["eval_loss"] for record in read_metrics(folder)}


def lowest_first(folder: Path) -> list[int]:
    """Steps whose loss is the lowest so far."""
    found = evaluated(folder)
    return [step for step, loss in found.items() if all(loss < found[before] for before in range(1, step))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(recipe_that_keeps_the_best(folder / "held-out.txt"), folder)
    return folder


def test_the_best_is_saved_marked_and_kept(undisturbed: Path, tmp_path: Path) -> None:
    lowest = lowest_first(undisturbed)
    assert 1 < len(lowest) < 9, "the loss must fall and rise for this test to tell anything"
    assert lowest[-1] < 4 or lowest[-1] % 4, "the best step is one that checkpoint.every alone would not save"
    assert [event["step"] for event in events(undisturbed, "checkpoint")] == sorted({*lowest, 4, 8, 9})
    folder = undisturbed / "checkpoints"
    assert list(steps(folder)) == [9, lowest[-1]]
    assert inspection.best(undisturbed) == inspection.resolve(folder / BEST) == steps(folder)[lowest[-1]]
    for record in read_metrics(undisturbed):
        assert record["eval_perplexity"] == math.exp(record["eval_loss"])
    listed = CliRunner().invoke(cli.app, ["checkpoint", "list", str(undisturbed)]).stdout.splitlines()
    assert [line.split()[-1] for line in listed] == ["latest", "best"]
    words = ["export", str(undisturbed), "--best", "--out", str(tmp_path / "out")]
    assert f"made of {inspection.best(undisturbed)};" in CliRunner().invoke(cli.app, words).stdout


def _train_and_die_before_the_mark(recipe: Recipe, folder: Path, number: int) -> None:
    """SIGKILL on rank 0 between the two last publications of a save: ``latest`` is replaced, ``best`` not yet."""
    replace, left = os.replace, iter(range(number - 1, -1, -1))

    def replaced(source: Any, target: Any) -> None:
        if Path(target).name == BEST and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = replaced
    train(recipe, folder)


def test_killed_between_the_two_publications_the_next_start_marks_it(undisturbed: Path, tmp_path: Path) -> None:
    recipe = recipe_that_keeps_the_best(tmp_path / "held-out.txt")
    with pytest.raises(RanksFailed, match="died with exit code -9"):
        run_ranks(_train_and_die_before_the_mark, 2, recipe, tmp_path, 2, timeout=120)
    folder, (first, second, *_) = tmp_path / "checkpoints", lowest_first(undisturbed)
    assert inspection.best(tmp_path) == steps(folder)[first]
    newest = next(iter(steps(folder)))
    assert newest == second
    with pytest.raises(RanksFailed, match="died with exit code -9"):  # at the next one: what the start mended is seen
        run_ranks(_train_and_die_before_the_mark, 2, recipe, tmp_path, 2, timeout=120)
    assert inspection.best(tmp_path) == steps(folder)[second]
    run(recipe, tmp_path)
    assert losses(tmp_path) == losses(undisturbed)
    assert evaluated(tmp_path) == evaluated(undisturbed)
    assert inspection.best(tmp_path).name == inspection.best(undisturbed).name
    assert list(steps(folder)) == list(steps(undisturbed / "checkpoints"))


def _save_the_best_and_die(folder: Path, number: int) -> None:
    seen = kill_at_file_operation(number, folder=folder)
    with Checkpointer(folder, keep=1, asynchronous=False) as checkpointer:
        checkpointer.save(2, placed(Layout(), None), {}, best=True)
    (folder.parent / "count").write_text(str(len(seen)))


@pytest.mark.full
def test_killed_at_every_file_operation_a_whole_checkpoint_is_marked(tmp_path: Path) -> None:
    marks = []
    for number in range(1, 100):
        folder = tmp_path / f"at-{number}"
        with Checkpointer(folder, keep=1, asynchronous=False) as checkpointer:
            checkpointer.save(1, placed(Layout(), None), {}, best=True)
        if in_child(_save_the_best_and_die, folder, number) == 0:
            break
        path = marked(folder, BEST)
        assert path is not None
        assert not incomplete(path)
        marks.append(path.name[-1])
    assert int((tmp_path / "count").read_text()) == len(marks) >= 15
    assert marks == sorted(marks)
    assert set(marks) == {"1", "2"}


@pytest.mark.full
def test_a_run_that_fell_back_marks_what_is_left(undisturbed: Path, tmp_path: Path) -> None:
    """The best checkpoint is gone: the next best is the one that is there."""
    recipe = recipe_that_keeps_the_best(tmp_path / "held-out.txt", mesh="1x1x1")
    recipe = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"keep": 9})})
    run(recipe, tmp_path)
    best = inspection.best(tmp_path)
    best.rename(tmp_path / "elsewhere")
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 10})})
    run(longer, tmp_path)
    left = {step: loss for step, loss in evaluated(tmp_path).items() if step in steps(tmp_path / "checkpoints")}
    assert inspection.best(tmp_path).name == f"step-{min(left, key=lambda step: left[step]):08d}"


def test_what_cannot_be_kept_is_told(tmp_path: Path) -> None:
    recipe = recipe_that_keeps_the_best(tmp_path / "held-out.txt")
    parts = {"train": {"eval_every": 0}, "checkpoint": {"every": 0}}
    changed = {name: getattr(recipe, name).model_copy(update=change) for name, change in parts.items()}
    with pytest.raises(UserErrors) as told:
        check(recipe.model_copy(update=changed), Devices("cpu", 8))
    assert re.findall(r"checkpoint\.best=eval_loss (.*)", str(told.value)) == [
        "has nothing to judge by: train.eval_every=0; use train.eval_every=1 or more, or null",
        "would keep a checkpoint of a run that saves none: checkpoint.every=0; use checkpoint.every=1 or more, or null",
    ]
    save(tmp_path / "checkpoints", placed(Layout(), None), 1)
    with pytest.raises(CheckpointError, match=r"marks no checkpoint as the best; a run with checkpoint.best=eval_loss"):
        inspection.best(tmp_path)
