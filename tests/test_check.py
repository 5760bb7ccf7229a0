"""Cross-field checks: every error at once, each naming the values that would work, before any process starts."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from cuboid.parallel.errors import FieldError, UserError, UserErrors
from cuboid.trainer import check as check_module
from cuboid.trainer.check import RANKS_PER_CORE, Devices, check, local_devices, resolve_devices
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.recipe_file import load_recipe

ROOT = Path(__file__).parents[1]
CPU, GPUS = Devices("cpu", 2), Devices("cuda", 4)
SIZES = {
    "vocab_size": 264,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 256,
}
LLAMA = SIZES | {"model_type": "llama", "intermediate_size": 96, "num_key_value_heads": 2}
SMOLLM2 = {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text")


def recipe(*, model=None, pretrained=None, **sections):
    """A small valid recipe with some fields of its sections changed."""
    values = {
        "name": "mini",
        "model": {"pretrained": pretrained} if pretrained else {"config": LLAMA | (model or {})},
        "data": {"kind": "text", "path": "text.txt", "sequence_length": 128} | sections.pop("data", {}),
        "train": {"steps": 10, "global_batch": 16} | sections.pop("train", {}),
        **sections,
    }
    return Recipe.model_validate(values)


def complaints(recipe, devices=CPU):
    with pytest.raises(UserErrors) as caught:
        check(resolve_devices(recipe, devices), devices)
    return str(caught.value).splitlines()


def test_good_recipes_pass():
    check(recipe(), CPU)
    block = {"pipeline": 2, "data": 2, "tensor": 2, "microbatches": 8}
    check(recipe(parallel=block), CPU)
    check(recipe(parallel=block | {"schedule": "interleaved_1f1b"}), CPU)
    check(recipe(parallel={"tensor": 2, "data": 2}), GPUS)
    check(recipe(model={"model_type": "qwen3", "head_dim": 16}, parallel={"tensor": 2}), None)


def test_tensor_against_heads_vocabulary_and_features():
    (line,) = complaints(recipe(model=SMOLLM2, parallel={"tensor": 2}))
    assert (
        line
        == "parallel.tensor=2 does not divide num_attention_heads=9 and num_key_value_heads=3 of this llama; use 1 or 3"
    )
    check(recipe(model=SMOLLM2, parallel={"tensor": 3}, data={"sequence_length": 126}), CPU)
    (line,) = complaints(recipe(model={"vocab_size": 257}, parallel={"tensor": 2}))
    assert line == (
        "parallel.tensor=2 does not divide vocab_size=257 of this llama; use 1, "
        "or model.config.vocab_size=258 (spare ids do no harm)"
    )
    lines = complaints(recipe(parallel={"tensor": 8}))
    assert "does not divide num_attention_heads=4 and num_key_value_heads=2 of this llama; use 1 or 2" in lines[0]


@pytest.mark.skipif(not (ROOT / "models/smollm2").is_dir(), reason="`make smollm2` was not run")
def test_the_shipped_model_refuses_what_its_recipe_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    shipped = load_recipe("smollm2", ["parallel.tensor=2"])
    (line,) = complaints(shipped)
    heads = "num_attention_heads=9 and num_key_value_heads=3"
    assert line == f"parallel.tensor=2 does not divide {heads} of models/smollm2; use 1 or 3"
    check(load_recipe("smollm2", ["parallel.data=1", "parallel.tensor=3", "data.sequence_length=126"]), CPU)


def on_tensor_ranks(values, **parallel):
    return Recipe.model_validate(
        recipe(parallel={"tensor": 2, **parallel}).model_dump() | {"model": {"config": SIZES | values}}
    )


def test_a_family_without_a_tensor_plan_needs_tensor_1():
    values = {"model_type": "stablelm", "intermediate_size": 96, "num_key_value_heads": 2}
    told = "parallel.tensor=2 or more has no plan: transformers' stablelm does not say how its layers are divided"
    assert f"{told}; use parallel.tensor=1" in complaints(on_tensor_ranks(values))


def test_tensor_ranks_do_not_drop_shared_hidden_states_each_for_itself():
    (told,) = complaints(on_tensor_ranks({"model_type": "gpt2"}, sequence=False))
    assert told == (
        "parallel.sequence=false lets each tensor rank drop other elements of the hidden states that they share; "
        "use true, or a config without dropout"
    )
    without = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    check(on_tensor_ranks({"model_type": "gpt2", **without}, sequence=False), CPU)
    check(on_tensor_ranks({"model_type": "gpt2"}), CPU)


def test_stages_schedule_and_batch():
    (line,) = complaints(recipe(parallel={"pipeline": 8, "microbatches": 8}))
    assert line == "parallel.pipeline=8 makes 8 stages, more than num_hidden_layers=4; use at most 4"
    interleaved = {"pipeline": 4, "microbatches": 8, "schedule": "interleaved_1f1b"}
    (line,) = complaints(recipe(parallel=interleaved))
    assert (
        line == "parallel.pipeline=4 with 2 stages a rank makes 8 stages, more than num_hidden_layers=4; use at most 2"
    )
    lines = complaints(recipe(parallel={"pipeline": 4, "data": 3, "microbatches": 2}, optimizer={"warmup_steps": 11}))
    assert lines == [
        "train.global_batch=16 is not a multiple of data x microbatches = 3 x 2 = 6; use 12 or 18",
        "parallel.microbatches=2 is fewer than the 4 stages that 1f1b keeps busy; use 4 or more, or schedule gpipe",
        "optimizer.warmup_steps=11 is more than train.steps=10; use at most 10",
    ]


def test_what_a_schedule_that_splits_backwards_cannot_take():
    split = {"pipeline": 2, "microbatches": 4, "schedule": "zbv", "reshard": True, "activation_checkpointing": "full"}
    lines = complaints(recipe(parallel=split))
    assert lines == [
        "parallel.reshard=true frees parameters that zbv needs again for the weight gradients; use auto or false",
        "parallel.activation_checkpointing=full would compute a layer again for each of its weights under zbv, "
        "whose backwards are split; use none, or another schedule",
    ]
    check(recipe(parallel=split | {"reshard": "auto", "activation_checkpointing": "none"}), CPU)


def test_an_old_torch_lays_no_v(monkeypatch):
    monkeypatch.setattr("cuboid.trainer.check_mesh.torch_version", lambda: (2, 11))
    (line,) = complaints(recipe(parallel={"pipeline": 2, "microbatches": 4, "schedule": "dualpipe_v"}))
    assert line.startswith("parallel.schedule=dualpipe_v lays neighbouring stages on one rank, which torch ")
    assert line.endswith("cannot start; use torch 2.13 or newer, or schedule interleaved_zero_bubble")
    check(recipe(parallel={"pipeline": 2, "microbatches": 4, "schedule": "interleaved_zero_bubble"}), CPU)


def test_groups_of_data_ranks():
    (line,) = complaints(recipe(parallel={"data": 4, "shard": 3, "microbatches": 4}))
    assert line == "parallel.shard=3 does not divide parallel.data=4 into groups; use 1, 2 or 4, or true or false"
    for shard, replicas, is_sharded in ((2, 2, True), (4, 1, True), (1, 1, False), (True, 1, True), (False, 1, False)):
        possible = recipe(parallel={"data": 4, "shard": shard, "microbatches": 4})
        check(possible, CPU)
        assert (possible.layout.replicas, possible.is_sharded) == (replicas, is_sharded)


def test_evaluation_needs_text_of_its_own():
    (line,) = complaints(recipe(train={"eval_every": 5}))
    assert line == "train.eval_every=5 has nothing to evaluate on; give data.eval_path, or use 0"
    (line,) = complaints(recipe(train={"eval_first": True}))
    assert line == "train.eval_first=true needs train.eval_every; use train.eval_every=1 or more, or false"
    (line,) = complaints(recipe(train={"eval_every": 5}, data={"eval_path": "gone.txt"}))
    assert line.startswith("data.eval_path=gone.txt does not exist")


def test_layers_by_hand():
    (line,) = complaints(recipe(parallel={"pipeline": 2, "microbatches": 2, "layers": [3, 2]}))
    assert line.startswith("parallel.layers=[3, 2] lays 5 layers on 2 stages, but there are 4 and 2; ")
    assert line.endswith("give 2 numbers whose sum is 4, or null")
    (line,) = complaints(recipe(parallel={"pipeline": 2, "microbatches": 2, "layers": [2, 1, 1]}))
    assert "lays 4 layers on 3 stages" in line
    check(recipe(parallel={"pipeline": 2, "microbatches": 2, "layers": [3, 1]}), CPU)


MIXTRAL = {"model_type": "mixtral", "num_local_experts": 6}


def test_experts():
    layout = {"data": 4, "tensor": 2, "expert": 4}
    assert complaints(recipe(model=MIXTRAL, parallel=layout)) == [
        "parallel.expert=4 does not divide the 6 experts of this mixtral; use 1 or 2"
    ]
    assert complaints(recipe(model=MIXTRAL, parallel=layout | {"expert": 3})) == [
        "parallel.expert=3 does not divide data x tensor = 8; use 1 or 2"
    ]
    assert complaints(recipe(model=MIXTRAL, parallel=layout | {"expert": 2, "sequence": False})) == [
        "parallel.sequence=false gives all tensor ranks the same tokens, and each would send them to the experts; "
        "use true, or parallel.tensor=1"
    ]
    zero = {"data": 2, "engine": "deepspeed", "zero_stage": 1}
    assert complaints(recipe(model=MIXTRAL, parallel=zero | {"tensor": 2})) == [
        "parallel.engine=deepspeed sums over data alone, and each tensor rank has tokens of its own for the experts of "
        "mixtral; use native, or parallel.tensor=1"
    ]
    assert complaints(recipe(moe={"aux_loss": 0.1}, parallel=layout | {"expert": 2})) == [
        "parallel.expert=2 has nothing to divide: llama has no experts; use 1",
        "moe={...} has nothing to balance: llama has no experts; use null",
    ]


def test_sequence_length():
    (line,) = complaints(recipe(data={"sequence_length": 512}))
    assert line == (
        "data.sequence_length=512 is longer than the model's max_position_embeddings=256; use at most 256, "
        "or a larger model.config.max_position_embeddings"
    )
    odd = recipe(parallel={"tensor": 2}, data={"sequence_length": 127})
    (line,) = complaints(odd)
    assert line == (
        "data.sequence_length=127 is not a multiple of parallel.tensor=2, whose ranks share each sequence; "
        "use 126 or 128, or parallel.sequence=false"
    )
    check(recipe(parallel={"tensor": 2, "sequence": False}, data={"sequence_length": 127}), CPU)


def test_ranks_against_the_machine():
    (line,) = complaints(recipe(parallel={"data": 2, "tensor": 2, "pipeline": 2, "microbatches": 8}), GPUS)
    assert line == (
        "parallel=pipeline 2 x data 2 x tensor 2 makes 8 ranks, more than the 4 GPUs of this machine; "
        "use parallel.data=1, or launch.device=cpu"
    )
    (line,) = complaints(recipe(parallel={"data": 128}, train={"global_batch": 128}))
    assert line.endswith(
        f"more than the 2 cores of this machine ({RANKS_PER_CORE} ranks a core at most); use parallel.data=64"
    )
    # auto takes what the devices leave
    assert resolve_devices(recipe(parallel={"data": "auto", "tensor": 2}), GPUS).layout.data == 2
    assert resolve_devices(recipe(parallel={"data": "auto", "tensor": 4}), CPU).layout.data == 1
    with pytest.raises(UserError, match=r"parallel.data=auto has no room: pipeline x tensor = 8 ranks on 4 GPUs"):
        resolve_devices(recipe(parallel={"data": "auto", "tensor": 4, "pipeline": 2}), GPUS)


def test_devices_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(FieldError, match=r"launch\.device=cuda finds no GPU here that torch can use; use cpu or auto"):
        local_devices(recipe(launch={"device": "cuda"}).launch)
    cores = Devices("cpu", len(os.sched_getaffinity(0)))
    assert local_devices(recipe(launch={"device": "auto"}).launch) == cores
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert local_devices(recipe(launch={"device": "auto"}).launch) == GPUS
    assert local_devices(recipe(launch={"device": "cpu"}).launch) == cores


def test_ray_must_be_there_where_it_launches(monkeypatch):
    monkeypatch.setattr(check_module, "find_spec", lambda name: None)
    (line,) = complaints(recipe(launch={"launcher": "ray"}))
    assert line == "launch.launcher=ray needs the package ray; pip install 'cuboid[ray]', or use local"
    check(recipe(launch={"launcher": "local"}), CPU)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"model_type": "lama"}, "model_type=lama is not a family that transformers knows; did you mean llama?"),
        ({"hiden_size": 3}, "model.config.hiden_size=3 is not a key of LlamaConfig; did you mean hidden_size?"),
        ({"num_attention_heads": 3}, "The hidden size (64) is not a multiple of the number of attention heads (3)."),
        ({"hidden_size": "big"}, "Field 'hidden_size' expected int, got str (value: 'big')"),
        ({"vocab_size": 100}, "data.tokenizer=bytes has ids up to 256, which do not fit the model's vocab_size=100"),
    ],
)  # fmt: skip
def test_model_configs_that_cannot_be(model, words):
    assert any(words in line for line in complaints(recipe(model=model)))


def test_pretrained_folders_that_are_none(tmp_path):
    folder = tmp_path / "models" / "x"
    assert "model.pretrained=./models/x is no folder here" in complaints(recipe(pretrained="./models/x"))[0]
    folder.mkdir(parents=True)
    assert "has no config.json" in complaints(recipe(pretrained="models/x"))[0]
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "weights in a pickle (*.bin, *.pt) are never read" in complaints(recipe(pretrained="models/x"))[0]
    (folder / "model.safetensors").touch()
    check(recipe(pretrained="models/x", data={"tokenizer": "bytes"}), CPU)
    # a folder's facts count like those of the recipe
    lines = complaints(recipe(pretrained="models/x", data={"tokenizer": "bytes"}, parallel={"tensor": 3}))
    assert "num_attention_heads=4 and num_key_value_heads=2 of models/x" in lines[1]
    assert re.search(r"model.pretrained=models/x gives no tokenizer", complaints(recipe(pretrained="models/x"))[0])


def test_folders_and_files():
    (line,) = complaints(recipe(data={"path": "nowhere.txt"}))
    assert line.startswith(
        "data.path=nowhere.txt does not exist; give a file, a folder, a glob, a hub id or package:stdlib"
    )
    (line,) = complaints(recipe(runs="text.txt"))
    assert line.startswith(
        "runs=text.txt cannot be written: text.txt: Not a directory; use a folder that you may write to"
    )
    (line,) = complaints(recipe(runs="/proc/nowhere"))
    assert "runs=/proc/nowhere cannot be written" in line


def test_ranks_that_run_elsewhere(tmp_path):
    cluster = {"address": "10.0.0.1:6379"}
    (line,) = complaints(recipe(launch=cluster), None)
    assert line.endswith("use an absolute path that every node sees")
    # the cluster's own room is looked at by the launcher
    check(recipe(launch=cluster, runs=str(tmp_path), parallel={"data": 512}, train={"global_batch": 512}), None)
    with pytest.raises(UserError, match=r"parallel.data=auto cannot be settled before the cluster is reached"):
        resolve_devices(recipe(launch=cluster, parallel={"data": "auto"}), None)


def test_everything_at_once():
    wrong = recipe(
        model={"num_key_value_heads": 4},
        parallel={"tensor": 3, "pipeline": 8, "data": 2},
        data={"path": "nowhere.txt", "tokenizer": "./nowhere", "sequence_length": 301},
        train={"global_batch": 7},
        runs="text.txt",
    )
    fields = [line.partition("=")[0] for line in complaints(wrong)]
    assert fields == [
        "train.global_batch", "parallel.microbatches", "data.sequence_length", "runs", "parallel.tensor",
        "parallel.pipeline", "data.sequence_length", "data.path", "data.tokenizer",
    ]  # fmt: skip
