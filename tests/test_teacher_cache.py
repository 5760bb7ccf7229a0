"""A teacher's likeliest tokens, written on one mesh and read on another: the numbers of the teacher itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import model_config
from harness import RanksFailed, run_ranks
from runs import events, losses, recipe_on, run
from test_check import complaints
from transformers import AutoModelForCausalLM

from cuboid.parallel.errors import RunFailed
from cuboid.parallel.loss import IGNORE
from cuboid.trainer import assemble, teach
from cuboid.trainer.cache import facts_of
from cuboid.trainer.data import Batch
from cuboid.trainer.loop import train
from cuboid.trainer.model_config import read_checked_config
from cuboid.trainer.recipe import ModelSettings, Recipe
from cuboid.trainer.restore import read_facts
from cuboid.trainer.teacher_cache import cached_teacher, key_of

LENGTH, TOP_K = 16, 6


def save_teacher(folder: Path, *, seed: int) -> None:
    torch.manual_seed(seed)
    config = model_config("llama", False, 2) | {"vocab_size": 264}
    model = AutoModelForCausalLM.from_config(read_checked_config(ModelSettings(config=config)))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(12)
    model.save_pretrained(folder)


def taught(mesh: str, folder: Path, **distill: Any) -> Recipe:
    """A run of more than one epoch of 37 samples, whose last batches are cut."""
    text = folder / "text.txt"
    text.write_text((Path(__file__).parents[1] / "LICENSE").read_text()[: 37 * LENGTH])
    steps = {"steps": distill.pop("steps", 8)}
    changes = {
        "data": {"path": str(text), "sequence_length": LENGTH},
        "optimizer": {"schedule": "constant"},
        "train": steps,
        "parallel": {"microbatches": 2},
    }
    plain = recipe_on(mesh, changes=changes).model_dump(mode="json")
    given = {"teacher": str(folder / "teacher"), "temperature": 2.0, "weight": 0.7, "top_k": TOP_K}
    return Recipe.model_validate(plain | {"distill": given | distill})


def test_a_run_goes_on_from_a_cache_that_another_mesh_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_teacher(tmp_path / "teacher", seed=0)
    cache = tmp_path / "cache"
    run(taught("2x1x1", tmp_path), tmp_path / "live")
    run_ranks(teach.teach, 2, taught("1x1x2", tmp_path, cache=str(cache)), tmp_path, timeout=60)
    run(taught("2x1x1", tmp_path, steps=3), tmp_path / "cached")
    with monkeypatch.context() as patch:
        patch.setattr(assemble, "live_teacher", lambda *_: pytest.fail("the teacher was built"))
        run(taught("2x1x1", tmp_path, cache=str(cache)), tmp_path / "cached")
    assert events(tmp_path / "cached", "start")[-1]["step"] == 3
    for (step, *found), (_, *wanted) in zip(losses(tmp_path / "cached"), losses(tmp_path / "live"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5), step
    facts = facts_of(cache)
    assert facts is not None
    assert facts["samples"] == 37, "an epoch is written once"
    keys = np.fromfile(cache / "keys.bin", "<u8")
    assert sorted(keys) == keys.tolist()

    save_teacher(tmp_path / "teacher", seed=1)
    with pytest.raises(RanksFailed, match=r"distill.cache=\S+ was written with a distill.teacher with other weights"):
        run(taught("2x1x1", tmp_path, cache=str(cache), steps=9), tmp_path / "new")
    with pytest.raises(RanksFailed, match=r"the teacher \(fingerprint .*\) is not step-00000008's"):
        run(taught("2x1x1", tmp_path, steps=9), tmp_path / "live")
    assert "teacher" in read_facts(tmp_path / "live" / "checkpoints" / "step-00000008")


def test_a_cache_of_other_data_is_refused(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher", seed=0)
    cache = str(tmp_path / "cache")
    run_ranks(teach.teach, 1, taught("1x1x1", tmp_path, cache=cache, steps=2), tmp_path, timeout=60)
    with pytest.raises(RanksFailed, match=r"holds 16 samples, and the run reads 24; write it anew"):
        run_ranks(train, 1, taught("1x1x1", tmp_path, cache=cache, steps=3), tmp_path / "long", timeout=60)
    other = taught("1x1x1", tmp_path, cache=cache, steps=2)
    other = other.model_copy(update={"seed": other.seed + 1})
    with pytest.raises(RanksFailed, match=r"was written for other data"):
        run_ranks(train, 1, other, tmp_path / "other", timeout=60)


@pytest.mark.full
def test_the_command(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher", seed=0)
    recipe = taught("1x2x1", tmp_path, cache=str(tmp_path / "cache"))
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    command = [sys.executable, "-m", "cuboid.launch.cli", "teach", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.splitlines()[-1] == f"{tmp_path}/cache: the 6 likeliest tokens at each place of 37 samples, 0.0 MB"
    )


def test_a_key_tells_content_and_place() -> None:
    ids, places = np.arange(8), np.arange(8)
    assert key_of(ids, places) == key_of(ids.copy(), places.copy())
    assert len({key_of(ids, places), key_of(places[::-1].copy(), places), key_of(ids, places % 4)}) == 3


def test_a_sample_that_was_never_taught_is_not_taken_for_another(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher", seed=0)
    recipe = taught("1x1x1", tmp_path, cache=str(tmp_path / "cache"), steps=1)
    run_ranks(teach.teach, 1, recipe, tmp_path, timeout=60)
    unknown = torch.zeros(1, LENGTH, dtype=torch.int64)
    with pytest.raises(RunFailed, match="does not hold a sample of this step"):
        cached_teacher(recipe, is_last=True).targets(Batch(unknown, unknown, unknown))
    unasked = Batch(unknown, unknown + IGNORE, unknown)
    assert not cached_teacher(recipe, is_last=True).targets(unasked)["teacher"].any(), "it predicts nothing"


def test_what_is_asked_of_a_cache_is_checked_before_a_process_starts(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher", seed=0)
    cache = tmp_path / "cache"
    run_ranks(teach.teach, 1, taught("1x1x1", tmp_path, cache=str(cache), steps=1), tmp_path, timeout=60)
    for changes, told in (
        ({"top_k": None}, "holds the teacher's likeliest tokens, and distill.top_k=null asks for all; give"),
        ({"cache": str(tmp_path)}, "holds no predictions of a teacher; write them first: cuboid teach RECIPE"),
        ({"top_k": 5}, "was written with distill.top_k=6; use the same, or write it anew: cuboid teach RECIPE"),
        ({"temperature": 1.0}, "was written with distill.temperature=2.0; use the same"),
    ):
        (line,) = complaints(taught("1x1x1", tmp_path, **({"cache": str(cache)} | changes)))
        assert line.startswith("distill.cache=")
        assert told in line
    facts = json.loads((cache / "facts.json").read_text())
    (cache / "facts.json").write_text(json.dumps(facts | {"format": 0}))
    (line,) = complaints(taught("1x1x1", tmp_path, cache=str(cache)))
    assert "holds no predictions" in line
