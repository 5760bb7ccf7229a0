"""The memory that is predicted for each rank, against what the C library has handed out in a real step."""

from __future__ import annotations

import ctypes
import gc
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from runs import events, recipe_on
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from cuboid.launch import cli
from cuboid.launch.memory import predicted_beside, too_small, words_of
from cuboid.launch.plan import parse_bytes
from cuboid.launch.progress import told
from cuboid.parallel.errors import UserError
from cuboid.parallel.mesh import connect
from cuboid.trainer.assemble import assemble, prepared
from cuboid.trainer.data import Batch
from cuboid.trainer.model import draw_blueprint
from cuboid.trainer.model_config import config_of
from cuboid.trainer.prediction import NotPredicted, predict
from cuboid.trainer.recipe import Recipe

TOO_LITTLE, TOO_MUCH = {"float32": 0.15, "bfloat16": 0.25}, 0.05
"""Share of the truth by which a prediction may be below it (what single operations and exchanges take for themselves,
and the nodes of autograd's graph) and above it."""
TOKENS = 256


class _Info(ctypes.Structure):
    """glibc's struct mallinfo2; ``uordblks`` are the bytes in use in its heaps, ``hblkhd`` those mapped one by one."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def handed_out() -> int:
    """Bytes that the C library has given to this process, on all threads, and not got back."""
    ask: Callable[[], _Info] = ctypes.CDLL(None).mallinfo2
    ask.restype = _Info  # type: ignore[attr-defined]
    info = ask()
    return info.uordblks + info.hblkhd


class Peak(TorchDispatchMode):
    """Asks after each operation of this thread."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        self.bytes = max(self.bytes, handed_out())
        return given


def fullest(recipes: list[Recipe]) -> list[int]:
    """Of each recipe, all on one layout: the bytes of this rank's engine in the fullest moment of its second step."""
    found = []
    with connect(recipes[0].layout, device=torch.device("cpu")) as block:
        for recipe in recipes:
            blueprint = draw_blueprint(config_of(recipe), compute=recipe.precision.compute)
            gc.collect()
            before = handed_out()
            engine = assemble(recipe, block, *prepared(recipe, blueprint))
            rows = recipe.train.global_batch // recipe.layout.data
            ids, positions = torch.randint(0, 250, (rows, TOKENS + 1)), torch.arange(TOKENS).repeat(rows, 1)
            positions[:, TOKENS // 3 :] -= TOKENS // 3
            batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions)
            engine.step(batch, learning_rate=1e-3)
            with Peak() as peak:
                engine.step(batch, learning_rate=1e-3)
            found.append(peak.bytes - before)
            del engine, batch
    return found


def sized(mesh: str, *, beside: dict[str, Any] | None = None, **parallel: Any) -> Recipe:
    """Large enough that tensors are what takes memory."""
    config = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "head_dim": 32, "vocab_size": 2048}
    changes = {"config": config, "data": {"sequence_length": TOKENS}, "train": {"global_batch": 32}}
    return Recipe.model_validate(recipe_on(mesh, changes=changes, **parallel).model_dump() | (beside or {}))


BFLOAT16 = {"precision": {"compute": "bfloat16"}}
QLORA = {"lora": {"rank": 4, "base": "nf4"}}
MESHES = {
    "2x1x1": (sized("2x1x1"), sized("2x1x1", schedule="zbv")),
    "1x2x1": (sized("1x2x1", beside=QLORA), sized("1x2x1", shard=False, activation_checkpointing="full")),
    "1x1x2": (sized("1x1x2"), sized("1x1x2", sequence=False, beside=QLORA)),
    "2x2x1": (
        sized("2x2x1", schedule="looped_bfs", reshard=True),
        sized("2x2x1", schedule="interleaved_1f1b", beside=BFLOAT16),
    ),
}


@pytest.mark.parametrize(
    "mesh", ["2x1x1", "1x2x1", *(pytest.param(mesh, marks=pytest.mark.full) for mesh in ("1x1x2", "2x2x1"))]
)
def test_what_is_predicted_is_what_a_step_takes(mesh: str) -> None:
    recipes = list(MESHES[mesh])
    layout = recipes[0].layout
    (predicted,) = run_ranks(lambda: [[rank.total for rank in predict(recipe)] for recipe in recipes], 1)
    measured = run_ranks(fullest, layout.world_size, recipes, timeout=120)
    for number, recipe in enumerate(recipes):
        foreseen = [predicted[number][layout.coordinate(rank).pipeline] for rank in range(layout.world_size)]
        shares = [round(total / measured[rank][number], 3) for rank, total in enumerate(foreseen)]
        least = 1 - TOO_LITTLE[recipe.precision.compute]
        assert all(least < share < 1 + TOO_MUCH for share in shares), (recipe.parallel, shares)


@pytest.mark.parametrize(
    ("beside", "parallel", "reason"),
    [
        ({"distill": {"teacher": "models/smollm2"}}, {}, "the teacher is not counted"),
        ({}, {"engine": "deepspeed", "zero_stage": 1}, "the deepspeed engine keeps buffers of its own"),
    ],
)
def test_what_is_not_counted_is_said(beside: dict[str, Any], parallel: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotPredicted, match=reason):
        predict(sized("1x2x1", beside=beside, **parallel))


def test_a_start_tells_the_fullest_rank(tmp_path: Path) -> None:
    recipe = recipe_on("2x1x1")
    (tmp_path / "logs").mkdir()
    with predicted_beside(recipe, tmp_path):
        pass
    (event,) = events(tmp_path, "memory")
    assert told(event) == event["words"]
    assert re.match(r"memory: \d+\.\d [KM]B on pipeline rank [01] at most \(\w+ .*\), 0% of its ", event["words"])
    assert (event["layout"], event["microbatch_size"], len(event["ranks"])) == (str(recipe.layout), 2, 2)
    first = event["ranks"][0]
    assert first["states"] > first["parameters"] + first["optimizer"]
    assert "; parameters, moments and gradients alone take " in words_of(event["ranks"], first["states"] // 2)


def test_only_what_is_certain_is_warned_of() -> None:
    rank = {"pipeline": 1, "states": 3_000_000_000, "total": 9_000_000_000}
    assert too_small([rank], 4 << 30) is None, "smaller microbatches may do"
    assert too_small([rank], 2_000_000_000) == (
        "parameters, moments and gradients alone take 3.00 GB of pipeline rank 1, which may have 2.00 GB; use 2 times "
        "as many pipeline, tensor or (with parallel.shard=true) data ranks, or lora"
    )


@pytest.mark.parametrize(
    ("words", "size"), [("80GiB", 80 << 30), ("24 GB", 24 * 10**9), ("1.5kib", 1536), ("512", 512)]
)
def test_memory_is_given_in_the_usual_words(words: str, size: int) -> None:
    assert parse_bytes(words) == size


@pytest.mark.parametrize("words", ["", "0", "much", "80 apples", "-1GB", "1e400GB", "GB"])
def test_other_words_for_memory_are_refused(words: str) -> None:
    with pytest.raises(UserError, match=r"--memory .*; use for example 80GiB or 24GB"):
        parse_bytes(words)


def planned(recipe: Recipe, file: Path, *options: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `cuboid plan`, in a process of its own."""
    file.write_text(json.dumps(recipe.model_dump(mode="json")))
    (done,) = run_ranks(_plan, 1, [str(file), *options])
    return done


def _plan(arguments: list[str]) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, ["plan", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_the_plan_of_a_recipe(tmp_path: Path) -> None:
    recipe, file = recipe_on("2x64x1", changes={"train": {"global_batch": 256}}), tmp_path / "recipe.yaml"
    code, printed, _ = planned(recipe, file, "--json")
    found = json.loads(printed)
    assert (code, found["ranks"], found["tokens_per_step"]) == (0, 128, 256 * 32), "more ranks than fit on this machine"
    assert [stage["pipeline"] for stage in found["stages"]] == [0, 1]
    assert found["bubble_ideal"] == pytest.approx(1 / 5)
    assert [rank["pipeline"] for rank in found["memory"]] == [0, 1]
    code, printed, _ = planned(recipe, file, "launch.device=cuda", "--memory", "1KB")
    assert code == 0
    assert "bubble: " in printed
    assert "warning: parameters, moments and gradients alone take " in printed
