"""Adapter runs: checkpoints that hold the adapter alone, other meshes, exports that peft loads, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cases import Case, model_config
from peft import PeftModel
from runs import losses, recipe_on, run
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cuboid.launch import cli
from cuboid.launch.progress import told
from cuboid.launch.reports import print_inspection
from cuboid.parallel.errors import FieldError, RunFailed, UserError
from cuboid.trainer import check_lora, inspection
from cuboid.trainer import export_adapter as adapter_export
from cuboid.trainer.adapters import adapt, inject, trained, trained_share, with_adapters
from cuboid.trainer.assemble import initial_weights, prepared
from cuboid.trainer.check_lora import lora_errors, target_errors
from cuboid.trainer.export import export_hf
from cuboid.trainer.export_adapter import export_adapter
from cuboid.trainer.model import draw_blueprint
from cuboid.trainer.model_config import read_checked_config
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.recipe_lora import LoraSettings


def pretrained(folder: Path, family: str = "llama", *, tied: bool = False) -> str:
    """A small model as transformers saves it, with values that show."""
    torch.manual_seed(3)
    values = model_config(family, tied) | {"vocab_size": 264}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


def adapter_run(base: str, lora: dict[str, Any], mesh: str = "1x1x1", **parallel: Any) -> Recipe:
    changes = {"train": {"steps": 4}, "checkpoint": {"every": 2}, "data": {"tokenizer": "bytes"}}
    recipe = recipe_on(mesh, changes=changes, **parallel).model_dump(mode="json")
    return Recipe.model_validate({**recipe, "model": {"pretrained": base}, "lora": lora})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40).view(2, 20)).logits


def loaded(folder: str | Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


LORA = {"rank": 4, "alpha": 8.0, "bias": "lora_only", "modules_to_save": ["lm_head"]}


def test_a_run_goes_on_on_another_mesh_and_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run without a break on one rank, one that changes its mesh in the middle: the same losses, and what they
    export is what peft and transformers load."""
    base = pretrained(tmp_path / "base")
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    run(adapter_run(base, LORA), whole)
    first = adapter_run(base, LORA, "2x1x2", schedule="zbv")
    run(first.model_copy(update={"train": first.train.model_copy(update={"steps": 2})}), changed)
    run(adapter_run(base, LORA, "2x2x1"), changed)
    for one, other in zip(losses(whole), losses(changed), strict=True):
        assert other == pytest.approx(one, rel=1e-5)

    found = inspection.inspect(changed)
    names = {name.removeprefix("model.") for name in found["tensors"] if name.startswith("model.")}
    blueprint = with_adapters(draw_blueprint(read_checked_config(first.model)), LoraSettings(**LORA))
    assert names == set(trained(blueprint.model))
    assert len(found["tensors"]) == 3 * len(names), "an adapter, two moments of each, and nothing of the base"
    assert found["facts"]["adapter"]["trained"] == sum(p.numel() for p in trained(blueprint.model).values())

    assert "peft" in found["facts"]["versions"]
    print_inspection(changed)
    printed = capsys.readouterr().out
    trained_numbers = f"{found['facts']['adapter']['trained']:,}"
    assert re.search(rf"^adapter     rank 4: {trained_numbers} of [0-9,]+ numbers$", printed, re.MULTILINE)
    assert re.search(r"^base        [0-9a-f]{64}$", printed, re.MULTILINE)

    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert export_adapter(changed, adapter).difference <= 1e-5
    assert export_adapter(changed, merged, merge=True).difference <= 1e-4
    of_peft = logits(PeftModel.from_pretrained(loaded(base), adapter))
    of_merged, of_base = logits(loaded(merged)), logits(loaded(base))
    assert torch.allclose(of_peft, of_merged, atol=1e-5)
    assert (of_peft - of_base).abs().max() > 1e-3, "nothing was trained"
    said = json.loads((adapter / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["bias"], said["base_model_name_or_path"]) == (4, 8, "lora_only", base)
    with pytest.raises(UserError, match="--to adapter"):
        export_hf(changed, tmp_path / "hf")
    check_refused_exports(tmp_path, base, changed)
    check_continued(tmp_path, base, adapter)
    check_of_another_model(tmp_path, adapter)
    other = load_file(Path(base) / "model.safetensors")
    other["model.norm.weight"] += 1
    save_file(other, Path(base) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not the one that was trained on"):
        export_adapter(changed, tmp_path / "again")
    with pytest.raises(AssertionError, match="is not the one whose adapter step-00000004 holds"):
        run(adapter_run(base, LORA, "1x1x1"), changed)


@pytest.mark.full
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_adapters_of_experts_go_on_elsewhere_and_are_exported(tmp_path: Path, family: str) -> None:
    """Divided over two ranks and then whole, the same losses; peft itself loads them, merged is the same model, and a
    run that goes on from them begins with what they compute."""
    base, whole, changed = pretrained(tmp_path / "base", family), tmp_path / "whole", tmp_path / "changed"
    lora = {"rank": 3, "targets": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    run(adapter_run(base, lora), whole)
    first = adapter_run(base, lora, "1x2x1", expert=2)
    run(first.model_copy(update={"train": first.train.model_copy(update={"steps": 2})}), changed)
    run(adapter_run(base, lora, "2x1x1"), changed)
    for one, other in zip(losses(whole), losses(changed), strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    assert not inspection.inspect(changed)["facts"]["adapter"]["frozen_experts"]
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert export_adapter(changed, adapter).difference <= 1e-5
    assert export_adapter(changed, merged, merge=True).difference <= 1e-4
    of_peft = logits(PeftModel.from_pretrained(loaded(base), adapter))
    assert torch.allclose(of_peft, logits(loaded(merged)), atol=1e-5)
    assert (of_peft - logits(loaded(base))).abs().max() > 1e-3, "nothing was trained"
    check_continued(tmp_path, base, adapter)


@pytest.mark.full
@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_transposed_linears_and_mixtures_are_exported_and_gone_on_from(tmp_path: Path, family: str) -> None:
    base, dora = pretrained(tmp_path / "base", family), family == "gpt2"
    lora = {"targets": ["c_attn", "c_fc", "c_proj", "lm_head"], "dora": True} if dora else {}
    recipe = adapter_run(base, {"rank": 2, **lora})
    run(recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 2})}), tmp_path / "run")
    assert export_adapter(tmp_path / "run", tmp_path / "adapter").difference <= 1e-5
    assert export_adapter(tmp_path / "run", tmp_path / "merged", merge=True).difference <= 1e-4
    for mesh in (one := "1x1x1"), (many := "2x2x1" if dora else "1x2x2"):
        again = adapter_run(base, {"adapter": str(tmp_path / "adapter")}, mesh)
        assert not [*target_errors(again, draw_blueprint(read_checked_config(again.model)))]
        run(again, tmp_path / mesh)
    assert losses(tmp_path / one)[0][1] < losses(tmp_path / "run")[0][1], "it begins with what was learnt"
    for expected, found in zip(losses(tmp_path / one), losses(tmp_path / many), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.full
def test_a_run_with_dropout_goes_on_bit_for_bit_on_the_same_mesh(tmp_path: Path) -> None:
    base = pretrained(tmp_path / "base")
    recipe = adapter_run(base, {"rank": 4, "dropout": 0.5}, activation_checkpointing="full")
    run(recipe, tmp_path / "whole")
    run(recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 2})}), tmp_path / "broken")
    run(recipe, tmp_path / "broken")
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    run(adapter_run(base, {"rank": 4}), tmp_path / "without")
    assert losses(tmp_path / "without")[-1] != losses(tmp_path / "whole")[-1]


@pytest.mark.full
def test_an_adapter_run_changes_its_engine(tmp_path: Path) -> None:
    base, changed = pretrained(tmp_path / "base"), tmp_path / "changed"
    run(adapter_run(base, LORA), tmp_path / "whole")
    zero = {"engine": "deepspeed", "zero_stage": 3}
    for steps, mesh, engine in ((1, "1x1x1", {}), (2, "1x2x1", zero), (4, "2x1x1", {})):
        recipe = adapter_run(base, LORA, mesh, **engine)
        run(recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})}), changed)
    for one, other in zip(losses(tmp_path / "whole"), losses(changed), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


def check_refused_exports(tmp_path: Path, base: str, source: Path) -> None:
    """What is not the run's adapter, or does not compute what it does, never appears."""
    out = tmp_path / "refused"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_export, "stored_name", lambda name: name)
        with pytest.raises(RunFailed, match="is not in both it and adapter_model"):
            export_adapter(source, out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_export, "load_adapter", lambda model, folder: model)
        with pytest.raises(RunFailed, match="its logits differ by"):
            export_adapter(source, out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_export, "_loaded", lambda folder: loaded(base))
        with pytest.raises(RunFailed, match="its logits differ by"):
            export_adapter(source, out, merge=True)
    assert not [path for path in tmp_path.iterdir() if "refused" in path.name]


def check_continued(tmp_path: Path, base: str, adapter: Path) -> None:
    """A run that goes on from an exported adapter begins with what it computes."""
    recipe = adapter_run(base, {"adapter": str(adapter)})
    blueprint = draw_blueprint(read_checked_config(recipe.model))
    assert not [*target_errors(recipe, blueprint)]
    adapted, read = prepared(recipe, blueprint)
    expected = PeftModel.from_pretrained(loaded(base), adapter)
    values = dict(expected.base_model.model.named_parameters())
    for name, parameter in adapted.model.named_parameters():
        target = torch.empty(parameter.shape)
        read(name, tuple(slice(0, size) for size in parameter.shape), target)
        assert torch.equal(target, values[name].view(target.shape)), name


def check_of_another_model(tmp_path: Path, adapter: Path) -> None:
    other = adapter_run(pretrained(tmp_path / "other", "qwen3"), {"adapter": str(adapter)})
    (error,) = target_errors(other, draw_blueprint(read_checked_config(other.model)))
    assert error.field == "lora.adapter"
    assert "is no adapter of this qwen3" in str(error)
    assert "base_layer.bias is too much" in str(error)


def blueprint_of(family: str, *, tied: bool = False) -> Any:
    return draw_blueprint(read_checked_config(Case(family=family, tied=tied).recipe().model))


def recipe_with(lora: dict[str, Any], **changes: Any) -> Recipe:
    recipe = Case().recipe().model_dump(mode="json")
    return Recipe.model_validate({**recipe, "lora": lora, **changes})


@pytest.mark.parametrize(
    ("family", "lora", "words"),
    [
        (
            "gpt2",
            {"targets": ["q_proj"]},
            "lora.targets=q_proj is no linear in a layer of this gpt2; use all-linear, or c_attn, c_fc or c_proj",
        ),
        ("llama", {"targets": ["embed_tokens"]}, "lora.targets=embed_tokens is the embedding of this llama, whose"),
        (
            "llama",
            {"targets": ["q_proj", "v_proj"], "modules_to_save": ["q_proj"]},
            "lora.targets=q_proj gets no adapter beside lora.modules_to_save=q_proj, which trains it whole; leave it",
        ),
        ("llama", {"targets": []}, "lora.targets=[] names nothing; use all-linear, or down_proj, gate_proj"),
        ("llama", {"modules_to_save": ["mlp"]}, "lora.modules_to_save=mlp is no module with weights of its own"),
        (
            "qwen3_moe",  # of which one layer has no experts
            {"targets": ["gate_proj"]},
            "lora.targets=gate_proj is no linear in a layer of this qwen3_moe; use all-linear, or k_proj",
        ),
        ("mixtral", {"modules_to_save": ["gate"]}, "lora.modules_to_save=gate is no module with weights of its own"),
        (
            "mixtral",
            {"target_parameters": ["experts.up_proj"]},
            "lora.target_parameters=experts.up_proj is no parameter of fused experts of this mixtral; "
            "use experts.down_proj or experts.gate_up_proj",
        ),
        (
            "mixtral",  # peft would take the router and each norm for one
            {"target_parameters": ["weight"]},
            "lora.target_parameters=weight is no parameter of fused experts of this mixtral",
        ),
        ("llama", {"target_parameters": ["experts.down_proj"]}, "lora.target_parameters=experts.down_proj is no"),
        (
            "mixtral",
            {"target_parameters": ["experts.down_proj"], "dropout": 0.1},
            "lora.dropout=0.1 is nothing that peft computes beside fused experts (lora.target_parameters); use 0",
        ),
        ("mixtral", {"target_parameters": ["experts.down_proj"], "dora": True}, "lora.dora=true is nothing that peft"),
        ("llama", {"adapter": "nowhere"}, "lora.adapter=nowhere has no adapter_config.json; give a folder that peft's"),
        ("llama", {"adapter": "nowhere", "rank": 3}, "lora.rank=3 stands beside lora.adapter=nowhere"),
    ],
)
def test_what_the_model_does_not_have_is_refused(family: str, lora: dict[str, Any], words: str) -> None:
    (error, *_) = target_errors(recipe_with(lora), blueprint_of(family))
    assert str(error).startswith(words)


def test_a_tied_head_is_not_trained_apart() -> None:
    (error,) = target_errors(recipe_with({"modules_to_save": ["lm_head"]}), blueprint_of("llama", tied=True))
    assert "is tied in this llama" in str(error)
    (error,) = target_errors(recipe_with({"targets": ["lm_head"]}), blueprint_of("llama", tied=True))
    assert str(error).startswith("lora.targets=lm_head is the tied head of this llama: merged, it and the")


def test_a_mistake_is_told_before_any_process_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = adapter_run(pretrained(tmp_path / "base"), {"targets": ["c_attn"]}).model_dump(mode="json")
    Path("mine.yaml").write_text(json.dumps(recipe))  # YAML too
    done = CliRunner().invoke(cli.app, ["train", "mine.yaml", "launch.launcher=local"])
    assert done.exit_code == 2
    assert "lora.targets=c_attn is no linear in a layer of this llama; use all-linear, or down_proj" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_lora, "find_spec", lambda name: None)
    (error,) = lora_errors(recipe_with({}), runs_here=True)
    assert str(error) == "lora={...} needs the package peft; pip install 'cuboid[lora]', or use null"
    assert not [*lora_errors(recipe_with({}), runs_here=False)]


def test_made_experts_are_refused() -> None:
    recipe = recipe_with({}, moe={"experts": 4})
    (error,) = lora_errors(recipe, runs_here=True)
    assert str(error).startswith("moe.experts=4 draws a router, which lora leaves frozen")
    assert not [*lora_errors(recipe.model_copy(update={"lora": None}), runs_here=True)]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"target_parameters": ["experts.down_proj"]}, "experts.down_proj is no parameter of fused experts of this"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa, which changes the model itself"),
        ({"peft_type": "IA3"}, "uses peft_type=IA3"),
        ({"target_modules": ".*_proj"}, "cannot be gone on from"),
        ({"r": "x"}, "cannot be gone on from"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(tmp_path: Path, said: dict[str, Any], words: str) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "use_rslora": False}
    config |= {"target_modules": ["q_proj"], "modules_to_save": None, **said}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").touch()
    (error,) = target_errors(recipe_with({"adapter": str(tmp_path)}), blueprint_of("llama"))
    assert isinstance(error, FieldError)
    assert words in str(error)


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_first_values_are_peft_s_and_depend_on_no_mesh(init: str) -> None:
    """Any part of a matrix is the same part of the same whole; B is zero."""
    recipe = recipe_with({"rank": 4, "init": init})
    blueprint = draw_blueprint(read_checked_config(recipe.model))
    weights = initial_weights(recipe, blueprint)
    adapted, read = adapt(recipe, blueprint, weights)
    names = [f"model.layers.{layer}.self_attn.q_proj.lora_{part}.default.weight" for layer in (0, 1) for part in "AB"]
    values = {}
    for name in names:
        shape = adapted.model.get_parameter(name).shape
        values[name] = whole = torch.empty(shape)
        read(name, (slice(0, shape[0]), slice(0, shape[1])), whole)
        part = torch.empty(2, shape[1])
        read(name, (slice(1, 3), slice(0, shape[1])), part)
        assert torch.equal(part, whole[1:3])
        assert bool(whole.any()) is (".lora_A." in name)
    assert not torch.equal(values[names[0]], values[names[2]])
    bound = 1 / 32**0.5  # of peft's kaiming_uniform_(a=sqrt(5)) over 32 inputs
    assert bool(values[names[0]].abs().max() <= bound) is (init == "default")
    name, target = "model.layers.0.self_attn.q_proj.base_layer.weight", torch.empty(32, 32)
    plain = torch.empty(32, 32)
    read(name, (slice(0, 32), slice(0, 32)), target)
    weights("model.layers.0.self_attn.q_proj.weight", (slice(0, 32), slice(0, 32)), plain)
    assert torch.equal(target, plain)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_first_lengths_are_those_of_the_rows(family: str) -> None:
    recipe = Recipe.model_validate(
        {**Case(family=family).recipe().model_dump(mode="json"), "lora": {"rank": 2, "dora": True}}
    )
    blueprint = draw_blueprint(read_checked_config(recipe.model))
    _, read = adapt(recipe, blueprint, initial_weights(recipe, blueprint))
    whole = transformers.AutoModelForCausalLM.from_config(blueprint.config)
    inject(whole, LoraSettings(rank=2, dora=True), blueprint.anatomy)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "magnitude" not in name:
                read(name, tuple(slice(0, size) for size in parameter.shape), parameter)
    targets = {name: layer for name, layer in whole.named_modules() if hasattr(layer, "lora_magnitude_vector")}
    assert targets
    for name, layer in targets.items():
        lengths = layer.lora_magnitude_vector["default"]
        matrices = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
        lengths.update_layer(base_layer=layer.base_layer, scaling=2.0, **matrices)  # peft's own
        found = torch.empty(lengths.weight.shape)
        read(f"{name}.lora_magnitude_vector.default.weight", (slice(0, len(found)),), found)
        assert torch.allclose(found, lengths.weight, rtol=1e-6)


def test_what_is_trained_is_told() -> None:
    share = trained_share(with_adapters(blueprint_of("mixtral"), LoraSettings(rank=2)))
    assert share["by_module"] == {"q_proj": 768, "o_proj": 768, "k_proj": 576, "v_proj": 576}
    assert share["trained"] == 2688
    assert share["frozen_experts"]
    base = sum(parameter.numel() for parameter in blueprint_of("mixtral").model.parameters())
    assert share["parameters"] == base + 2688
    line = told({"kind": "adapter", **share})
    assert line == (
        "trains 2.7 k of 139.0 k parameters (1.9%): q_proj 768, o_proj 768, k_proj 576, v_proj 576; "
        "the experts stay frozen"
    )
