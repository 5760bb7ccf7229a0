"""`cuboid verify`: a mesh that computes the numbers of one process passes; every planted fault is found and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers  # also since its log handler keeps the stream that it finds first: not the runner's
from samples import chats, said
from torch.distributed.tensor import Replicate
from typer.testing import CliRunner
from verifying import RECIPE, Verify

from cuboid.launch import cli
from cuboid.parallel import gradients, tensor
from cuboid.trainer import assemble, engine, one_process
from cuboid.trainer.data import Batch

pytestmark = pytest.mark.usefixtures("beside_a_text")


def test_a_right_mesh_passes_as_json(verify: Verify) -> None:
    code, printed = verify(as_json=True)
    found = json.loads(printed)
    assert code == 0
    assert found["pass"] is True
    assert found["mesh"] == "pipeline 2 x data 2 x tensor 2, 1f1b, 4 microbatches, llama, sharded"
    assert 0 < found["worst_gradient"]["rel"] <= found["tolerance"]["gradient_rel"] == 1e-5
    assert found["loss_rel"] <= 1e-6
    assert found["grad_norm_rel"] <= 1e-5
    assert 0 < found["weights_rel"] <= 1e-3
    assert found["missing_gradients"] == []


def test_the_recipes_own_model_is_compared_where_it_is_not_shrunk(verify: Verify) -> None:
    code, printed = verify(
        "parallel.tensor=1", "parallel.schedule=zbv", "model.config.num_hidden_layers=5", shrink=False
    )
    assert code == 0, printed
    assert "the same numbers" in printed
    assert "shrunk" not in printed


@pytest.mark.parametrize("shrink", [False, pytest.param(True, marks=pytest.mark.full)])
def test_conversations_packed_with_very_uneven_masks_pass(verify: Verify, tmp_path: Path, shrink: bool) -> None:
    """Several to a sequence, a few predicted tokens in some and nearly all in others."""
    turns = [("?" * (1 + row % 23), "!" * (1 + (row * row) % 61) if row % 3 else ".") for row in range(400)]
    chats(tmp_path / "chat.jsonl", [said(*turn) for turn in turns])
    data = "{kind: chat, path: chat.jsonl, tokenizer: bytes, chat_template: chatml, sequence_length: 256}"
    code, printed = verify(f"data={data}", "model.config.num_hidden_layers=4", shrink=shrink, as_json=True)
    assert code == 0, printed
    found = json.loads(printed.splitlines()[-1])
    assert found["pass"] is True
    assert found["mesh"].startswith("pipeline 2 x data 2 x tensor 2")
    assert found["loss_rel"] <= 1e-6
    assert found["missing_gradients"] == []


def test_short_sequences_keep_answers_and_borders() -> None:
    """What `verify` reads of long sequences: a row has its rare predicted tokens and a border, wherever they are."""
    positions = torch.cat([torch.arange(50), torch.arange(40), torch.arange(10)]).repeat(4, 1)
    labels = torch.full((4, 100), -100)
    labels[0, 45:49] = labels[1, 20:23] = labels[2, 88] = 7
    labels[3] = 7
    found = one_process._window(Batch(torch.arange(100).repeat(4, 1), labels, positions), 16)
    assert (found.labels == 7).sum(1).tolist() == [4, 3, 1, 16]
    assert (found.position_ids[:, 1:] == 0).any(1).tolist() == [True, False, True, True]
    for row in range(4):
        begin = int((found.position_ids[row] == 0).nonzero()[-1])
        assert found.position_ids[row, begin:].tolist() == list(range(16 - begin))
        assert found.position_ids[row, :begin].tolist() == list(range(begin))
        assert found.input_ids[row].tolist() == list(
            range(int(found.input_ids[row, 0]), int(found.input_ids[row, 0]) + 16)
        )


def test_a_pretrained_model_is_shrunk_whatever_else_its_config_holds(verify: Verify, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(hidden_size=64, vocab_size=264, num_attention_heads=8, num_key_value_heads=4)
    config.save_pretrained(tmp_path / "model")
    stored = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(stored | {"unk_token_id": 0, "_private": "x"}))
    (tmp_path / "model/model.safetensors").touch()  # its weights are not read: the shrunk model is drawn from the seed
    code, printed = verify("model={pretrained: model}", "parallel.data=1", "parallel.tensor=1")
    assert code == 0, printed
    assert "shrunk to 3 layers" in printed


def test_a_teacher_is_shrunk_too(verify: Verify, tmp_path: Path) -> None:
    config = transformers.Qwen3Config(hidden_size=96, vocab_size=264, num_attention_heads=8, num_key_value_heads=4)
    config.save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher/model.safetensors").touch()
    distill = "distill={teacher: teacher, temperature: 2.0, weight: 0.7, top_k: 9}"
    code, printed = verify(distill, "parallel.schedule=zbv")
    assert code == 0, printed
    assert "with 0.7 of a teacher" in printed


@pytest.mark.full
def test_layers_are_compared_with_those_of_a_teacher(verify: Verify, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 4}
    transformers.Qwen3Config(vocab_size=264, **sizes).save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher/model.safetensors").touch()
    terms = "hidden: 0.5, hidden_loss: cosine, attention: 0.5, attention_layers: [3, 11], relation_heads: 8"
    code, printed = verify(f"distill={{teacher: teacher, {terms}}}", "parallel.schedule=zbv")
    assert code == 0, printed


def test_what_is_pruned_later_is_pruned_at_once(verify: Verify) -> None:
    code, printed = verify("prune={ratio: 0.7, begin_step: 10, end_step: 20}", "parallel.schedule=interleaved_1f1b")
    assert code == 0, printed
    assert "magnitude pruned to 0.7" in printed


def test_what_is_rounded_later_is_rounded_at_once(verify: Verify) -> None:
    settings = "quantize={scheme: int4, start_step: 10}"
    code, printed = verify(settings, "lora={rank: 2}", "parallel.schedule=interleaved_1f1b")
    assert code == 0, printed
    assert "rounded to int4" in printed


@pytest.mark.full
def test_what_is_pruned_as_a_whole_is_pruned_at_once(verify: Verify) -> None:
    code, printed = verify("prune={method: layers, ratio: 0.3, begin_step: 10, end_step: 20}", "parallel.schedule=zbv")
    assert code == 0, printed
    assert "layers pruned to 0.5" in printed


SMALL = {"vocab_size": 264, "hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 8, "pad_token_id": None}


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("gpt2", {}),  # whose dropout is left out
        pytest.param("gemma3_text", {}, marks=pytest.mark.full),
        pytest.param("phi3", {}, marks=pytest.mark.full),
        pytest.param("smollm3", {}, marks=pytest.mark.full),
        pytest.param("olmo2", {"num_key_value_heads": 4}, marks=pytest.mark.full),
        pytest.param("gpt_neox", {}, marks=pytest.mark.full),
    ],
)
def test_a_proven_family_passes(verify: Verify, family: str, values: dict[str, int]) -> None:
    config = {"model_type": family, **SMALL, **values}
    code, printed = verify(f"model={{config: {json.dumps(config)}}}")
    assert code == 0, printed
    assert family in printed


LONE = ["parallel={}", "model.config.hidden_size=512", "train.steps=1", "checkpoint.every=0"]


@pytest.mark.parametrize(
    ("command", "arguments", "threads"), [("verify", ["--shrink", "none"], None), ("train", LONE, "2")]
)
def test_ranks_do_not_wait_for_threads_of_the_process_that_forked_them(
    command: str, arguments: list[str], threads: str | None
) -> None:
    Path("small.yaml").write_text(RECIPE.format(family="llama"))
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {} if threads is None else {"OMP_NUM_THREADS": threads}
    line = [sys.executable, "-m", "cuboid.launch.cli", command, "small.yaml", *arguments]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


def test_groups_of_data_ranks_and_bfloat16_have_their_own_words(verify: Verify) -> None:
    code, printed = verify("parallel.data=4", "parallel.tensor=1", "parallel.shard=2", "precision.compute=bfloat16")
    assert code == 0, printed
    assert "llama, sharded in groups of 2, bfloat16, shrunk to 3 layers" in printed
    assert "allowed: bfloat16 rounding" in printed
    # rounding shows, so that it was computed in bfloat16 indeed
    gradient = next(line for line in printed.splitlines() if line.startswith("a parameter's gradient"))
    assert float(gradient.split()[3]) > 1e-3


def test_a_recipe_that_cannot_run_is_refused_as_by_train() -> None:
    Path("small.yaml").write_text(RECIPE.format(family="llama"))
    done = CliRunner().invoke(cli.app, ["verify", "small.yaml", "parallel.tensor=3"])
    assert done.exit_code == 2
    assert "parallel.tensor=3 does not divide" in done.stderr


def mean_of_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each data rank divides by its own tokens."""

    def count(self: engine.NativeEngine, labels: Any) -> int:
        return int((labels != engine.IGNORE).sum()) * self.block.layout.data

    monkeypatch.setattr(engine.NativeEngine, "_count_tokens", count)


def norm_left_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor rank's norm within heads takes the gradient of its own heads for the whole."""
    wrap = {**tensor._WRAP, tensor.Role.HEADS: lambda module, *_: tensor._wrap_local(module, Replicate())}
    monkeypatch.setattr(tensor, "_WRAP", wrap)


def all_reduce_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies of a tied embedding keep their own gradients."""
    monkeypatch.setattr(gradients.TiedWeights, "sum_gradients", lambda self: None)


def stage_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage's layers take no gradient."""
    build = assemble.build_stages

    def frozen(*arguments: Any) -> Any:
        stages = build(*arguments)
        for stage in stages:
            for parameter in stage.layers.parameters():
                parameter.requires_grad_(not stage.is_first)
        return stages

    monkeypatch.setattr(assemble, "build_stages", frozen)


def test_adapters_are_compared_with_both_matrices_drawn(verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = ("parallel.data=1", "lora={rank: 4, dropout: 0.1}")
    code, printed = verify(*mesh)
    assert code == 0, printed
    assert "llama, adapters of rank 4, shrunk" in printed
    gradient = next(line for line in printed.splitlines() if line.startswith("a parameter's gradient"))
    assert ".lora_" in gradient
    norm_left_plain(monkeypatch)  # A beside a column has the role of such a norm
    code, printed = verify(*mesh)
    assert code == 1, printed
    assert "lora_A.default.weight  <- too much" in printed


@pytest.mark.full
@pytest.mark.parametrize(
    ("lora", "compute"),
    [("{rank: 64, base: nf4, init: pissa}", "float32"), ("{rank: 4, base: nf4, init: orthogonal}", "bfloat16")],
)
def test_what_is_beside_adapters_is_compared_too(verify: Verify, lora: str, compute: str) -> None:
    """In 4 bits, shrunk to whole blocks, and less factors of no higher rank than a shrunk matrix has."""
    code, printed = verify("model.config.hidden_size=128", f"lora={lora}", f"precision.compute={compute}")
    assert code == 0, printed
    assert "beside 4 bits" in printed


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (mean_of_means, "the loss"),
        (norm_left_plain, "k_norm.weight  <- too much"),
        (all_reduce_forgotten, "model.embed_tokens.weight  <- too much"),
        (stage_not_trained, "no gradient: model.layers.0."),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_planted_faults_are_found(
    verify: Verify, plant: Callable[[pytest.MonkeyPatch], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    code, printed = verify(family="qwen3")
    assert code == 1, printed
    assert "NOT the same numbers" in printed
    assert words in printed
    assert words != "the loss" or next(line for line in printed.splitlines() if line.startswith(words)).endswith(
        "too much"
    )
