"""Frozen matrices beside adapters: in 4 bits, or without the adapter's first values; what they are, runs, exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from cases import Case
from four_bits import round_frozen
from peft import PeftModel
from runs import losses, run
from test_adapters import adapter_run, blueprint_of, loaded, logits, pretrained, recipe_with
from torch import nn

from cuboid.launch.training import closing_lines
from cuboid.parallel.errors import UserError
from cuboid.parallel.nf4 import LEVELS, NF4Linear, packed, unpacked
from cuboid.trainer import check_adapter_base
from cuboid.trainer.adapter_base import olora_factors, pissa_factors
from cuboid.trainer.adapters import adapt, inject
from cuboid.trainer.assemble import initial_weights
from cuboid.trainer.check_lora import lora_errors, target_errors
from cuboid.trainer.export_adapter import export_adapter
from cuboid.trainer.model import whole_model
from cuboid.trainer.weights import fill

NF4 = {"base": "nf4"}
ZERO = {"engine": "deepspeed", "zero_stage": 1}
TAKING_OUT = [{"init": "pissa", "rslora": True, "bias": "lora_only"}, {"init": "olora", "dora": True}]


def matrix(rows: int, columns: int) -> torch.Tensor:
    """Normal numbers, of which each block has a scale of its own, one is zero and one has an outlier."""
    torch.manual_seed(5)
    weight = torch.randn(rows, columns) * torch.rand(rows, columns // 64).repeat_interleave(64, 1) * 0.1
    weight[0, :64] = 0.0
    weight[1, 70] = 3.0
    return weight


def test_four_bits_are_torchao_s_and_as_near() -> None:
    """The same levels, and no larger an error than with scales that are quantized again, as in the paper."""
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    weight = matrix(128, 256)
    theirs = to_nf4(weight, block_size=64, scaler_block_size=256)
    assert torch.allclose(theirs.nf4, torch.tensor(LEVELS), atol=6e-5), "which torchao writes with four digits"
    error, of_theirs = (unpacked(packed(weight)) - weight).norm(), (theirs.get_original_weight() - weight).norm()
    assert error <= 1.001 * of_theirs
    assert error / weight.norm() < 0.1
    assert packed(weight).numel() * 8 / weight.numel() == 4.25


def test_a_part_of_the_blocks_is_the_blocks_of_the_part() -> None:
    weight = matrix(6, 256)
    blocks, numbers = packed(weight), unpacked(packed(weight))
    assert not numbers[0, :64].any()
    assert torch.equal(packed(numbers), blocks), "a model that is merged and read again is the same"
    assert torch.equal(packed(weight[2:5, 64:192]), blocks[2:5, 1:3])


def test_the_linear_computes_with_what_its_blocks_stand_for() -> None:
    plain = nn.Linear(128, 24)
    held = NF4Linear(plain)
    held.weight.copy_(packed(plain.weight.detach()))
    x, other = (torch.randn(3, 5, 128, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        other.copy_(x)
        plain.weight.copy_(unpacked(held.weight))
    found, expected = held(x), F.linear(other, plain.weight, plain.bias)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(found, expected)
    assert torch.allclose(x.grad, other.grad)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_is_taken_out_is_peft_s(init: str) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(40, 24, bias=False))
    weight = model[0].weight.detach().clone()
    config = peft.LoraConfig(r=5, lora_alpha=15, target_modules=["0"], init_lora_weights=init)
    layer: Any = peft.inject_adapter_in_model(config, model)[0]
    wanted_A, wanted_B = (getattr(layer, f"lora_{part}")["default"].weight.detach() for part in "AB")
    lora_A, lora_B = pissa_factors(weight.double(), 5, 3.0) if init == "pissa" else olora_factors(weight.double(), 5)
    assert torch.allclose(lora_A.float().abs(), wanted_A.abs(), atol=1e-5)
    assert torch.allclose((lora_B @ lora_A).float(), wanted_B @ wanted_A, atol=1e-6)
    assert torch.allclose((weight - 3 * lora_B @ lora_A).float(), layer.base_layer.weight, atol=1e-6)
    assert (lora_A.gather(1, lora_A.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("gpt2", {"init": "pissa"}),
        ("gpt2", {"init": "olora"}),
        ("blocks", {"init": "orthogonal"}),
        ("blocks", {"base": "nf4"}),
        ("blocks", {"base": "nf4", "init": "pissa"}),
    ],
)
def test_a_model_begins_as_itself_and_any_part_is_of_the_same_whole(family: str, lora: dict[str, Any]) -> None:
    lora = {"rank": 4, "alpha": 12.0, **lora}
    recipe = recipe_with(lora, model=Case(family=family).recipe().model.model_dump())
    blueprint = blueprint_of(family)
    _, read = adapt(recipe, blueprint, initial_weights(recipe, blueprint))
    model, plain = whole_model(blueprint), whole_model(blueprint)
    inject(model, recipe.lora, blueprint.anatomy)
    fill(model.named_parameters(), read)
    fill(plain.named_parameters(), initial_weights(recipe, blueprint))
    difference = (logits(model) - logits(plain)).abs().max() / logits(plain).abs().max()
    assert 1e-3 < difference < 0.5 if "base" in lora else difference < 1e-5
    changed = 0
    for name, whole in model.named_parameters():
        rows = torch.empty(2, *whole.shape[1:])
        read(name, (slice(1, 3), *(slice(0, size) for size in whole.shape[1:])), rows)
        assert torch.equal(rows, whole[1:3]), name
        if ".base_layer.weight" in name:
            changed += not torch.equal(whole, plain.get_parameter(name.replace(".base_layer", "")))
            if "base" in lora:
                blocks = torch.empty(3, 1, 34, dtype=torch.uint8)
                read(name, (slice(2, 5), slice(1, 2), slice(0, 34)), blocks)
                assert torch.equal(unpacked(blocks), whole[2:5, 64:128])
        elif ".lora_B." in name:
            assert bool(whole.any()) is ("init" in lora)
    targets = sum(hasattr(module, "lora_A") for module in model.modules())
    assert changed == (0 if lora.get("init") == "orthogonal" else targets)


@pytest.mark.parametrize(
    ("family", "lora", "parallel", "words"),
    [
        ("llama", {"init": "orthogonal", "rank": 3}, {}, "lora.rank=3 is odd, and lora.init=orthogonal halves it"),
        ("llama", {"init": "pissa", "rank": 17}, {}, "lora.rank=17 is more than lora.init=pissa can take out of"),
        ("blocks", {**NF4, "dora": True}, {}, "lora.base=nf4 keeps no rows of numbers, whose lengths lora.dora"),
        ("blocks", NF4, ZERO, "lora.base=nf4 is held in bytes, which parallel.engine=deepspeed"),
        ("gpt2", NF4, {}, "lora.base=nf4 rounds rows of inputs, and this gpt2 has its matrices transposed"),
        ("llama", NF4, {}, "lora.base=nf4 has blocks of 64 inputs, which do not divide those of q_proj (32)"),
        ("blocks", NF4, {"tensor": 4}, "parallel.tensor=4 does not divide the blocks of 64 inputs of o_proj (2)"),
    ],
)
def test_what_cannot_be_is_told(family: str, lora: dict[str, Any], parallel: dict[str, Any], words: str) -> None:
    recipe = recipe_with(lora, parallel=parallel)
    found = [*lora_errors(recipe, runs_here=True), *target_errors(recipe, blueprint_of(family))]
    assert any(str(error).startswith(words) for error in found), [str(error) for error in found]


def test_an_old_torch_keeps_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_adapter_base, "torch_version", lambda: (2, 11))
    recipe = recipe_with(NF4, precision={"compute": "bfloat16"})
    (error,) = lora_errors(recipe, runs_here=True)
    assert str(error).startswith("lora.base=nf4 is held in bytes, which torch ")
    assert str(error).endswith(" gathers as bfloat16; use torch 2.13 or newer, or precision.compute=float32")
    assert not [*lora_errors(recipe_with(NF4), runs_here=True)]


@pytest.mark.full
@pytest.mark.parametrize("lora", TAKING_OUT)
def test_what_was_taken_out_is_given_back_by_the_export(tmp_path: Path, lora: dict[str, Any]) -> None:
    """A run that changes its mesh in the middle, and its adapter beside the whole matrices."""
    base = pretrained(tmp_path / "base")
    recipe = adapter_run(base, {"rank": 4, "alpha": 8.0, "modules_to_save": ["lm_head"], **lora})
    run(recipe, tmp_path / "whole")
    first = adapter_run(base, recipe.lora.model_dump(), "2x2x1", schedule="zbv")
    run(first.model_copy(update={"train": first.train.model_copy(update={"steps": 2})}), tmp_path / "changed")
    run(recipe, tmp_path / "changed")
    for one, other in zip(losses(tmp_path / "whole"), losses(tmp_path / "changed"), strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    assert export_adapter(tmp_path / "changed", tmp_path / "adapter").difference <= 1e-5
    assert export_adapter(tmp_path / "changed", tmp_path / "merged", merge=True).difference <= 1e-5
    beside = PeftModel.from_pretrained(loaded(base), tmp_path / "adapter")
    assert beside.peft_config["default"].r == 8
    assert beside.peft_config["default"].init_lora_weights is True
    assert torch.allclose(logits(beside), logits(loaded(tmp_path / "merged")), atol=1e-4)


@pytest.mark.full
def test_a_run_in_4_bits_goes_on_and_is_exported(tmp_path: Path) -> None:
    base = pretrained(tmp_path / "base", "blocks")
    lora = {"rank": 4, "base": "nf4", "bias": "lora_only"}
    run(adapter_run(base, lora), tmp_path / "whole")
    first = adapter_run(base, lora, "2x2x1", schedule="zbv")
    run(first.model_copy(update={"train": first.train.model_copy(update={"steps": 2})}), tmp_path / "changed")
    run(adapter_run(base, lora, "1x2x2"), tmp_path / "changed")
    for one, other in zip(losses(tmp_path / "whole"), losses(tmp_path / "changed"), strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    assert export_adapter(tmp_path / "changed", tmp_path / "adapter").difference <= 1e-5
    assert export_adapter(tmp_path / "changed", tmp_path / "merged", merge=True).difference <= 1e-4
    merged, rounded = loaded(tmp_path / "merged"), loaded(base)
    round_frozen(rounded.requires_grad_(False).model.layers)
    of_whole = logits(PeftModel.from_pretrained(loaded(base), tmp_path / "adapter"))
    of_rounded = logits(PeftModel.from_pretrained(rounded, tmp_path / "adapter"))
    assert torch.allclose(logits(merged), of_rounded, atol=1e-4)
    assert (of_whole - of_rounded).abs().max() > 1e-2, "the base is not the folder's own"
    again = adapter_run(base, {"adapter": str(tmp_path / "adapter"), "base": "nf4"})
    assert not [*target_errors(again, blueprint_of("blocks"))]
    run(again, tmp_path / "again")
    assert losses(tmp_path / "again")[0][1] < losses(tmp_path / "whole")[0][1], "it goes on with what was learnt"


@pytest.mark.full
def test_factors_taken_out_before_rounding_are_exported_merged(tmp_path: Path) -> None:
    base = pretrained(tmp_path / "base", "blocks")
    recipe = adapter_run(base, {"rank": 4, "base": "nf4", "init": "pissa"}, "1x1x2")
    run(recipe, tmp_path / "run")
    assert "--to merged" in closing_lines(recipe, tmp_path / "run")[-1]
    with pytest.raises(UserError, match=r"lora.init=pissa left matrices that were then rounded .* use --to merged"):
        export_adapter(tmp_path / "run", tmp_path / "adapter")
    assert export_adapter(tmp_path / "run", tmp_path / "merged", merge=True).difference <= 1e-4
