"""A finished model made smaller: it loads in transformers to equal logits, and its loss is the true one."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import recipe_on, run
from safetensors import safe_open
from stores import make_model, save_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cuboid.launch import cli
from cuboid.parallel.errors import RunFailed, UserError
from cuboid.trainer.compress import compress
from cuboid.trainer.held_out import HeldOut, measure, passage_at
from cuboid.trainer.model_folder import load_model
from cuboid.trainer.quantize import Quantization


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run's folder, and the loss that the run itself found on held-out text after its last step."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "held-out.txt"
    text.write_text("Deeds will not be less valiant because they are unpraised. " * 9)
    changes = {"data": {"eval_path": str(text)}, "train": {"eval_every": 9, "eval_batches": 3}}
    records = run(recipe_on("1x1x1", changes=changes), folder)
    return folder, records[-1]["eval_loss"]


def cuboid(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command in this process."""
    done = CliRunner().invoke(cli.app, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return done.exit_code, done.stdout, re.sub(r"[\s│]+", " ", done.stderr)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40).view(2, 20)).logits


def folder_of(model: Any, path: Path) -> Path:
    """The model as transformers and a tokenizer of bytes write it."""
    save_model(model, path.with_name(f"{path.name}-run"), 1)
    assert cuboid("export", f"{path}-run", "--out", str(path))[0] == 0
    return path


def loss_by_hand(model: Any, text: Path, length: int) -> float:
    """Mean loss of each byte after the first, and of the end, each predicted from what stands before it in its part of
    ``length`` bytes: without batches, positions or labels of the trainer's."""
    ids, total = [*text.read_bytes(), 256], 0.0
    for start in range(0, len(ids) - 1, length):
        part = torch.tensor(ids[start : start + length + 1])
        with torch.no_grad():
            predicted = model(part[None, :-1]).logits[0].log_softmax(-1)
        total -= predicted.gather(1, part[1:, None]).sum().item()
    return total / (len(ids) - 1)


@pytest.mark.parametrize(("to", "group_size"), [("int8", None), ("int4", 16)])
def test_a_run_is_rounded_and_its_loss_told(
    trained: tuple[Path, float], tmp_path: Path, to: str, group_size: int | None
) -> None:
    folder, evaluated = trained
    options = [] if group_size is None else ["--group-size", str(group_size)]
    code, told, _ = cuboid("export", str(folder), "--to", to, *options, "--out", str(tmp_path / "out"))
    assert code == 0
    lines = told.splitlines()
    losses = re.fullmatch(r"held-out loss  (\S+) \(.*\) -> (\S+) \(perplexity (\S+)\), 531 tokens of .*", lines[0])
    assert losses, lines
    assert float(losses[1]) == pytest.approx(evaluated, abs=6e-5)
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    by_hand = loss_by_hand(rounded, folder / "held-out.txt", 32)
    assert float(losses[2]) == pytest.approx(by_hand, abs=6e-5)
    assert float(losses[3]) == pytest.approx(math.exp(by_hand), rel=1e-3)
    assert ("a byte on disk" in told) == (to == "int4")
    assert lines[-1].endswith("loaded again, its logits are equal")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".safetensors"}
    assert cuboid("export", str(folder), "--out", str(tmp_path / "whole"))[0] == 0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    for name, weight in rounded.named_parameters():
        expected = whole.get_parameter(name)
        if "proj" in name:
            check_rounded(weight.dequantize(), expected, levels=256 if to == "int8" else 16, group=group_size)
        else:
            assert torch.equal(weight, expected), name


def test_a_run_s_calibration_set_is_what_it_trained_on(trained: tuple[Path, float], tmp_path: Path) -> None:
    options = ("--to", "int4", "--group-size", "16", "--method", "gptq", "--out", str(tmp_path / "out"))
    code, told, _ = cuboid("export", str(trained[0]), *options)
    assert code == 0
    share = "which has 0.0% of the held-out runs of 32 tokens"
    assert f"calibration    1,024 tokens of {Path(__file__).parents[1] / 'LICENSE'}, {share}" in told.splitlines()
    few = (*options, "--calibration-samples", "1")
    code, _, err = cuboid("export", str(trained[0]), *few, "--overwrite")
    assert code == 2
    assert "--calibration-samples=1 gives 32 tokens, fewer than the 48 inputs of the widest linear layer; use at" in err


def test_a_finished_model_is_evaluated(trained: tuple[Path, float], tmp_path: Path) -> None:
    """As its run does, or on other text in samples of another length; and nothing is left behind."""
    folder, evaluated = trained
    before = sorted(folder.rglob("*"))
    code, told, _ = cuboid("evaluate", str(folder))
    assert code == 0
    assert float(told.split()[2]) == pytest.approx(evaluated, abs=6e-5)
    assert cuboid("export", str(folder), "--out", str(tmp_path / "whole"))[0] == 0
    text = tmp_path / "other.txt"
    text.write_text("Still round the corner there may wait a new road or a secret gate.")
    code, told, _ = cuboid("evaluate", str(tmp_path / "whole"), "--data", str(text), "--length", "16")
    by_hand = loss_by_hand(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), text, 16)
    assert told == f"held-out loss  {by_hand:.4f} (perplexity {math.exp(by_hand):,.2f}), 66 tokens of {text}\n"
    code, told, _ = cuboid(
        "evaluate", str(folder / "checkpoints"), "--data", str(text), "--length", "16", "--samples", "2"
    )
    assert "32 tokens of" in told
    assert sorted(folder.rglob("*")) == before
    for arguments, words in (
        ((), "there is no text to measure on; give --data, a text"),
        (("--data", "nowhere.txt"), "--data=nowhere.txt does not exist"),
        (("--data", str(text), "--length", "9999999"), "--length=9999999 is longer than the model's max_position"),
    ):
        code, _, err = cuboid("evaluate", str(tmp_path / "whole"), *arguments)
        assert code == 2
        assert words in err


def check_rounded(found: torch.Tensor, weight: torch.Tensor, *, levels: int, group: int | None) -> None:
    """At most so many evenly spaced values in each row or group, each weight moved to one within a step."""
    found, weight = (matrix.detach().view(-1, group or weight.shape[1]) for matrix in (found, weight))
    assert not torch.equal(found, weight)
    largest = weight.abs().amax(1, keepdim=True)
    above, below = weight.amax(1, keepdim=True).relu(), (-weight).amax(1, keepdim=True).relu()
    steps = (2 * largest if group is None else above + below) / (levels - 1)
    assert ((found - weight).abs() <= 1.01 * steps).all()
    assert (found - weight).abs().mean() <= 0.3 * steps.mean()  # evenly spread within half a step: 0.25
    assert max(len(row.unique()) for row in found) <= levels


def test_the_head_is_rounded_where_asked(tmp_path: Path) -> None:
    source = folder_of(make_model(), tmp_path / "source")
    for bits in (8, 4):
        for head in (False, True):
            out = tmp_path / f"{bits}-{head}"
            compress(source, out, Quantization(bits, group_size=16, head=head))
            with safe_open(out / "model.safetensors", framework="pt") as file:
                stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            assert ("lm_head._weight_qdata" in stored) == head
            assert ("lm_head.weight" in stored) != head
            assert "model.embed_tokens.weight" in stored
            assert stored["model.layers.0.mlp.down_proj._weight_qdata"] == "I8"


@pytest.mark.full
@pytest.mark.parametrize("family", ["mixtral", "gemma2", "phi3", "gpt_neox"])
def test_families_are_rounded(tmp_path: Path, family: str) -> None:
    """Also a mixture: its experts are no linear layers and stay as they are."""
    source = folder_of(make_model(family=family, tied=family == "gemma2"), tmp_path / "source")
    for bits in (8, 4):
        made = compress(source, tmp_path / str(bits), Quantization(bits, group_size=8))
        assert made.bytes_after < made.bytes_before
        assert made.before is None


def test_a_folder_whose_logits_differ_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_of(make_model(), tmp_path / "source")
    save = Quantization.save

    def save_wrongly(self: Quantization, model: Any, folder: Path) -> None:
        model.get_parameter("model.norm.weight").data[0] *= 1.0001
        save(self, model, folder)

    monkeypatch.setattr(Quantization, "save", save_wrongly)
    with pytest.raises(RunFailed, match="out was not written: loaded again, its logits differ by"):
        compress(source, tmp_path / "out", Quantization(8))
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_what_cannot_be_is_told_in_words(tmp_path: Path) -> None:
    tied = folder_of(make_model(tied=True), tmp_path / "tied")
    gpt2 = folder_of(make_model(family="gpt2", tied=True), tmp_path / "gpt2")
    compress(tied, tmp_path / "int8", Quantization(8))
    (tmp_path / "text.txt").write_text("Not all those who wander are lost.")
    for arguments, words in (
        (
            ("tied", "--to", "int4", "--group-size", "12"),
            "--group-size=12 does not divide the linear layers' in_features,",
        ),
        (("tied", "--to", "int8", "--group-size", "16"), "--group-size=16 says nothing of --to int8; leave it out, or"),
        (("tied", "--to", "hf", "--eval-path", "text.txt"), "--eval-path=text.txt says nothing of --to hf; leave it"),
        (
            ("tied", "--to", "int8", "--head"),
            "--head=true cannot round this model's head, which is the embedding's own",
        ),
        (("tied", "--to", "int8", "--eval-path", "nowhere.txt"), "--eval-path=nowhere.txt does not exist"),
        (("int8", "--to", "int4"), "int8 was made smaller already; give the run"),
        (("gpt2", "--to", "int8"), "gpt2 keeps its matrices in other modules than linear layers; use --to hf"),
        (("nowhere", "--to", "int8"), "nowhere does not exist"),
        (("tied", "--to", "int8", "--out", str(tied)), "and its source"),
    ):
        code, out, err = cuboid("export", str(tmp_path / arguments[0]), "--out", str(tmp_path / "new"), *arguments[1:])
        assert (code, out) == (2, ""), (arguments, out, err)
        assert words in err
    assert not (tmp_path / "new").exists()
    assert gpt2.is_dir()


def test_a_folder_with_a_weight_missing_is_refused(tmp_path: Path) -> None:
    """transformers alone would draw it at random, with a warning."""
    folder = folder_of(make_model(), tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    with pytest.raises(UserError, match=r"does not hold its model: model\.layers\.6\..* is missing"):
        load_model(folder)


def test_documents_are_kept_apart_where_a_loss_is_measured(tmp_path: Path) -> None:
    model = make_model()
    folder = folder_of(model, tmp_path / "source")
    texts = ["All that is gold", "does not glitter"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    passage = passage_at(str(tmp_path / "*.txt"), field="--data", config=model.config)
    found = measure(load_model(folder), passage, folder)
    alone = [loss_by_hand(model, tmp_path / f"{number}.txt", 128) for number in range(2)]
    assert found.tokens == sum(map(len, texts))
    assert found.loss == pytest.approx(sum(alone) / 2, rel=1e-6)
    assert str(HeldOut(2.0, 5)) == "2.0000 (perplexity 7.39)"
    assert HeldOut(1e4, 5).perplexity == math.inf
