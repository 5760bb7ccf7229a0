"""Experts made of a dense model: its logits before training, on every mesh, in a family that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import model_config
from harness import run_ranks
from stores import save_first_weights
from transformers import AutoConfig, AutoModelForCausalLM

from cuboid.launch import verify as verification
from cuboid.parallel.errors import FieldError, UserError
from cuboid.trainer.export import export_hf
from cuboid.trainer.model_config import config_of
from cuboid.trainer.recipe import Recipe

IDS = torch.arange(48).view(2, 24)


def dense(folder: Path, family: str, **changes: Any) -> Any:
    values = model_config(family, False) | {"attention_bias": False, "mlp_bias": False, "vocab_size": 264} | changes
    values = {key: value for key, value in values.items() if family == "llama" or key != "mlp_bias"}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.save_pretrained(folder)
    return model


def recipe_of(folder: Path, *, parallel: dict[str, Any], moe: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "upcycled",
            "model": {"pretrained": str(folder)},
            "data": {"kind": "text", "path": "package:stdlib", "tokenizer": "bytes", "sequence_length": 24},
            "parallel": parallel,
            "moe": moe,
            "train": {"steps": 2, "global_batch": 8},
        }
    )


@pytest.mark.parametrize(
    ("family", "made", "parallel"),
    [
        ("llama", "mixtral", {"pipeline": 2, "data": 2, "expert": 2, "microbatches": 2}),
        ("mistral", "mixtral", {"data": 2, "tensor": 2, "expert": 4}),
        ("qwen3", "qwen3_moe", {"pipeline": 2, "tensor": 2, "expert": 2, "microbatches": 2}),
    ],
)
def test_experts_give_what_the_dense_model_gave(
    tmp_path: Path, family: str, made: str, parallel: dict[str, int]
) -> None:
    model = dense(tmp_path / "dense", family)
    recipe = recipe_of(tmp_path / "dense", parallel=parallel, moe={"experts": 8, "top_k": 3})
    run_ranks(save_first_weights, recipe.layout.world_size, recipe, tmp_path, timeout=120)
    assert export_hf(tmp_path, tmp_path / "out").difference == 0
    experts = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (experts.config.model_type, experts.config.num_experts_per_tok) == (made, 3)
    layer = experts.model.layers[0].mlp
    assert len(layer.gate.weight) == len(layer.experts.down_proj) == 8
    assert layer.gate.weight.std() > 0.01, "routers that are drawn"
    with torch.no_grad():
        found, expected = experts(IDS).logits, model(IDS).logits
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() <= 1e-5


def test_verify_tries_the_experts_that_would_be_made(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dense(tmp_path / "dense", "qwen3")
    (tmp_path / "text.txt").write_text("All that is gold does not glitter. " * 60)
    (tmp_path / "up.yaml").write_text(
        f"name: up\nmodel: {{pretrained: {tmp_path / 'dense'}}}\n"
        f"data: {{kind: text, path: {tmp_path / 'text.txt'}, tokenizer: bytes, sequence_length: 32}}\n"
        "parallel: {data: 2, expert: 2, microbatches: 2}\nmoe: {experts: 4}\ntrain: {steps: 3, global_batch: 8}\n"
        "track: {to: none}\nlaunch: {launcher: local}\n"
    )
    code = verification.verify(str(tmp_path / "up.yaml"), [], shrink=True, as_json=False)
    printed = capfd.readouterr().out
    assert code == 0, printed
    assert "qwen3_moe, sharded, experts over 2 ranks" in printed
    with pytest.raises(UserError, match="--shrink none cannot tell: experts just made of a dense model are all alike"):
        verification.verify(str(tmp_path / "up.yaml"), [], shrink=False, as_json=False)


def test_what_experts_cannot_be_made_of_is_refused(tmp_path: Path) -> None:
    dense(tmp_path / "dense", "llama", attention_bias=True)
    dense(tmp_path / "plain", "llama")
    scratch = recipe_of(tmp_path / "plain", parallel={}, moe={"experts": 4})
    scratch = scratch.model_copy(
        update={"model": scratch.model.model_copy(update={"pretrained": None, "config": model_config("llama", False)})}
    )
    biased = recipe_of(tmp_path / "dense", parallel={}, moe={"experts": 4})
    greedy = recipe_of(tmp_path / "plain", parallel={}, moe={"experts": 4, "top_k": 5})
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SMALL)).save_pretrained(tmp_path / "mixed")
    twice = recipe_of(tmp_path / "mixed", parallel={}, moe={"experts": 4})
    for recipe, words in (
        (scratch, "moe.experts=4 has no weights to make experts of.*; give model.pretrained, or a config with experts"),
        (biased, "moe.experts=4 makes mixtral of this llama, which has no attention_bias; use null"),
        (greedy, "moe.top_k=5 is more than the moe.experts=4 there are; use at most 4"),
        (twice, "moe.experts=4 cannot make experts of mixtral; use a model of llama, mistral or qwen3, or null"),
    ):
        with pytest.raises(FieldError, match=words):
            config_of(recipe)


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "num_local_experts": 2,
}
