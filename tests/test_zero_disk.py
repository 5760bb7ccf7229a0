"""The deepspeed engine's optimizer state on a disk: the numbers of one process, and checkpoints in and out.

All of it needs the operator that DeepSpeed compiles, once, in about three minutes on two cores: `make test-disk` alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from cases import Case, ZeroCase
from harness import run_ranks
from parity import assert_same_numbers, difference, reference
from runs import STEPS, check_resumed, losses, recipe_on, run
from test_zero import load_and_give_back

from cuboid.trainer.check_engine import engine_errors
from cuboid.trainer.recipe import Recipe

pytestmark = [pytest.mark.disk, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def _compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Before ranks are forked, whose time-outs are shorter than this takes."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    recipe = on_disk(tmp_path_factory.mktemp("disk"), STEPS)
    if errors := list(engine_errors(recipe, runs_here=True)):
        pytest.fail("\n".join(map(str, errors)))
    load = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()"
    subprocess.run([sys.executable, "-c", load], check=True, timeout=840)
    import deepspeed  # noqa: F401  once here, and not once in every rank


@pytest.mark.parametrize(("mesh", "group_elements"), [((1, 1, 1), 100_000), ((1, 2, 1), None), ((1, 2, 2), 100_000)])
def test_state_on_a_disk_equals_one_process(
    mesh: tuple[int, int, int], group_elements: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cuboid.trainer import zero

    if group_elements:  # in several groups, of which the smaller ones stay in memory
        monkeypatch.setattr(zero, "_GROUP_ELEMENTS", group_elements)
    case = ZeroCase(*mesh, zero_stage=3, family="large", offload="nvme", offload_path=str(tmp_path))
    assert_same_numbers(case, difference(case))
    held = Counter[str]()
    for file in tmp_path.glob("parity-rank*/**/*.tensor.swp"):
        held[file.name.partition("-")[0]] += file.stat().st_size
    whole = 4 * sum(weight.numel() for weight in reference(Case(family="large")).weights.values())
    for moment in ("exp_avg", "exp_avg_sq"):
        assert held[moment] > (0.8 if group_elements else 1) * whole, (
            "an engine that kept all in memory would be exact too"
        )


LARGE = {"optimizer": {"schedule": "constant"}, "config": {"vocab_size": 16384, "hidden_size": 64}}


def on_disk(folder: Path, steps: int) -> Recipe:
    zero = {"engine": "deepspeed", "zero_stage": 3, "offload": "nvme", "offload_path": str(folder)}
    return recipe_on("1x2x1", changes=LARGE | {"train": {"steps": steps}}, **zero)


def native(steps: int) -> Recipe:
    return recipe_on("1x2x1", changes=LARGE | {"train": {"steps": steps}})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the native engine from its first step to its last."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(native(STEPS), folder)
    return folder


@pytest.mark.parametrize("first", ["native", "disk"])
def test_a_run_changes_its_engine_when_it_resumes(first: str, undisturbed: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    run(native(6) if first == "native" else on_disk(disk, 6), tmp_path / "run")
    run(on_disk(disk, STEPS) if first == "native" else native(STEPS), tmp_path / "run")
    check_resumed(tmp_path / "run", at=6)
    for found, expected in zip(losses(tmp_path / "run"), losses(undisturbed), strict=True):
        assert found[1] == pytest.approx(expected[1], rel=1e-5), found
        assert found[2] == pytest.approx(expected[2], rel=1e-4), found


def test_what_is_loaded_is_saved_again(undisturbed: Path, tmp_path: Path) -> None:
    checkpoint = undisturbed / "checkpoints" / f"step-{STEPS:08d}"
    for differing in run_ranks(load_and_give_back, 2, on_disk(tmp_path, STEPS), checkpoint, timeout=60):
        assert not differing


def test_moments_that_are_not_written_back_are_found(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cuboid.trainer.zero import ZeroEngine

    by_group = ZeroEngine._by_group
    monkeypatch.setattr(ZeroEngine, "_by_group", lambda self, *, changed: by_group(self, changed=False))
    checkpoint = undisturbed / "checkpoints" / f"step-{STEPS:08d}"
    ranks = run_ranks(load_and_give_back, 2, on_disk(tmp_path, STEPS), checkpoint, timeout=60)
    assert "optimizer.exp_avg.model.embed_tokens.weight" in set().union(*ranks)
