"""The deepspeed engine: the numbers of one process, each stage's division, and checkpoints in and out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import GLOBAL_BATCH, LEARNING_RATE, Case, ZeroCase
from harness import run_ranks
from parity import Reference, assert_same_numbers, compare, difference, reference
from runs import STEPS, check_resumed, losses, recipe_on, run

from cuboid.parallel.errors import FieldError
from cuboid.parallel.gradients import local
from cuboid.parallel.local import Place
from cuboid.parallel.mesh import Block, connect
from cuboid.trainer.assemble import assemble, initial_weights
from cuboid.trainer.checkpoint import load
from cuboid.trainer.data import Batch
from cuboid.trainer.engine import Engine, NotFinite
from cuboid.trainer.model import draw_blueprint
from cuboid.trainer.model_config import read_checked_config
from cuboid.trainer.recipe import MoeSettings, Recipe
from cuboid.trainer.weights import from_full


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Once here, and not once in every rank."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        pytest.fail(f"these tests need the extra cuboid[deepspeed], which `make install` brings: {error}")


CELLS = [
    ZeroCase(1, 2, 1, zero_stage=1),
    ZeroCase(1, 2, 1, zero_stage=2),
    ZeroCase(1, 2, 1, zero_stage=3, family="qwen3", tied=True),
    ZeroCase(1, 2, 2, zero_stage=3),
    ZeroCase(2, 2, 1, zero_stage=1),
    ZeroCase(2, 2, 2, zero_stage=1, family="qwen3", tied=True),
    ZeroCase(1, 2, 1, zero_stage=2, offload="cpu"),
    ZeroCase(1, 2, 1, zero_stage=3, family="mixtral"),
    ZeroCase(1, 2, 1, zero_stage=3, lora="whole"),
]
MORE_CELLS = [
    ZeroCase(1, 1, 1, zero_stage=1, offload="cpu"),
    ZeroCase(1, 1, 2, zero_stage=2, sequence=False),
    ZeroCase(1, 2, 2, zero_stage=1, family="qwen3"),
    ZeroCase(1, 2, 2, zero_stage=2, tied=True),
    ZeroCase(1, 4, 1, zero_stage=2, family="qwen2", microbatches=2),
    ZeroCase(1, 2, 1, zero_stage=2, family="qwen3_moe", capacity_factor=1.25),
    ZeroCase(2, 2, 1, zero_stage=1, family="olmoe", activation_checkpointing="full"),
    ZeroCase(1, 4, 1, zero_stage=3, activation_checkpointing="full"),
    ZeroCase(1, 2, 2, zero_stage=3, offload="cpu", family="qwen3", sequence=False),
    ZeroCase(1, 2, 1, "gpipe", zero_stage=1, activation_checkpointing="full"),
    ZeroCase(2, 2, 1, "gpipe", zero_stage=1, tied=True),
    ZeroCase(2, 2, 1, zero_stage=1, offload="cpu", tied=True),
    ZeroCase(2, 1, 2, zero_stage=1, offload="cpu", sequence=False),
    ZeroCase(2, 2, 1, zero_stage=1, tied=True, lora="dora"),
    ZeroCase(2, 2, 1, zero_stage=1, family="qwen3_moe", lora="experts"),
    ZeroCase(1, 2, 2, zero_stage=2, family="qwen3", lora="dora"),
    ZeroCase(1, 2, 1, zero_stage=2, family="mixtral", lora="experts"),
    ZeroCase(4, 2, 1, zero_stage=1, microbatches=8, activation_checkpointing="full"),
]


@pytest.mark.parametrize("case", CELLS, ids=str)
def test_mesh_equals_one_process(case: ZeroCase) -> None:
    assert_same_numbers(case, difference(case))


@pytest.mark.full
@pytest.mark.parametrize("case", MORE_CELLS, ids=str)
def test_every_cell_equals_one_process(case: ZeroCase) -> None:
    assert_same_numbers(case, difference(case))


@pytest.mark.full
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_gradients_that_need_several_buckets(zero_stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuboid.trainer import zero

    monkeypatch.setattr(zero, "_BUCKET_ELEMENTS", 2000)
    case = ZeroCase(1, 2, 2, zero_stage=zero_stage)
    assert_same_numbers(case, difference(case))


def sums_left_open(patch: pytest.MonkeyPatch) -> None:
    """Each tensor rank takes a norm's gradient of its own tokens for the whole."""
    patch.setattr(Place, "is_replicated", False)


def copies_counted_twice(patch: pytest.MonkeyPatch) -> None:
    """DeepSpeed clips by a norm in which every tensor rank counts what all of them hold."""
    from deepspeed.runtime.zero import stage_1_and_2

    patch.setattr(stage_1_and_2, "is_model_parallel_parameter", lambda parameter: True)


def clipping_skipped(patch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    patch.setattr(DeepSpeedZeroOptimizer, "unscale_and_clip_grads", lambda *_: None)


@pytest.mark.parametrize(
    ("plant", "case", "shown"),
    [
        (sums_left_open, ZeroCase(1, 1, 2), "gradient"),
        (copies_counted_twice, ZeroCase(1, 1, 2), "update"),
        pytest.param(clipping_skipped, ZeroCase(1, 2, 1), "update", marks=pytest.mark.full),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_planted_fault_is_found(plant: Any, case: ZeroCase, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reference(case)
    plant(monkeypatch)
    ranks = run_ranks(compare, case.world_size, case, expected, timeout=120)
    assert max(getattr(rank, shown) for rank in ranks) > {"gradient": 1e-4, "update": 2e-3}[shown]


@dataclass(frozen=True)
class Held:
    """Elements of a kind that a rank holds, as a share of the model's."""

    parameters: float
    gradients: float
    """When the schedule is done, before ZeRO 1 reduces."""
    moments: float


def built(recipe: Recipe, block: Block, expected: Reference) -> Engine:
    return assemble(
        recipe, block, draw_blueprint(read_checked_config(recipe.model)), from_full(expected.weights.__getitem__)
    )


def own_batch(expected: Reference, block: Block) -> Batch:
    share = GLOBAL_BATCH // block.layout.data
    rows = slice(block.coordinate.data * share, (block.coordinate.data + 1) * share)
    batch = expected.batches[0]
    return Batch(batch.input_ids[rows], batch.labels[rows], batch.position_ids[rows])


def look_at_what_is_held(case: ZeroCase, expected: Reference) -> Held:
    recipe, whole = case.recipe(), sum(weight.numel() for weight in expected.weights.values())
    with connect(recipe.layout, timeout_seconds=60) as block:
        engine = built(recipe, block, expected)
        parameters = [parameter for _, parameter in engine.parameters]
        at_the_end: list[int] = []
        close = engine.close_gradients

        def closing() -> None:
            at_the_end.append(sum(p.grad.numel() for p in parameters if p.grad is not None))
            close()

        engine.close_gradients = closing
        engine.backward(own_batch(expected, block))
        moments = sum(state["exp_avg"].numel() for state in engine.zero.optimizer.optimizer.state.values())
        return Held(sum(p.numel() for p in parameters) / whole, at_the_end[0] / whole, moments / whole)


@pytest.mark.parametrize(("zero_stage", "parameters", "gradients"), [(1, 1.0, 1.0), (2, 1.0, 0.0), (3, 0.0, 0.0)])
def test_a_stage_divides_what_it_says(zero_stage: int, parameters: float, gradients: float) -> None:
    """An engine that divided nothing would compute the same numbers."""
    case = ZeroCase(1, 2, 1, zero_stage=zero_stage)
    for held in run_ranks(look_at_what_is_held, 2, case, reference(Case()), timeout=60):
        assert held.parameters == parameters
        assert held.gradients == gradients
        assert held.moments == pytest.approx(1 / 2, rel=1e-2)


def step_on_a_poisoned_gradient(case: ZeroCase, expected: Reference) -> tuple[str, bool]:
    """What the engine says, and whether its weights are untouched."""
    recipe = case.recipe()
    with connect(recipe.layout, timeout_seconds=60) as block:
        engine = built(recipe, block, expected)
        name = "model.layers.3.mlp.down_proj.weight"
        if block.rank == 1:
            dict(engine.parameters)[name].register_hook(lambda gradient: gradient * float("nan"))
        with pytest.raises(NotFinite) as caught:
            engine.step(own_batch(expected, block), learning_rate=LEARNING_RATE)
        return str(caught.value), all(torch.equal(w, expected.weights[n]) for n, w in engine.weights())


@pytest.mark.parametrize("zero_stage", [1, pytest.param(3, marks=pytest.mark.full)])
def test_what_is_not_finite_stops_before_the_update(zero_stage: int) -> None:
    case = ZeroCase(1, 2, 1, zero_stage=zero_stage)
    for words, untouched in run_ranks(step_on_a_poisoned_gradient, 2, case, reference(Case()), timeout=60):
        assert words == "the gradient norm is nan, first on rank 0 in model.layers.3.mlp.down_proj.weight"
        assert untouched


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    return {"engine": "deepspeed", "zero_stage": stage, **settings}


# No warmup and no decay: a shorter run is the beginning of a longer one.
CHANGES = {"optimizer": {"schedule": "constant"}}


def up_to(steps: int, mesh: str, **parallel: Any) -> Recipe:
    return recipe_on(mesh, changes=CHANGES | {"train": {"steps": steps}}, **parallel)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the native engine from its first step to its last."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(up_to(STEPS, "1x2x1"), folder)
    return folder


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("1x2x1", {}), ("1x2x1", zero(1))),
        (("1x2x1", zero(3)), ("1x2x1", {})),
        pytest.param(("1x2x1", {}), ("2x2x1", zero(1)), marks=pytest.mark.full),
        pytest.param(("1x2x2", zero(3)), ("1x2x1", {}), marks=pytest.mark.full),
        pytest.param(("2x2x1", zero(1, offload="cpu")), ("1x2x1", zero(2)), marks=pytest.mark.full),
    ],
    ids=[
        "native to zero 1",
        "zero 3 to native",
        "native to zero 1 under a pipeline",
        "zero 3 and tensor ranks to native",
        "zero 1 to zero 2",
    ],
)
def test_a_run_changes_its_engine_when_it_resumes(before: Any, after: Any, undisturbed: Path, tmp_path: Path) -> None:
    for steps, (mesh, parallel) in ((6, before), (STEPS, after)):
        run(up_to(steps, mesh, **parallel), tmp_path)
    check_resumed(tmp_path, at=6)
    for (step, loss, norm), (_, expected, expected_norm) in zip(losses(tmp_path), losses(undisturbed), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5), step
        assert norm == pytest.approx(expected_norm, rel=1e-4), step


@pytest.mark.full
@pytest.mark.parametrize("first", ["native", "zero 2"])
def test_a_mixture_changes_its_engine_when_it_resumes(first: str, tmp_path: Path) -> None:
    """The biases that balance its experts go along."""

    def mixture(steps: int, **parallel: Any) -> Recipe:
        config = {"model_type": "mixtral", "num_local_experts": 4, "tie_word_embeddings": False}
        changes = {"optimizer": {"schedule": "constant"}, "config": config, "train": {"steps": steps}}
        recipe = recipe_on("1x2x1", changes=changes, **parallel)
        return recipe.model_copy(update={"moe": MoeSettings(aux_loss=0.1, bias_update=0.02)})

    before, after = ({}, zero(2)) if first == "native" else (zero(2), {})
    run(mixture(STEPS), tmp_path / "whole")
    run(mixture(6, **before), tmp_path / "in two")
    run(mixture(STEPS, **after), tmp_path / "in two")
    check_resumed(tmp_path / "in two", at=6)
    for found, expected in zip(losses(tmp_path / "in two"), losses(tmp_path / "whole"), strict=True):
        assert found[1:] == pytest.approx(expected[1:], rel=1e-4)


def load_and_give_back(recipe: Recipe, checkpoint: Path) -> list[str]:
    """Names whose values are not, bit for bit, what was loaded."""
    with connect(recipe.layout, timeout_seconds=60) as block:
        blueprint = draw_blueprint(read_checked_config(recipe.model))
        engine = assemble(recipe, block, blueprint, initial_weights(recipe, blueprint))
        tensors = engine.tensors()
        before = {name: local(tensor).clone() for name, tensor in tensors.items()}
        load(checkpoint, tensors)
        loaded = {name: local(tensor).clone() for name, tensor in tensors.items()}
        assert all(not torch.equal(loaded[name], before[name]) for name in loaded), "loading has changed every tensor"
        engine.resume_at(STEPS, tensors)
        return [name for name, tensor in engine.tensors().items() if not torch.equal(local(tensor), loaded[name])]


@pytest.mark.parametrize(
    ("mesh", "parallel"),
    [
        pytest.param("2x2x1", zero(1), marks=pytest.mark.full),
        pytest.param("1x2x2", zero(2, offload="cpu"), marks=pytest.mark.full),
        ("1x3x1", zero(3)),
    ],
    ids=["zero 1", "zero 2 offloaded", "zero 3, parts filled up"],
)
def test_what_is_loaded_is_saved_again(mesh: str, parallel: Any, undisturbed: Path) -> None:
    data = {"train": {"global_batch": 12}} if mesh == "1x3x1" else {}
    recipe = recipe_on(mesh, changes=CHANGES | data, **parallel)
    checkpoint = undisturbed / "checkpoints" / f"step-{STEPS:08d}"
    for differing in run_ranks(load_and_give_back, recipe.layout.world_size, recipe, checkpoint, timeout=60):
        assert not differing


@pytest.mark.full
def test_a_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    for folder, parts in ((tmp_path / "whole", (STEPS,)), (tmp_path / "in two", (6, STEPS))):
        for steps in parts:
            run(up_to(steps, "1x2x1", **zero(2)), folder)
    assert losses(tmp_path / "in two") == losses(tmp_path / "whole")


def test_two_runs_do_not_share_a_folder_on_a_disk(tmp_path: Path) -> None:
    """Their files would have the same names."""
    from cuboid.trainer import zero as engine

    recipe = up_to(STEPS, "1x2x1", **zero(3, offload="nvme", offload_path=str(tmp_path)))
    block: Any = SimpleNamespace(rank=1)
    told = engine._offload(recipe, block)
    assert told["offload_optimizer"] == {"device": "nvme", "nvme_path": f"{tmp_path}/resume-rank1"}
    with pytest.raises(FieldError, match="is in use by another run of this name; use another folder, or another name"):
        engine._offload(recipe, block)


RECIPE = """\
name: small
model:
  config: {model_type: llama, vocab_size: 264, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
           num_attention_heads: 4, num_key_value_heads: 2, bos_token_id: null, eos_token_id: 256}
data: {kind: text, path: text.txt, tokenizer: bytes, sequence_length: 32}
parallel: {data: 2, microbatches: 2, engine: deepspeed, zero_stage: 3, offload: cpu}
train: {steps: 3, global_batch: 8}
track: {to: none, timeline_every: 0}
launch: {launcher: local, device: cpu}
"""


def command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "text.txt").write_text("All that is gold does not glitter, not all those who wander are lost. " * 60)
    (folder / "small.yaml").write_text(RECIPE)
    words = [sys.executable, "-m", "cuboid.launch.cli", *arguments]
    return subprocess.run(
        words, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_a_run_needs_no_compiler(tmp_path: Path) -> None:
    """DeepSpeed would compile at its first use; no program is found here, and nothing is left behind."""
    built = tmp_path / "extensions"
    done = command(tmp_path, "train", "small.yaml", PATH="", TORCH_EXTENSIONS_DIR=str(built))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done: 3 steps" in done.stdout
    assert not built.exists()
    facts = json.loads((tmp_path / "runs/small/checkpoints/step-00000003/facts.json").read_text())
    assert facts["versions"]["deepspeed"]


@pytest.mark.full
def test_verify_names_the_engine(tmp_path: Path) -> None:
    done = command(tmp_path, "verify", "small.yaml", "--shrink", "none", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["pass"] is True
    assert found["mesh"] == "pipeline 1 x data 2 x tensor 1, 1f1b, 2 microbatches, llama, ZeRO stage 3 on cpu"
