"""Methods that ask a calibration set: what they make of a layer, and that the text is one that may be asked."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from stores import make_model, save_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cuboid.launch import cli
from cuboid.parallel.errors import UserError
from cuboid.trainer.calibration import Calibration, visit_linears
from cuboid.trainer.compress import compress
from cuboid.trainer.data import Batch
from cuboid.trainer.export import export_hf
from cuboid.trainer.gptq import gptq
from cuboid.trainer.low_rank import LowRank
from cuboid.trainer.low_rank_format import products
from cuboid.trainer.model_folder import finished, load_model, read_config
from cuboid.trainer.quantize import Quantization, _four_bits

TEXT = str(Path(__file__).parents[1] / "LICENSE")
OTHER = str(Path(__file__).parents[1] / "CHANGELOG.md")
GROUP, LOW, HIGH = 16, -8, 7


def folder_of(path: Path, family: str = "llama") -> Path:
    """A small model as a Hugging Face folder, with a tokenizer of bytes."""
    save_model(make_model(family=family), path.with_name(f"{path.name}-run"), 1)
    export_hf(path.with_name(f"{path.name}-run"), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("calibrated") / "folder")


def grid(part: Tensor) -> tuple[Tensor, Tensor]:
    """Evenly spaced values from the least weight, or 0, to the largest."""
    low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / (HIGH - LOW)
    return scale, LOW - (low / scale).round()


def inputs_and_weight() -> tuple[Tensor, Tensor]:
    """Inputs that depend on one another, [500, 48], and a weight [20, 48]."""
    torch.manual_seed(0)
    return torch.randn(500, 48) @ torch.randn(48, 48), torch.randn(20, 48)


def rounded(weight: Tensor, hessian: Tensor) -> Tensor:
    codes, scales, zeros = gptq(weight, hessian, group_size=GROUP, levels=(LOW, HIGH), grid=grid)
    return (codes - zeros.repeat_interleave(GROUP, 1)) * scales.repeat_interleave(GROUP, 1)


def slowly(weight: Tensor, hessian: Tensor) -> Tensor:
    """Optimal brain surgeon's step for one weight after another, row by row, in float64: the inverse of what is left
    of the Hessian is computed anew each time (Frantar et al. 2022, equations 2 and 3), without Cholesky factors."""
    weight, hessian = weight.double().clone(), hessian.double()
    for row in weight:
        for start in range(0, len(row), GROUP):
            scale, zero = (value.squeeze() for value in grid(row[None, start : start + GROUP]))
            for place in range(start, start + GROUP):
                inverse = torch.linalg.inv(hessian[place:, place:])
                code = ((row[place] / scale).round() + zero).clamp(LOW, HIGH)
                row[place:] -= (row[place] - (code - zero) * scale) / inverse[0, 0] * inverse[0]
    return weight


def test_gptq_takes_the_steps_of_the_paper() -> None:
    inputs, weight = inputs_and_weight()
    hessian = inputs.T @ inputs
    found, expected = rounded(weight, hessian), slowly(weight, hessian)
    assert (found - expected).abs().max() < 1e-4
    nearest = rounded(weight, torch.eye(48))
    scale = torch.cat([grid(part)[0].expand(-1, GROUP) for part in weight.split(GROUP, 1)], 1)
    assert ((nearest - weight).abs() <= 0.501 * scale).all()  # inputs that know nothing of one another: to nearest
    lost = [((weight - values) @ inputs.T).norm() for values in (found, nearest)]
    assert lost[0] < 0.8 * lost[1]


def test_a_model_is_rounded_for_the_inputs_that_it_meets(folder: Path, tmp_path: Path) -> None:
    """In the very form of a model rounded to nearest; each layer's outputs move less, and those of all. The inputs are
    those of the rounded model."""
    calibration = Calibration(TEXT, samples=8)
    for name, asked in (("nearest", None), ("gptq", calibration)):
        compress(folder, tmp_path / name, Quantization(4, group_size=8, calibration=asked))
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    models = {name: AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("nearest", "gptq")}
    with finished(folder, beside=tmp_path / "x") as source:
        batch = calibration.read(source, read_config(folder), None).batch
    lost: dict[str, list[float]] = {"nearest": [], "gptq": []}

    def compare(name: str, linear: nn.Linear, hessian: Tensor) -> None:
        forms = []
        for key, model in models.items():
            weight = model.get_submodule(name).weight
            forms.append((type(weight), weight.qdata.shape, weight.scale.shape, weight.block_size, weight.target_dtype))
            left = linear.weight - weight.dequantize()
            lost[key].append((left @ hessian @ left.T).trace().item())
        assert forms[0] == forms[1]
        expected = _four_bits(linear.weight, hessian, 8)
        assert torch.equal(expected.qdata, models["gptq"].get_submodule(name).weight.qdata)
        linear.weight.copy_(models["gptq"].get_submodule(name).weight.dequantize())

    visit_linears(whole, batch, compare)
    assert len(lost["gptq"]) == 6 * 7
    assert sum(small < large for small, large in zip(lost["gptq"], lost["nearest"], strict=True)) == 6 * 7
    with torch.no_grad():
        exact = load_model(folder)(batch.input_ids).logits
        moved = [(models[key](batch.input_ids).logits - exact).norm() for key in ("gptq", "nearest")]
    assert moved[0] < 0.9 * moved[1]


def test_whitened_products_have_the_nearest_outputs(folder: Path, tmp_path: Path) -> None:
    """The error that the command tells is that of the outputs, and less than that of the nearest weights."""
    calibration = Calibration(TEXT, samples=8)
    compress(folder, tmp_path / "plain", LowRank(rank=8))
    compress(folder, tmp_path / "whitened", LowRank(rank=8, calibration=calibration))
    plain, whitened = (products(load_model(tmp_path / name)) for name in ("plain", "whitened"))
    with finished(folder, beside=tmp_path / "x") as source:
        batch = calibration.read(source, read_config(folder), None).batch

    def energy(weight: Tensor, hessian: Tensor) -> float:
        return (weight @ hessian @ weight.T).trace().item()

    def compare(name: str, linear: nn.Linear, hessian: Tensor) -> None:
        if name not in whitened:
            return
        left, other = (linear.weight - of[name].wide.weight @ of[name].narrow.weight for of in (whitened, plain))
        lost = energy(left, hessian) / energy(linear.weight, hessian)
        assert whitened[name].error == pytest.approx(lost**0.5, rel=1e-3)
        assert lost < energy(other, hessian) / energy(linear.weight, hessian)
        linear.weight.copy_(whitened[name].wide.weight @ whitened[name].narrow.weight)

    visit_linears(load_model(folder), batch, compare)
    assert len(whitened) == len(plain) > 10


def test_what_fills_samples_up_is_not_asked(folder: Path) -> None:
    """And documents know nothing of one another: a layer meets what it meets of each alone."""
    first, second = (torch.randint(0, 96, (length,)) for length in (12, 20))
    alone: dict[str, Tensor] = {}
    together: dict[str, Tensor] = {}

    def batch(rows: list[list[Tensor]]) -> Batch:
        width = max(sum(map(len, row)) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        labels, positions = torch.full_like(ids, -100), torch.zeros_like(ids)
        for number, row in enumerate(rows):
            filled = torch.cat(row)
            ids[number, : len(filled)] = labels[number, : len(filled)] = filled
            positions[number, : len(filled)] = torch.cat([torch.arange(len(part)) for part in row])
        return Batch(ids, labels, positions)

    for rows, found in (([[first], [second]], alone), ([[first, second]], together)):
        visit_linears(
            load_model(folder), batch(rows), lambda name, linear, hessian, found=found: found.update({name: hessian})
        )
    assert len(alone) == 6 * 7
    for name, hessian in alone.items():
        assert (hessian - together[name]).abs().max() < 1e-4 * hessian.abs().max()


@pytest.mark.full
@pytest.mark.parametrize("family", ["mixtral", "gemma2", "phi3", "gpt_neox", "gpt_oss"])
def test_families_are_asked(tmp_path: Path, family: str) -> None:
    """Every linear layer is reached, and the folder gives equal logits: `compress` checks it."""
    source = folder_of(tmp_path / "source", family)
    asked = Calibration(TEXT, samples=8)
    for name, method in (
        ("int4", Quantization(4, group_size=8, calibration=asked)),
        ("narrow", LowRank(rank=4, calibration=asked)),
    ):
        made = compress(source, tmp_path / name, method)
        assert made.bytes_after < made.bytes_before
        assert made.calibration == f"512 tokens of {TEXT}"


@pytest.mark.full
def test_weights_in_bfloat16_are_rounded(folder: Path, tmp_path: Path) -> None:
    """Their scales are bfloat16 too, and the errors those of the values that are stored."""
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    whole.save_pretrained(source)
    ids = torch.tensor(list(Path(TEXT).read_bytes()[:512])).view(8, 64)
    exact, moved = whole(ids).logits.float(), []
    for name, asked in (("nearest", None), ("gptq", Calibration(TEXT, samples=8))):
        compress(source, tmp_path / name, Quantization(4, group_size=8, calibration=asked))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert model.get_submodule("model.layers.0.mlp.down_proj").weight.scale.dtype is torch.bfloat16
        moved.append((model(ids).logits.float() - exact).norm())
    assert moved[1] < 0.9 * moved[0]


def test_the_text_is_told_and_refused_in_words(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("All that is gold.")
    (tmp_path / "held-out.txt").write_text(Path(OTHER).read_text())

    def export(*options: str) -> tuple[int, str]:
        words = ["export", str(folder), "--out", str(tmp_path / "out"), *options]
        done = CliRunner().invoke(cli.app, words)
        return done.exit_code, re.sub(r"[\s│]+", " ", done.output)

    four = ("--to", "int4", "--group-size", "8")
    asked = (*four, "--method", "gptq")
    for options, words in (
        (asked, "this method asks which inputs the layers meet; give --calibration, a text"),
        ((*asked, "--calibration", "nowhere.txt"), "--calibration=nowhere.txt does not exist"),
        (
            (*asked, "--calibration", str(tmp_path / "short.txt")),
            "gives 17 tokens, fewer than the 48 inputs of the widest",
        ),
        ((*asked, "--calibration", TEXT, "--group-size", "12"), "--group-size=12 does not divide the linear layers'"),
        (
            (*four, "--calibration", TEXT),
            f"--calibration={TEXT} says nothing without a method that asks for it; add --method gptq",
        ),
        ((*four, "--method", "whitened"), "--method=whitened says nothing of --to int4; use --method gptq"),
        (
            ("--to", "int8", "--method", "gptq"),
            "--method=gptq says nothing of --to int8; leave it out, or use --to int4",
        ),
        (
            ("--to", "lowrank", "--calibration-samples", "3"),
            "--calibration-samples=3 says nothing without a method that",
        ),
        (
            (*asked, "--calibration", OTHER, "--eval-path", str(tmp_path / "held-out.txt")),
            "holds 100% of the held-out text",
        ),
    ):
        code, told = export(*options)
        assert code == 2, told
        assert words in told
    code, told = export(*asked, "--calibration", TEXT, "--eval-path", OTHER)
    assert code == 0, told
    assert re.search(r"calibration [\d,]+ tokens of \S+, which has 0\.\d% of the held-out runs of 32 tokens", told)
    assert "by GPTQ, one scale a group of 8 inputs" in told


def test_a_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    """Its ids would be beyond the embedding."""
    config = json.loads((folder / "config.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 96}))
    with pytest.raises(UserError, match=r"has ids up to 256, which do not fit the model's vocab_size=96"):
        compress(other, tmp_path / "out", Quantization(4, group_size=8, calibration=Calibration(TEXT)))
