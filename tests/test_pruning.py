"""Pruning: every mesh zeroes the weights that one process zeroes, and they stay zero."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cases import LEARNING_RATE, Case
from harness import run_ranks
from parity import assembled, assert_same_numbers, compare, difference, full, own_share, reference
from runs import check_resumed, events, losses, recipe_on, run, shards
from test_check import complaints, recipe

from cuboid.parallel import pruning
from cuboid.trainer.check import Devices, check
from cuboid.trainer.prune import is_due, ratio_before
from cuboid.trainer.recipe import PruneSettings

CELLS = [
    Case(1, 1, 2, prune="magnitude"),
    Case(2, 2, 2, "1f1b", tied=True, prune="magnitude"),
    Case(1, 2, 2, prune="2:4"),
    Case(2, 2, 1, "zbv", shard=False, prune="magnitude"),
]
MORE_CELLS = [
    Case(1, 2, 1, prune="2:4", shard=False),
    Case(1, 4, 1, prune="magnitude"),
    Case(2, 1, 2, "interleaved_1f1b", sequence=False, prune="2:4"),
    Case(2, 2, 1, "interleaved_zero_bubble", family="qwen3", prune="magnitude"),
    Case(1, 2, 2, family="gpt2", tied=True, prune="magnitude"),
    Case(2, 1, 1, family="phi3", activation_checkpointing="full", prune="magnitude"),
]
FULL = [pytest.param(case, marks=pytest.mark.full) for case in MORE_CELLS]


@pytest.mark.parametrize("case", [*CELLS, *FULL], ids=str)
def test_mesh_equals_one_process(case: Case) -> None:
    assert_same_numbers(case, difference(case))


def zeros_after_steps(case: Case) -> dict[str, tuple[int, int]]:
    """Of each weight of this rank how many are zero, of how many; after three steps between evaluations."""
    expected = reference(Case())
    with assembled(case, expected.weights) as engine:
        for step, batch in enumerate(expected.batches, start=1):
            mine = own_share(batch, engine.block)
            before = engine.evaluate([mine]).loss
            pruned, after = engine.prune(step, mine), engine.evaluate([mine]).loss
            assert (after != before) is (pruned is not None), "what is evaluated is what was pruned"
            engine.step(mine, learning_rate=LEARNING_RATE)
        return {name: (int((full(weight) == 0).sum()), weight.numel()) for name, weight in engine.weights()}


def test_half_of_each_four_or_the_smallest_of_all_are_zero_and_nothing_else() -> None:
    """Also where an evaluation has just gathered the weights."""
    for method in ("2:4", "magnitude"):
        case = Case(2, 2, 1, prune=method)
        ranks = run_ranks(zeros_after_steps, case.world_size, case, timeout=120)
        found = ranks[0] | ranks[-1]
        linears = {name: counts for name, counts in found.items() if ".layers." in name and "proj.weight" in name}
        assert all(zeros == 0 for name, (zeros, _) in found.items() if name not in linears)
        if method == "2:4":
            assert all(2 * zeros == size for zeros, size in linears.values())
        else:
            zeros, sizes = (sum(column) for column in zip(*linears.values(), strict=True))
            assert zeros == int(0.7 * sizes)
            shares = {zeros / size for zeros, size in linears.values()}
            assert max(shares) - min(shares) > 0.01, "one threshold for all, so that some lose more than others"


def test_a_killed_run_goes_on_bit_for_bit_with_the_same_zeros(tmp_path: Path) -> None:
    text = {"data": {"eval_path": str(Path(__file__).parents[1] / "README.md")}, "train": {"eval_every": 9}}
    small = recipe_on("2x2x1", changes=text)
    small = small.model_copy(update={"prune": PruneSettings(ratio=0.6, begin_step=2, end_step=8, every=3)})
    whole = run(small, tmp_path / "whole")
    told = events(tmp_path / "whole", "prune")
    assert [event["step"] for event in told] == [2, 5, 8]
    assert told[-1]["zeros"] == pytest.approx(0.6, abs=1e-3)
    assert told[-1]["eval_loss_after"] != told[-1]["eval_loss_before"]
    assert "eval_loss_after" not in told[1], "only the first and the last one are worth two evaluations"
    assert told[-1]["eval_loss_after"] != whole[-1]["eval_loss"]

    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for step in (6, 9):
        shutil.rmtree(tmp_path / "killed/checkpoints" / f"step-{step:08d}")
    run(small, tmp_path / "killed")
    check_resumed(tmp_path / "killed", at=3)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert shards(tmp_path / "killed", 9) == shards(tmp_path / "whole", 9)


def own_thresholds(patch: pytest.MonkeyPatch) -> None:
    """Each rank finds the smallest of its own weights."""
    patch.setattr(pruning, "dist", SimpleNamespace(all_reduce=lambda counts: None))


def zeros_moved(patch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    patch.setattr(pruning.Pruning, "kept", lambda self: nullcontext())


def gradients_not_masked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pruning.Pruning, "mask_gradients", lambda self: None)


@pytest.mark.parametrize(
    ("plant", "shown"), [(own_thresholds, "gradient"), (zeros_moved, "update"), (gradients_not_masked, "gradient")]
)
def test_a_planted_fault_is_found(plant: Any, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 2, 1, prune="magnitude")
    expected = reference(case)
    plant(monkeypatch)
    ranks = run_ranks(compare, case.world_size, case, expected, timeout=120)
    assert max(getattr(rank, shown) for rank in ranks) > 2e-3


def test_the_share_grows_fast_at_first_to_what_is_wanted() -> None:
    settings = PruneSettings(ratio=0.8, begin_step=3, end_step=12, every=4)
    assert [step for step in range(1, 15) if is_due(settings, step)] == [3, 7, 11, 12]
    shares = [ratio_before(settings, step) for step in (3, 7, 11, 12)]
    assert shares == pytest.approx([0.8 * (1 - left**3) for left in (0.9, 0.5, 0.1, 0.0)])
    at_once = PruneSettings(begin_step=5)
    assert [step for step in range(1, 9) if is_due(at_once, step)] == [5]
    assert ratio_before(at_once, 5) == 0.5


@pytest.mark.parametrize(
    ("prune", "others", "told"),
    [
        ({"begin_step": 5, "end_step": 3}, {}, "prune.end_step=3 is before prune.begin_step=5; use 5 or more, or null"),
        ({"begin_step": 11}, {}, "prune.begin_step=11 is after the last of train.steps=10; use at most 10"),
        ({"method": "2:4", "ratio": 0.6}, {}, "prune.ratio=0.6 is not the share of two in four; use 0.5, or magnitude"),
        (
            {"method": "2:4", "end_step": 3},
            {},
            "prune.end_step=3 lets a share grow that prune.method=2:4 fixes; use null, or magnitude",
        ),
        (
            {"modules": ["q_proj", "query"]},
            {},
            "prune.modules=query names no linear module in the layers of this llama; use some of down_proj, gate_proj, "
            "k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
        (
            {"method": "2:4"},
            {"model": {"intermediate_size": 90}},
            "prune.method=2:4 needs inputs in fours on each tensor rank (of 1), unlike those of down_proj (90); use "
            "magnitude, or prune.modules of gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
        (
            {},
            {"model": {"model_type": "mixtral", "num_local_experts": 4}},
            "prune={...} cannot prune the experts of this mixtral yet; use null",
        ),
        (
            {},
            {"lora": {"rank": 2}},
            "prune={...} would change weights that lora leaves frozen; use null, or lora=null",
        ),
        (
            {},
            {"parallel": {"engine": "deepspeed", "zero_stage": 1, "data": 2}},
            "parallel.engine=deepspeed updates parameters where no zero can be kept (prune); use native",
        ),
    ],
)
def test_what_cannot_be_pruned_is_refused(
    prune: dict[str, Any], others: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text")
    assert complaints(recipe(prune=prune, **others)) == [told]


def test_a_pruning_that_can_be_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text")
    check(recipe(prune={"method": "2:4", "modules": ["q_proj"]}, parallel={"tensor": 2}), Devices("cpu", 2))
