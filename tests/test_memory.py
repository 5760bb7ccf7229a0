"""A rank whose process may not have the memory that a step needs: told, and smaller microbatches at the next start."""

from __future__ import annotations

import os
import re
import resource
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from runs import check_resumed, events, losses, recipe_on, run

from cuboid.launch import local
from cuboid.launch.memory import predicted_beside
from cuboid.trainer.engine import NativeEngine, StepResult
from cuboid.trainer.loop import train
from cuboid.trainer.memory import _with_smaller
from cuboid.trainer.recipe import Recipe

_ROOM_BYTES = 290 << 20
"""Beyond what the process has before the step. A step takes 382 MB with microbatches of 8, and 192 MB with those of 4:
logits of 16 MB a sequence, three times."""


def _train_limited(recipe: Recipe, folder: Path) -> None:
    """The second rank may have no more in each step of a process but the first, in which threads begin."""
    step, begun = NativeEngine.step, count(1)

    def limited_step(engine: NativeEngine, *args: Any, **told: Any) -> StepResult:
        done = next(begun) - 1
        if os.environ["RANK"] == "0" or done < 1:
            return step(engine, *args, **told)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + _ROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        result = step(engine, *args, **told)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return result

    NativeEngine.step = limited_step  # type: ignore[method-assign]
    train(recipe, folder)


def limited() -> Recipe:
    changes = {
        "config": {"vocab_size": 8192},
        "data": {"sequence_length": 512},
        "train": {"steps": 3, "global_batch": 16},
        "checkpoint": {"every": 1, "asynchronous": False},
        "parallel": {"microbatches": 1},
    }
    recipe = recipe_on("1x2x1", changes=changes)
    return Recipe.model_validate({**recipe.model_dump(), "faults": {"shrink_microbatch": True}})


@pytest.mark.full
def test_a_launch_that_runs_out_of_memory_goes_on_with_smaller_microbatches(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = limited(), tmp_path / "limited"
    with predicted_beside(recipe, folder):
        pass
    assert local.launch(recipe, folder, train=_train_limited) == 0
    words = r"OutOfMemory: step 2 with microbatches of 8 \(parallel.microbatches=1\) needs more memory than there is: "
    words += r"peak \d\.\d\d GB, limit \d+\.\d\d GB; use parallel.microbatches=2, which changes no number"
    (failure,) = events(folder, "failure")
    assert re.search(words, failure["cause"])
    (found,) = events(folder, "out_of_memory")
    assert (found["rank"], found["step"], found["microbatch_size"]) == (1, 2, 8)
    assert found["peak_bytes"] < found["limit_bytes"] < 8 << 30, "the limit of the process, not the machine's memory"
    assert _ROOM_BYTES < found["predicted_bytes"] < 2 * _ROOM_BYTES, "it was foreseen that a step takes more"
    check_resumed(folder, at=1)
    (event,) = events(folder, "shrink")
    assert (event["microbatches"], event["microbatch_size"]) == (2, 4)
    assert "microbatches of 8 took too much memory: now 4" in capfd.readouterr().out
    undisturbed = run(recipe, tmp_path / "undisturbed")
    for (step, loss, norm), expected in zip(losses(folder), undisturbed, strict=True):
        assert step == expected["step"]
        assert loss == pytest.approx(expected["loss"], rel=1e-6)
        assert norm == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_microbatches_shrink_as_far_as_the_batch_divides() -> None:
    recipe = limited()
    smaller = [_with_smaller(recipe, too_large) for too_large in (8, 3, 1)]
    assert [found and found.batch_plan.microbatch_size for found in smaller] == [4, 2, None]
