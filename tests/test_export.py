"""A run's checkpoint, exported, loads in transformers to equal logits; and what may not be overwritten stays."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from harness import run_ranks
from runs import recipe_on, run
from safetensors import safe_open
from samples import CHATML, chats, said
from stores import flip, make_model, save_first_weights, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from cuboid.launch import cli
from cuboid.parallel.errors import RunFailed, UserError
from cuboid.trainer import export
from cuboid.trainer.export import export_hf
from cuboid.trainer.tokenizer import ByteTokenizer


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_the_folder_gives_the_same_logits(tmp_path: Path, tied: bool, shard_bytes: int) -> None:
    model = make_model(tied=tied)
    save_model(model, tmp_path, 1)
    exported = export_hf(tmp_path, tmp_path / "out", shard_bytes=shard_bytes)
    assert exported.difference <= 1e-5
    assert exported.checkpoint.name == "step-00000001"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(loaded), logits(model))
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (shard_bytes == 10**9)
    size = sum((tmp_path / "out" / file).stat().st_size for file in files)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert parameters <= size < parameters + 20_000, "a tied head is not stored twice, and no optimizer state is"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["use_cache"]) == (["LlamaForCausalLM"], True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "out"]


def test_bytes_come_with_a_tokenizer_that_gives_the_same_ids(tmp_path: Path) -> None:
    save_model(make_model(), tmp_path, 1)
    export_hf(tmp_path, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["def f(x):\n\treturn  x  # ünï ✓ 漢字 🙂\r\n", "".join(map(chr, range(0x500))), " a", "", "\x00\x7f"]
    for text, ids in zip(texts, ByteTokenizer().encode(texts), strict=True):
        assert tokenizer(text)["input_ids"] == ids.tolist()
        assert tokenizer.decode(ids.tolist()) == text
    assert (tokenizer.eos_token_id, len(tokenizer)) == (256, 257)


def test_a_pretrained_tokenizer_travels_along(tmp_path: Path) -> None:
    model = make_model()
    save_model(model, tmp_path / "first", 1)
    export_hf(tmp_path / "first", tmp_path / "base")
    save_model(model, tmp_path / "second", 1, pretrained=str(tmp_path / "base"))
    export_hf(tmp_path / "second", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc")["input_ids"] == [97, 98, 99]


def test_a_run_s_chat_template_travels_along(tmp_path: Path) -> None:
    """Also one of a file that is there no more."""
    path = chats(tmp_path / "chats.jsonl", [said("Who are you?", "I am a program.")] * 8)
    (tmp_path / "mine.jinja").write_text(CHATML)
    data = {"kind": "chat", "path": path, "chat_template": str(tmp_path / "mine.jinja"), "sequence_length": 128}
    run(recipe_on("1x1x1", changes={"data": data, "train": {"steps": 2}}), tmp_path / "run")
    (tmp_path / "mine.jinja").unlink()
    export_hf(tmp_path / "run", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHATML


@pytest.mark.parametrize(
    ("family", "stored"),
    [
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.7.up_proj.weight"),
        ("olmoe", "model.layers.0.mlp.experts.3.gate_proj.weight"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj"),
    ],
)
def test_experts_are_stored_as_their_family_does(tmp_path: Path, family: str, stored: str) -> None:
    model = make_model(family=family)
    save_model(model, tmp_path, 1)
    exported = export_hf(tmp_path, tmp_path / "out", shard_bytes=20_000)
    assert exported.difference == 0
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert stored in written
    assert len(set(written.values())) > 2
    model.save_pretrained(tmp_path / "theirs")
    with safe_open(tmp_path / "theirs" / "model.safetensors", framework="pt") as file:
        assert written.keys() == set(file.keys())


def test_biases_that_the_format_has_no_place_for_are_told(tmp_path: Path) -> None:
    case = Case(1, 2, 1, family="mixtral", expert=2)
    run_ranks(save_first_weights, 2, case.recipe(), tmp_path)
    done = CliRunner().invoke(cli.app, ["export", str(tmp_path), "--to", "hf", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "left out: 6 biases of routers (moe.bias_update), for which the format has no place" in done.output


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("llama", True),
        pytest.param("llama", False, marks=pytest.mark.full),
        pytest.param("phi3", False, marks=pytest.mark.full),
        pytest.param("gpt_neox", False, marks=pytest.mark.full),
        pytest.param("gpt2", True, marks=pytest.mark.full),
    ],
)
def test_every_mesh_exports_the_same_model(tmp_path: Path, family: str, tied: bool) -> None:
    cube = Case(pipeline=2, data=2, tensor=2, family=family, tied=tied)
    run_ranks(save_first_weights, 8, cube.recipe(), tmp_path / "cube")
    run_ranks(save_first_weights, 1, Case(family=family, tied=tied).recipe(), tmp_path / "one")
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "out")
        for name in ("cube", "one")
        if export_hf(tmp_path / name, tmp_path / name / "out")
    )
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_a_run_gives_its_newest_valid_checkpoint(tmp_path: Path) -> None:
    save_model(make_model(), tmp_path, 1, 2)
    shard = next((tmp_path / "checkpoints" / "step-00000002").glob("*.safetensors"))
    flip(shard, -1)
    exported = export_hf(tmp_path, tmp_path / "out")
    assert exported.checkpoint.name == "step-00000001"
    assert shard.name in exported.refused[0]
    with pytest.raises(UserError, match="SHA-256 differs"):
        export_hf(shard.parent, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_is_there_is_only_replaced_when_asked(tmp_path: Path) -> None:
    save_model(make_model(), tmp_path, 1)
    out = tmp_path / "out"
    out.mkdir()
    export_hf(tmp_path, out)
    (out / "notes").write_text("mine")
    with pytest.raises(UserError, match="is not empty; give another --out, or --overwrite"):
        export_hf(tmp_path, out)
    assert (out / "notes").exists()
    export_hf(tmp_path, out, overwrite=True)
    assert not (out / "notes").exists()


def test_places_that_must_not_be_replaced_are_refused(tmp_path: Path) -> None:
    save_model(make_model(), tmp_path / "run", 1)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    (tmp_path / "file").write_text("")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    for out, words in (
        (tmp_path / "file", "is not a folder"),
        (tmp_path / "home", "not a model's folder"),
        (tmp_path / "run", "lie inside one another"),
        (checkpoint / "hf", "lie inside one another"),
        (tmp_path / "file" / "below", "cannot be written"),
    ):
        with pytest.raises(UserError, match=words):
            export_hf(tmp_path / "run", out, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_an_architecture_that_does_not_fit_is_told(tmp_path: Path) -> None:
    model = make_model()
    model.config.num_hidden_layers = 5
    save_model(model, tmp_path, 1)
    with pytest.raises(RunFailed, match=r"model\.layers\.5\..* is too much"):
        export_hf(tmp_path, tmp_path / "out")
    model.config.num_hidden_layers, model.config.hidden_size = 6, 64
    save_model(model, tmp_path, 2)
    with pytest.raises(RunFailed, match="has shape"):
        export_hf(tmp_path, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["checkpoints"]


def test_a_folder_that_gives_other_logits_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of the file is another than that of the checkpoint: a quarter of what it was."""
    save_model(make_model(), tmp_path, 1)
    write = export._write_weights

    def write_wrongly(folder: Path, weights: export.Weights, *, family: str, shard_bytes: int) -> None:
        write(folder, weights, family=family, shard_bytes=shard_bytes)
        flip(folder / "model.safetensors", -1)

    monkeypatch.setattr(export, "_write_weights", write_wrongly)
    with pytest.raises(RunFailed, match=r"was not exported: loaded again, its logits differ by .*, more than 1e-05"):
        export_hf(tmp_path, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["checkpoints"]


def test_a_config_brings_no_code_along(tmp_path: Path) -> None:
    model = make_model()
    model.config.auto_map = {"AutoModelForCausalLM": "evil--code.Model"}
    save_model(model, tmp_path, 1)
    export_hf(tmp_path, tmp_path / "out")
    assert "evil" not in (tmp_path / "out" / "config.json").read_text()
