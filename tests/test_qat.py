"""Quantization-aware training: every mesh computes with the rounded weights of one process, and exports have them."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, ZeroCase
from harness import run_ranks
from parity import assert_same_numbers, compare, difference, reference
from runs import check_resumed, events, losses, recipe_on, run, shards
from stores import make_model
from test_check import complaints, recipe
from torch.distributed.tensor import Replicate

from cuboid.launch import progress
from cuboid.launch.export_options import ExportOptions, Format, Way
from cuboid.launch.exports import export
from cuboid.parallel import quantization
from cuboid.parallel.errors import FieldError
from cuboid.parallel.layout import Layout
from cuboid.parallel.mesh import connect
from cuboid.parallel.quantization import FakeQuantization
from cuboid.trainer.compress import compress
from cuboid.trainer.held_out import measure, passage_at
from cuboid.trainer.model_folder import load_model, logits
from cuboid.trainer.plain_quantization import PlainQuantization
from cuboid.trainer.quantize import Quantization
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.recipe_lora import LoraSettings
from cuboid.trainer.recipe_quantize import QuantizeSettings
from cuboid.trainer.tokenizer import save_tokenizer

CELLS = [
    Case(1, 1, 2, quantize="int8"),
    Case(2, 2, 2, "1f1b", tied=True, quantize="int4-later"),
    Case(2, 1, 2, "zbv", "qwen3", shard=False, sequence=False, lora="some", quantize="int4"),
]
MORE_CELLS = [
    Case(1, 2, 2, activation_checkpointing="full", lora="all", quantize="int4"),
    Case(2, 1, 2, "interleaved_1f1b", "phi3", quantize="int8"),
    Case(1, 1, 2, quantize="8da4w"),
    Case(2, 1, 2, "zbv", sequence=False, lora="all", quantize="8da4w"),
    Case(2, 1, 2, "1f1b", "gemma2", quantize="float8"),
    Case(1, 2, 2, family="mixtral", expert=2, quantize="int4-later"),
    Case(1, 2, 2, shard=False, prune="magnitude", quantize="int4"),
    ZeroCase(2, 2, 1, zero_stage=1, quantize="int4"),
    ZeroCase(1, 2, 1, zero_stage=2, quantize="int4"),
    ZeroCase(1, 2, 1, zero_stage=3, quantize="int8"),
]
FULL = [pytest.param(case, marks=pytest.mark.full) for case in MORE_CELLS]


@pytest.mark.parametrize("case", [*CELLS, *FULL], ids=str)
def test_mesh_equals_one_process(case: Case) -> None:
    """Or is as near as rounding lets it. In int8 the least of a row lies on the edge between -127 and -128, since a
    scale is the largest magnitude / 127.5: of updates that differ in the last bit one falls there, the other here. One
    process whose microbatches are cut otherwise moves as far (loss 4e-5, norm 4e-3, update 6e-3). In 8da4w what layers
    read lies near edges too, in the first step already (loss 1e-4, norm 4e-4, update 3e-2 in one process)."""
    ranks = difference(case)
    if case.quantize not in ("int8", "8da4w"):
        assert_same_numbers(case, ranks)
        return
    inputs_too = case.quantize == "8da4w"
    for rank in ranks:
        assert not rank.missing
        assert not rank.touched
        assert rank.losses[0] <= (1e-5 if inputs_too else 1e-6), rank
        assert rank.grad_norms[0] <= (5e-4 if inputs_too else 1e-5), rank
        assert rank.gradient <= (5e-2 if inputs_too else 1e-5), rank
        assert max(rank.losses) <= (1e-3 if inputs_too else 2e-4), rank
        assert max(rank.grad_norms) <= (2e-2 if inputs_too else 1e-2), rank
        assert rank.update <= (2e-1 if inputs_too else 2e-2), rank


def part_of_a_row(patch: pytest.MonkeyPatch) -> None:
    """Each rank takes its own part of a row for the whole."""
    patch.setattr(FakeQuantization, "_whole", lambda self, rounding, is_cut: rounding)


def a_step_late(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FakeQuantization, "begin", lambda self, step: setattr(self, "is_on", step > self.start_step))


def whole_gradients_of_adapters(patch: pytest.MonkeyPatch) -> None:
    """Each rank's part of the gradient of A and B taken for the whole."""
    patch.setattr(quantization, "Partial", Replicate)


@pytest.mark.parametrize(
    ("plant", "case"),
    [
        (part_of_a_row, Case(1, 1, 2, quantize="int8")),
        pytest.param(a_step_late, Case(1, 1, 2, quantize="int8"), marks=pytest.mark.full),
        pytest.param(whole_gradients_of_adapters, Case(1, 1, 2, quantize="int4", lora="all"), marks=pytest.mark.full),
    ],
)
def test_a_planted_fault_is_found(plant: Any, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reference(case)
    plant(monkeypatch)
    ranks = run_ranks(compare, case.world_size, case, expected, timeout=120)
    assert max(rank.gradient for rank in ranks) > 2e-3


def rounded_rows(scheme: str) -> list[torch.Tensor]:
    """In each of two ranks: its half of what a divided linear reads and of its matrix, and what is computed with."""
    halves = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(3)).chunk(2, -1)
    with connect(Layout(tensor=2), timeout_seconds=60) as block:
        rounding = Quantization.named(scheme, group_size=8).rounding()
        fake = FakeQuantization(rounding, block.mesh["tensor"].get_group(), start_step=1)
        inputs, matrix = halves[block.rank]
        rounded = [fake._whole(rounding.weight, rounding.by_row)(matrix)]
        return rounded + ([fake._whole(rounding.inputs, True)(inputs)] if rounding.inputs else [])


@pytest.mark.parametrize("scheme", ["8da4w", pytest.param("float8", marks=pytest.mark.full)])
def test_rows_that_ranks_share_are_rounded_as_whole_ones(scheme: str) -> None:
    """Bit for bit: where inputs are rounded, no later number could tell, so near do they lie to edges."""
    inputs, matrix = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(3))
    rounding = Quantization.named(scheme, group_size=8).rounding()
    parts = run_ranks(rounded_rows, 2, scheme, timeout=120)
    wanted = [rounding.weight(matrix)] + ([rounding.inputs(inputs)] if rounding.inputs else [])
    for found, whole in zip(zip(*parts, strict=True), wanted, strict=True):
        assert torch.equal(torch.cat(found, -1), whole)


def rounded_recipe(mesh: str, held_out: Path | None = None, **settings: Any) -> Recipe:
    told = {"data": {"eval_path": str(held_out)}, "train": {"eval_every": 9, "eval_batches": 3}} if held_out else {}
    return recipe_on(mesh, changes=told).model_copy(update={"quantize": QuantizeSettings(**settings)})


@pytest.mark.parametrize(
    "lora", [None, pytest.param(LoraSettings(rank=4), marks=pytest.mark.full)], ids=["whole", "lora"]
)
def test_what_a_run_computes_is_what_its_export_holds(
    lora: LoraSettings | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On two tensor ranks; the export takes its groups from the run, and an adapter into its matrices."""
    text = tmp_path / "held-out.txt"
    text.write_text("Deeds will not be less valiant because they are unpraised. " * 9)
    rounded = rounded_recipe("1x1x2", text, scheme="int4", group_size=8).model_copy(update={"lora": lora})
    evaluated = run(rounded, tmp_path / "run")[-1]["eval_loss"]
    first, last = events(tmp_path / "run", "quantize")
    assert (first["step"], first["learned"], last["step"], last["learned"]) == (0, False, 9, True)
    assert last["eval_loss_rounded"] == evaluated
    untrained = [first[f"eval_loss_{name}"] for name in ("full", "rounded")]
    assert progress.told(last) == (
        "int4, held-out loss: {:.4f} in full precision, {:.4f} rounded (PTQ), both after step 0; "
        "{:.4f} trained with rounding (QAT), after step 9".format(*untrained, evaluated)
    )
    assert len({event[f"eval_loss_{name}"] for event in (first, last) for name in ("full", "rounded")}) == 4
    export(ExportOptions(source=tmp_path / "run", out=tmp_path / "int4", to=Format.int4))
    told = capsys.readouterr().out
    assert "one scale a group of 8 inputs" in told
    assert f"-> {evaluated:.4f} (perplexity" in told
    passage = passage_at(str(text), field="--data", config=load_model(tmp_path / "int4").config, length=32)
    exact = measure(load_model(tmp_path / "int4"), passage, tmp_path / "int4")
    assert exact.loss == pytest.approx(evaluated, rel=1e-6)
    with pytest.raises(FieldError, match=r"--method=gptq rounds otherwise than this run has learned"):
        export(ExportOptions(source=tmp_path / "run", out=tmp_path / "gptq", to=Format.int4, method=Way.gptq))
    for to, words in ((Format.int8_int4, "what they read is rounded to int8"), (Format.float8, "float8: 28 matrices")):
        export(
            ExportOptions(
                source=tmp_path / "run", out=tmp_path / to, to=to, group_size=16 if to is Format.int8_int4 else None
            )
        )
        assert words in capsys.readouterr().out


SCHEMES = [
    {"scheme": "int8"},
    {"scheme": "int4", "group_size": 16},
    {"scheme": "8da4w", "group_size": 8},
    {"scheme": "float8"},
]


@pytest.mark.parametrize("settings", SCHEMES, ids=str)
def test_the_rounding_of_training_is_that_of_exports(settings: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit, but that in 8 bits torchao multiplies with the whole numbers first and with the scale then. And it
    is what is written out for one process."""
    quantize = QuantizeSettings(**settings)
    make_model().save_pretrained(tmp_path / "whole")
    save_tokenizer("bytes", tmp_path / "whole", pretrained=None, max_tokens=None)
    compress(tmp_path / "whole", tmp_path / "rounded", Quantization.of(quantize))
    whole, exported = (load_model(tmp_path / name) for name in ("whole", "rounded"))
    expected, trained, plain = logits(exported), copy.deepcopy(whole), copy.deepcopy(whole)
    rounding = Quantization.of(quantize).rounding()
    FakeQuantization(rounding, None, start_step=1).apply(trained, head="lm_head")  # no rank shares a row
    PlainQuantization(plain, quantize, head="lm_head").begin(1)
    assert (logits(whole) - expected).abs().max() > 1e-3
    assert (logits(trained) - expected).abs().max() <= (1e-5 if quantize.scheme == "int8" else 0)
    assert (logits(plain) - expected).abs().max() <= 1e-5


def test_rounding_starts_at_its_step_also_where_a_run_goes_on(tmp_path: Path) -> None:
    """Losses are those of a run without it, bit for bit, until the step before; and then they are not."""
    delayed = rounded_recipe("1x1x1", scheme="int4", group_size=8, start_step=5)
    run(delayed, tmp_path / "delayed")
    run(delayed.model_copy(update={"quantize": None}), tmp_path / "never")
    ours, others = losses(tmp_path / "delayed"), losses(tmp_path / "never")
    assert ours[:4] == others[:4]
    assert abs(ours[4][1] - others[4][1]) > 1e-4
    shutil.copytree(tmp_path / "delayed", tmp_path / "killed")
    for step in (6, 9):
        shutil.rmtree(tmp_path / "killed/checkpoints" / f"step-{step:08d}")
    run(delayed, tmp_path / "killed")
    check_resumed(tmp_path / "killed", at=3)
    assert losses(tmp_path / "killed") == ours
    assert shards(tmp_path / "killed", 9) == shards(tmp_path / "delayed", 9)


INT4 = {"scheme": "int4"}


@pytest.mark.parametrize(
    ("quantize", "others", "told"),
    [
        (
            INT4 | {"group_size": 64},
            {"parallel": {"tensor": 2}},
            "quantize.group_size=64 does not divide the inputs on each of parallel.tensor=2 ranks of down_proj (48), "
            "o_proj (32); use 8 or 16",
        ),
        (
            INT4 | {"group_size": 20},
            {},
            "quantize.group_size=20 does not divide the inputs of down_proj (96), gate_proj (64), k_proj (64), o_proj "
            "(64), q_proj (64), up_proj (64), v_proj (64); use 8, 16 or 32",
        ),
        (
            {"scheme": "int8", "group_size": 32},
            {},
            "quantize.group_size=32 says nothing of quantize.scheme=int8, where a whole row shares a scale; "
            "use null, or int4",
        ),
        (
            INT4 | {"start_step": 11},
            {},
            "quantize.start_step=11 is after the last of train.steps=10; use at most 10",
        ),
        (
            {"scheme": "float8"},
            {"prune": {}},
            "quantize.scheme=float8 divides a row by its largest magnitude, and prune may leave nothing of one; "
            "use int8 or int4, or prune=null",
        ),
        (
            INT4 | {"start_step": 5},
            {"checkpoint": {"best": "eval_loss"}, "data": {"eval_path": "text.txt"}, "train": {"eval_every": 5}},
            "checkpoint.best=eval_loss would compare losses in full precision with rounded ones, of before and after "
            "quantize.start_step=5; use null, or quantize.start_step=1",
        ),
        (
            INT4,
            {"lora": {"dora": True}},
            "lora.dora=true is not yet proven with quantize; use false, or quantize=null",
        ),
        (
            INT4,
            {"lora": {"dropout": 0.1}},
            "lora.dropout=0.1 drops inputs of the adapter alone, and what is rounded is its sum with the matrix "
            "(quantize); use 0.0",
        ),
    ],
)
def test_what_cannot_be_rounded_is_refused(
    quantize: dict[str, Any], others: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text")
    assert complaints(recipe(quantize=quantize, **others)) == [told]


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ({"lora": {"base": "nf4"}}, "lora.base=nf4 is rounded once already"),
        ({"prune": {"method": "channels"}}, "prune.method=channels leaves out inputs that share scales with others"),
    ],
)
def test_what_is_not_proven_beside_it_is_refused(
    others: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text")
    assert any(line.startswith(told) for line in complaints(recipe(quantize=INT4, **others)))


def test_a_model_without_linears_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text")
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 264}
    mine = recipe(quantize=INT4)
    mine = mine.model_copy(update={"model": mine.model.model_copy(update={"config": gpt2})})
    words = "quantize={...} rounds linear layers, and gpt2 keeps its matrices in others; use null"
    assert complaints(mine) == [words]
