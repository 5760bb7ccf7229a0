"""Pruning of heads, channels and layers: every mesh removes what one process removes, and an export is without it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import FAMILIES, Case
from harness import run_ranks
from parity import (
    assembled,
    assert_same_numbers,
    compare,
    difference,
    full,
    logits_of,
    make_batch,
    one_process,
    own_share,
    plain_pruning,
    reference,
)
from runs import check_resumed, events, losses, recipe_on, run, shards
from stores import save_model
from test_check import complaints, recipe
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cuboid.launch import cli
from cuboid.parallel import structures as parallel_structures
from cuboid.parallel.errors import UserError
from cuboid.trainer import structures
from cuboid.trainer.check import Devices, check
from cuboid.trainer.export import export_hf
from cuboid.trainer.recipe import PruneSettings
from cuboid.trainer.recipe_file import load_recipe

CELLS = [
    Case(2, 2, 2, "1f1b", tied=True, prune="heads"),
    Case(1, 2, 2, prune="channels"),
    Case(2, 2, 1, "interleaved_1f1b", family="qwen3", prune="layers"),
]
MORE_CELLS = [
    Case(2, 1, 2, "zbv", sequence=False, prune="layers"),
    Case(1, 2, 2, family="gemma2", tied=True, prune="layers"),
    Case(1, 2, 1, family="olmo2", shard=False, prune="layers"),
    Case(2, 1, 1, "gpipe", family="mistral", activation_checkpointing="full", prune="layers"),
    Case(1, 1, 3, family="smollm2", prune="heads"),
    Case(2, 2, 1, "interleaved_zero_bubble", family="qwen2", prune="heads"),
    Case(1, 4, 1, family="gemma3", tied=True, prune="heads"),
    Case(2, 1, 1, "dualpipe_v", family="smollm3", tied=True, prune="channels"),
    Case(1, 2, 2, family="olmo2", sequence=False, prune="channels"),
]
FULL = [pytest.param(case, marks=pytest.mark.full) for case in MORE_CELLS]


@pytest.mark.parametrize("case", [*CELLS, *FULL], ids=str)
def test_mesh_equals_one_process(case: Case) -> None:
    assert_same_numbers(case, difference(case))


def zeros_of(case: Case, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Where the pruned weights of this rank are zero before the first step."""
    with assembled(case, weights) as engine:
        engine.prune(1, own_share(make_batch(0), engine.block))
        return {name: full(weight) == 0 for name, weight in engine.weights() if ".mlp." in name}


def test_of_equal_channels_the_first_go_on_every_mesh() -> None:
    """In threes, of which each rank has others, and 16 of 48 go: one three is parted."""
    case = Case(1, 2, 2, prune="channels")
    model = one_process(Case())
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight.t()):
                weight.copy_(weight[:16].repeat(3, 1))
            for bias in (layer.mlp.gate_proj.bias, layer.mlp.up_proj.bias):
                bias.copy_(bias[:16].repeat(3))
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    pruning = plain_pruning(case, model, dict(model.named_parameters()))
    assert pruning
    pruning.begin(1, partial(logits_of, model, make_batch(0)))
    for found in run_ranks(zeros_of, case.world_size, case, weights, timeout=120):
        for name, zeros in found.items():
            assert torch.equal(zeros, model.get_parameter(name) == 0), name
    parted = (model.model.layers[0].mlp.gate_proj.weight == 0).all(1).view(3, 16).sum(0).tolist()
    assert {0, 3} < set(parted), "of some threes one goes and another stays"


def influences_of(case: Case, weights: Mapping[str, torch.Tensor]) -> list[float]:
    with assembled(case, weights) as engine:
        stages, mine = engine.pipeline.modules.values(), own_share(make_batch(0), engine.block)
        return parallel_structures.influence(stages, lambda: engine.evaluate([mine]), engine.block).tolist()


@pytest.mark.full
@pytest.mark.parametrize(
    "case", [Case(2, 2, 2), Case(1, 2, 2, sequence=False, activation_checkpointing="full")], ids=str
)
def test_layers_are_judged_by_the_tokens_of_all_ranks(case: Case) -> None:
    model, wanted = one_process(case), []

    def judge(_: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        wanted.append(1 - cosine_similarity(args[0], output, dim=-1).mean().item())

    for layer in model.model.layers:
        layer.register_forward_hook(judge)
    with torch.no_grad():
        logits_of(model, make_batch(0))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for found in run_ranks(influences_of, case.world_size, case, weights, timeout=120):
        assert found == pytest.approx(wanted, abs=1e-6)


def own_scores(patch: pytest.MonkeyPatch) -> None:
    """Each rank judges by its own part of a unit's weights."""
    patch.setattr(parallel_structures, "dist", SimpleNamespace(all_reduce=lambda sums: None))


def zeros_moved(patch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    patch.setattr(parallel_structures.StructuredPruning, "kept", lambda self: nullcontext())


def gradients_not_masked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(parallel_structures.StructuredPruning, "mask_gradients", lambda self: None)


@pytest.mark.parametrize(
    ("plant", "method", "shown"),
    [
        (own_scores, "channels", "gradient"),
        pytest.param(zeros_moved, "channels", "update", marks=pytest.mark.full),
        # a head or channel of zeros has no gradient; what a layer writes with has one
        pytest.param(gradients_not_masked, "layers", "update", marks=pytest.mark.full),
    ],
)
def test_a_planted_fault_is_found(plant: Any, method: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 2, 1, prune=method)
    expected = reference(case)
    plant(monkeypatch)
    ranks = run_ranks(compare, case.world_size, case, expected, timeout=120)
    assert max(getattr(rank, shown) for rank in ranks) > 2e-3


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40).view(2, 20)).logits


def pruned_model(family: str, method: str) -> tuple[Any, dict[str, Any]]:
    """In one process, before its third step; and what its recipe says."""
    case = Case(family=family, tied=family.startswith("gemma"), prune=method)
    model, settings = one_process(case), case.recipe().prune
    pruning = plain_pruning(case, model, dict(model.named_parameters()))
    assert pruning
    assert settings
    pruning.begin(3, partial(logits_of, model, make_batch(0)))
    return model, settings.model_dump(mode="json")


OF_EACH_FAMILY = {
    name
    for name, config in FAMILIES.items()
    if config["model_type"] in structures.FAMILIES and name not in ("blocks", "large", "smollm2")
}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.full] * (name != "llama")) for name in sorted(OF_EACH_FAMILY)]
)
def test_an_export_is_smaller_and_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    smaller = {
        "heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4},
        "channels": {"intermediate_size": 24},
        "layers": {"num_hidden_layers": 3},
    }
    for method, sizes in smaller.items():
        if (family, method) == ("olmo2", "heads"):
            continue  # refused: below
        model, settings = pruned_model(family, method)
        save_model(model, tmp_path / method, 3, prune=settings)
        arguments = ["export", str(tmp_path / method), "--to", "hf", "--out", str(tmp_path / f"{method}-hf")]
        done = CliRunner().invoke(cli.app, arguments)
        assert done.exit_code == 0, done.output
        assert "what was pruned as a whole is left out" in done.output
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"{method}-hf")
        assert {name: getattr(loaded.config, name) for name in sizes} == sizes
        before, after = (sum(p.numel() for p in each.parameters()) for each in (model, loaded))
        assert after < 0.85 * before
        whole = logits(model)
        assert (logits(loaded) - whole).abs().max() <= 1e-5 * whole.abs().max()
        assert min(p.abs().amax() for p in loaded.parameters()) > 0, "nothing is left that is zero throughout"


def test_a_checkpoint_before_the_pruning_is_exported_whole(tmp_path: Path) -> None:
    model = one_process(Case())
    save_model(model, tmp_path, 1, prune=PruneSettings(method="heads", begin_step=2).model_dump(mode="json"))
    exported = export_hf(tmp_path, tmp_path / "out")
    assert exported.sizes
    assert exported.sizes[0] == exported.sizes[1]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_a_killed_run_goes_on_bit_for_bit_without_the_same_layers(tmp_path: Path) -> None:
    """Killed between the first layer that goes and the second."""
    text = {"data": {"eval_path": str(Path(__file__).parents[1] / "README.md")}, "train": {"eval_every": 9}}
    small = recipe_on("2x2x1", changes=text)
    small = small.model_copy(
        update={"prune": PruneSettings(method="layers", ratio=0.5, begin_step=2, end_step=8, every=3)}
    )
    whole = run(small, tmp_path / "whole")
    told = events(tmp_path / "whole", "prune")
    assert [(event["step"], event["method"], event["zeros"]) for event in told] == [
        (2, "layers", 0.0),
        (5, "layers", 0.25),
        (8, "layers", 0.5),
    ]
    assert told[-1]["eval_loss_after"] != told[-1]["eval_loss_before"]
    assert told[-1]["eval_loss_after"] != whole[-1]["eval_loss"]

    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed/checkpoints/step-00000009")
    run(small, tmp_path / "killed")
    check_resumed(tmp_path / "killed", at=6)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert shards(tmp_path / "killed", 9) == shards(tmp_path / "whole", 9)

    export_hf(tmp_path / "killed", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["num_hidden_layers"], len(config["layer_types"])) == (2, 2)


def test_what_goes_is_what_a_config_can_say() -> None:
    model = one_process(Case())
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def found(**settings: Any) -> structures.Structures:
        return structures.structures(model.config, PruneSettings.model_validate(settings), shapes)

    heads = found(method="heads")
    assert (heads.groups, heads.units, list(heads.counts)) == (6, 4, [0, 2, 3]), "6 heads do not divide 32"
    assert [heads.count(ratio) for ratio in (0.4, 0.5, 0.7, 0.75)] == [0, 2, 2, 3]
    assert list(found(method="channels").counts) == [0, 16]
    assert found(method="channels", multiple=10).count(0.5) == 18
    layers = found(method="layers")
    assert [layers.count(ratio) for ratio in (0.1, 0.34, 0.5, 0.99)] == [0, 2, 3, 5]
    assert found(method="layers").cuts.keys() == {
        f"model.layers.{layer}.{module}.{kind}"
        for layer in range(6)
        for module in ("self_attn.o_proj", "mlp.down_proj")
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("prune", "others", "told"),
    [
        (
            {"method": "heads", "ratio": 0.4},
            {},
            "prune.ratio=0.4 takes none of the 2 key-value heads of this llama, of which at least 1 must go at once; "
            "use 0.5",
        ),
        (
            {"method": "channels", "multiple": 50, "ratio": 0.3},
            {},
            "prune.ratio=0.3 takes none of the 96 channels of a layer, of which at least 46 must go at once; use 0.48",
        ),
        (
            {"method": "layers", "ratio": 0.2},
            {},
            "prune.ratio=0.2 takes none of the 4 layers, of which at least 1 must go at once; use 0.25",
        ),
        (
            {"method": "heads"},
            {"model": {"num_key_value_heads": 1}},
            "prune.method=heads finds no smaller config, whatever it takes of the 1 key-value heads of this llama; use "
            "magnitude",
        ),
        (
            {"method": "heads"},
            {"model": {"model_type": "olmo2"}},
            "prune.method=heads cannot take heads of this olmo2, whose norms read all heads at once; use channels or "
            "layers",
        ),
        (
            {"method": "layers"},
            {"model": {"model_type": "phi3", "pad_token_id": None}},
            "prune.method=layers does not know which weights these are in this phi3; use magnitude, or a model of "
            "gemma2, gemma3_text, llama, mistral, olmo2, qwen2, qwen3 or smollm3",
        ),
        (
            {"method": "channels"},
            {"model": {"model_type": "mixtral", "num_local_experts": 4}},
            "prune={...} cannot prune the experts of this mixtral yet; use null",
        ),
        (
            {"method": "heads", "multiple": 8},
            {},
            "prune.multiple=8 says nothing of prune.method=heads; use null, or channels",
        ),
        (
            {"method": "layers", "modules": ["q_proj"]},
            {},
            "prune.modules=q_proj names single modules, and prune.method=layers takes what works together; use null, "
            "or magnitude",
        ),
        (
            {"method": "layers"},
            {"lora": {"rank": 2}},
            "prune={...} would change weights that lora leaves frozen; use null, or lora=null",
        ),
        (
            {"method": "heads"},
            {"parallel": {"engine": "deepspeed", "zero_stage": 1, "data": 2}},
            "parallel.engine=deepspeed updates parameters where no zero can be kept (prune); use native",
        ),
    ],
)
def test_what_cannot_be_removed_is_refused(
    prune: dict[str, Any], others: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text")
    assert complaints(recipe(prune=prune, **others)) == [told]


def test_all_of_it_is_refused() -> None:
    with pytest.raises(UserError, match=r"prune\.ratio=1\.0 is not below 1\.0"):
        load_recipe("quickstart", ["prune={method: layers, ratio: 1.0}"])


def test_what_can_be_removed_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text")
    for prune in ({"method": "heads"}, {"method": "channels", "ratio": 0.4}, {"method": "layers", "ratio": 0.25}):
        check(recipe(prune=prune, parallel={"tensor": 2}), Devices("cpu", 2))
