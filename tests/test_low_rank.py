"""Linear layers as products: the nearest of their rank, smaller, and read by no one who would read them wrongly."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stores import make_model, save_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cuboid.launch import cli
from cuboid.parallel.errors import UserError
from cuboid.trainer.compress import compress
from cuboid.trainer.export import export_hf
from cuboid.trainer.low_rank import LowRank
from cuboid.trainer.low_rank_format import products
from cuboid.trainer.model_folder import load_model, logits


@pytest.fixture(params=["llama", pytest.param("phi3", marks=pytest.mark.full)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small model as a Hugging Face folder."""
    save_model(make_model(tied=request.param == "llama", family=request.param), tmp_path / "run", 1)
    export_hf(tmp_path / "run", tmp_path / "folder")
    return tmp_path / "folder"


@pytest.mark.parametrize("method", [LowRank(rank=5), LowRank(energy=0.7)], ids=["rank", "energy"])
def test_products_are_the_nearest_of_their_rank(folder: Path, tmp_path: Path, method: LowRank) -> None:
    """By another way than the products were made: the eigenvalues of W W', in float64."""
    made = compress(folder, tmp_path / "out", method)
    assert made.bytes_after < made.bytes_before
    whole, small = load_model(folder), load_model(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert len(products(small)) > 10
    for name, product in products(small).items():
        weight = whole.get_submodule(name).weight.detach().double()
        left = weight - (stored[f"{name}.wide.weight"] @ stored[f"{name}.narrow.weight"]).double()
        energies = torch.linalg.eigvalsh(weight @ weight.T).flip(0)
        rank = stored[f"{name}.narrow.weight"].shape[0]
        lost = energies[rank:].sum() / energies.sum()
        assert (left.norm() / weight.norm()).item() == pytest.approx(lost.sqrt().item(), rel=1e-4)
        assert product.error == pytest.approx(lost.sqrt().item(), rel=1e-4)
        assert rank * sum(weight.shape) < weight.numel()
        if method.energy is not None:
            assert lost <= 0.3 < energies[rank - 1 :].sum() / energies.sum()
        else:
            assert rank == 5


def test_of_a_layer_that_was_narrow_nothing_is_lost(folder: Path, tmp_path: Path) -> None:
    compress(folder, tmp_path / "first", LowRank(rank=4))
    narrow, whole = load_model(tmp_path / "first"), load_model(folder)
    for name, product in products(narrow).items():
        whole.get_submodule(name).weight.data = product.wide.weight.data @ product.narrow.weight.data
    whole.save_pretrained(tmp_path / "narrow")
    for words in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "narrow" / words).write_bytes((folder / words).read_bytes())
    compress(tmp_path / "narrow", tmp_path / "second", LowRank(rank=4))
    assert (logits(load_model(tmp_path / "second")) - logits(whole)).abs().max() < 1e-5
    assert (logits(narrow) - logits(load_model(folder))).abs().max() > 1e-3


def test_transformers_does_not_load_it_as_something_else(folder: Path, tmp_path: Path) -> None:
    compress(folder, tmp_path / "out", LowRank(rank=5, modules=("down_proj",)))
    with pytest.raises(ValueError, match="cuboid_low_rank"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name.rpartition(".")[2] for name in described["layers"]} == {"down_proj"}
    assert not list((tmp_path / "out").glob("*.bin"))


def test_a_folder_that_was_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(folder, out, LowRank(rank=5))
    described = json.loads((out / "config.json").read_text())
    name = next(iter(described["layers"]))
    for change, words in (
        ({"layers": {name: {"rank": 4, "error": 0}}}, "does not hold its model"),
        ({"layers": {"nowhere": {"rank": 4, "error": 0}}}, "does not hold its model"),
        ({"model": {"model_type": "unheard_of"}}, "does not describe a model that transformers knows"),
    ):
        (out / "config.json").write_text(json.dumps(described | change))
        with pytest.raises(UserError, match=words):
            load_model(out)


def test_the_command_tells_ranks_and_errors_and_mistakes(folder: Path, tmp_path: Path) -> None:
    def export(*options: str) -> tuple[int, str]:
        words = ["export", str(folder), "--to", "lowrank", "--out", str(tmp_path / "out"), *options]
        done = CliRunner().invoke(cli.app, words)
        return done.exit_code, re.sub(r"[\s│]+", " ", done.output)

    for options, words in (
        ((), "--to lowrank needs one of --rank and --energy, as --rank 64 or --energy 0.9"),
        (("--rank", "4", "--energy", "0.5"), "needs one of --rank and --energy"),
        (("--rank", "999"), "--rank=999 makes no layer smaller: two factors of that rank have no fewer numbers"),
        (("--energy", "1"), "--energy=1.0 makes no layer smaller; use less"),
        (("--rank", "4", "--module", "proj"), "--module=proj is no linear layer of this model; use down_proj,"),
        (("--rank", "4", "--group-size", "8"), "--group-size=8 says nothing of --to lowrank; leave it out"),
    ):
        code, told = export(*options)
        assert code == 2, told
        assert words in told
    code, told = export("--rank", "4")
    assert code == 0
    assert re.search(r"down_proj 6 4 to 4 0\.\d{3}, 0\.\d{3}", told)
    assert "only cuboid reads this folder" in told
    assert "held-out loss not measured: no text was held out" in told
    words = ["generate", str(tmp_path / "out"), "--prompt", "All that", "--max-new-tokens", "4"]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    done = CliRunner().invoke(cli.app, ["export", str(tmp_path / "out"), "--to", "int8", "--out", str(tmp_path / "x")])
    assert "was made smaller already" in done.output
