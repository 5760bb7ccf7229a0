"""Copies of checkpoints in a second place: whole or not there, behind the training, and a run that goes on from one."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from runs import check_resumed, events, recipe_on, run, shards
from stores import Events, fill, flip, listener, placed, save

from cuboid.launch.progress import told
from cuboid.launch.run_folder import open_run_folder
from cuboid.parallel.errors import FieldError, UserError
from cuboid.parallel.layout import Layout
from cuboid.trainer import inspection
from cuboid.trainer.check_folders import folder_errors
from cuboid.trainer.checkpoint import Checkpointer
from cuboid.trainer.copies import Copier, Store, open_store
from cuboid.trainer.manifest import BEST, LATEST, MANIFEST, step_name
from cuboid.trainer.publish import mark_best
from cuboid.trainer.recipe import Recipe


def saved(folder: Path, store: Store, *steps: int, keep: int = 9, asynchronous: bool = False) -> Events:
    """Checkpoints made and copied by one process; what was told of the copies."""
    heard, event = listener()
    copier = Copier(store, keep=keep, event=event)
    save(folder, fill(placed(Layout(), None)), *steps, keep=keep, asynchronous=asynchronous, copier=copier)
    return heard


@pytest.fixture
def memory() -> Iterator[str]:
    """An object store: it knows neither folders nor renames."""
    yield "memory://bucket/copies"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_every_checkpoint_is_copied_whole_and_the_newest_ones_stay(tmp_path: Path, asynchronous: bool) -> None:
    own, store = tmp_path / "checkpoints", Store(str(tmp_path / "second"), "run")
    place = tmp_path / "second" / "run"
    for step in (2, 4, 6):
        ((kind, fields),) = saved(own, store, step, keep=2, asynchronous=asynchronous)
        assert (kind, fields["step"], fields["bytes"]) == ("checkpoint_copied", step, fields["bytes"])
    assert [row["step"] for row in inspection.listing(place)] == [6, 4]
    for row in inspection.listing(place):
        assert not inspection.verify(row["path"])
    assert (place / "checkpoints" / LATEST).read_text() == "step-00000006\n"


def test_the_best_is_marked_and_stays(tmp_path: Path) -> None:
    own, store = tmp_path / "checkpoints", Store(str(tmp_path / "second"), "run")
    saved(own, store, 2)
    mark_best(own, own / step_name(2))
    store.put(own / step_name(2), keep=1)
    saved(own, store, 4, 6, keep=1)
    assert store.steps() == [6, 2]
    assert (tmp_path / "second" / "run" / "checkpoints" / BEST).read_text() == "step-00000002\n"


def test_an_object_store_gives_back_what_it_got(tmp_path: Path, memory: str) -> None:
    store = Store(memory, "run")
    saved(tmp_path / "own", store, 2, 4)
    found = store.fetch(tmp_path / "other", event=pytest.fail)
    assert found == tmp_path / "other" / step_name(4)
    assert not inspection.verify(found)
    assert inspection.resolve(tmp_path / "other" / LATEST) == found
    for file in (tmp_path / "own" / step_name(4)).iterdir():
        assert (found / file.name).read_bytes() == file.read_bytes()


def test_a_copy_that_fails_half_way_is_none_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "second"), "run")
    saved(tmp_path / "own", store, 2)
    put, left = store._fs.put_file, iter(range(2))

    def fails(source: str, target: str) -> None:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        put(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(store._fs, "put_file", fails)
        ((kind, fields),) = saved(tmp_path / "own", store, 4)
    assert (kind, fields["step"]) == ("checkpoint_copy_failed", 4)
    assert fields["cause"] == f"to {store.url}: OSError: [Errno 28] No space left on device"
    assert told({"kind": kind, **fields}) == f"checkpoint copy failed: {fields['cause']}", "on the screen too"
    assert not (tmp_path / "second" / "run" / "checkpoints" / step_name(4) / MANIFEST).exists()
    assert store.steps() == [2]
    assert [kind for kind, _ in saved(tmp_path / "own", store, 6)] == ["checkpoint_copied"]
    assert store.steps() == [6, 2]


def test_a_slow_store_never_holds_a_save_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest checkpoint waits, one that waited before it is left out, and none is removed while it is read."""
    store, own, heard = Store(str(tmp_path / "second"), "run"), tmp_path / "own", []
    may_go_on, put = threading.Event(), store.put
    monkeypatch.setattr(store, "put", lambda path, keep: may_go_on.wait(60) and put(path, keep=keep))
    tensors = placed(Layout(), None)
    copier = Copier(store, keep=9, event=lambda kind, **fields: heard.append((kind, fields.get("step"))))
    with Checkpointer(own, keep=1, asynchronous=True, copier=copier) as checkpointer:
        for step in (2, 4, 6):
            checkpointer.save(step, tensors, {})
            checkpointer.wait()
        assert heard == [("checkpoint_copy_left_out", 4)]
        assert [row["step"] for row in inspection.listing(own)] == [6, 2]
        may_go_on.set()
    assert heard[1:] == [("checkpoint_copied", 2), ("checkpoint_copied", 6)]
    assert store.steps() == [6, 2]


def copied(tmp_path: Path, **checkpoint: Any) -> Recipe:
    change = {"checkpoint": {"copy_to": str(tmp_path / "second"), **checkpoint}}
    return recipe_on("1x2x1", changes=change).model_copy(update={"runs": str(tmp_path / "runs")})


def test_a_run_whose_folder_is_lost_goes_on_from_the_newest_sound_copy(tmp_path: Path) -> None:
    recipe = copied(tmp_path)
    with open_run_folder(recipe, "auto") as folder:
        run(recipe, folder)
    assert [event["step"] for event in events(folder, "checkpoint_copied")] == [3, 6, 9]
    undisturbed = shards(folder, 9)
    shutil.rmtree(folder)
    second = tmp_path / "second" / "resume" / "checkpoints"
    flip(next((second / step_name(9)).glob("shard-00001*")))
    with open_run_folder(recipe, "resume") as folder:
        assert [row["step"] for row in inspection.listing(folder)] == [6]
        run(recipe, folder)
    (refused,) = events(folder, "checkpoint_copy_refused")
    assert "first in tensor" in refused["faults"][0]
    check_resumed(folder, at=6)
    assert shards(folder, 9) == undisturbed
    assert not inspection.verify(second / step_name(9)), "copied anew"


def test_a_run_that_begins_anew_moves_the_copies_aside(tmp_path: Path) -> None:
    recipe = copied(tmp_path)
    store = open_store(recipe)
    assert store
    saved(tmp_path / "own", store, 3)
    with open_run_folder(recipe, "fresh") as folder:
        assert not inspection.listing(folder)
    assert store.steps() == []
    assert [row["step"] for row in inspection.listing(tmp_path / "second" / "resume.1")] == [3]


def test_copies_that_are_all_broken_are_for_the_user_to_judge(tmp_path: Path) -> None:
    recipe = copied(tmp_path)
    store = open_store(recipe)
    assert store
    saved(tmp_path / "own", store, 3)
    flip(tmp_path / "second" / "resume" / "checkpoints" / step_name(3) / MANIFEST)
    for _ in range(2):  # the second time the folder is there already
        with pytest.raises(UserError, match="is whole; --fresh moves them aside and begins anew"):
            open_run_folder(recipe, "auto").__enter__()


@pytest.mark.parametrize(
    ("place", "more", "words"),
    [
        ("s4://bucket", {}, "checkpoint.copy_to=s4://bucket cannot be opened: Protocol not known: s4; use an absolute"),
        ("hdfs://me:hunter2@host/x", {}, "checkpoint.copy_to=[hidden] holds a password; leave it to the environment"),
        ("RUNS", {}, "is where the run itself lies (runs); use another folder, on another disk"),
        ("second", {"every": 0}, "has nothing to copy, since checkpoint.every=0 saves nothing"),
        ("second", {}, "checkpoint.copy_to=second is relative, and a cluster's nodes and jobs each have a working"),
    ],
)
def test_places_that_cannot_be_are_refused(tmp_path: Path, place: str, more: dict[str, Any], words: str) -> None:
    recipe = copied(tmp_path, copy_to=str(tmp_path / "runs") if place == "RUNS" else place, **more)
    found = [
        error for error in folder_errors(recipe, runs_here="relative" not in words) if isinstance(error, FieldError)
    ]
    assert words in str(found[0])
    assert "hunter2" not in str(found[0])
