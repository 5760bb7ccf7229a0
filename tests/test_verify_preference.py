"""`cuboid verify` of pairs of answers: the whole models of one process, and the faults that they find."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import transformers  # also since its log handler keeps the stream that it finds first: not the runner's
from samples import write_rows
from test_verify import RECIPE
from typer.testing import CliRunner

from cuboid.launch import cli
from cuboid.launch.verify import verify
from cuboid.trainer import adapters

DATA = "data={kind: preference, path: pairs.jsonl, tokenizer: bytes, sequence_length: 96}"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("small.yaml").write_text(RECIPE.format(family="llama"))
    rows = [{"prompt": "?" * 9, "chosen": "!" * (1 + row % 23), "rejected": "." * (1 + row % 19)} for row in range(99)]
    write_rows(tmp_path / "pairs.jsonl", rows)


def test_a_reference_beneath_the_adapters_passes_unless_they_stay_on(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = (DATA, "lora={rank: 4}", "preference={reference: adapter}", "data.packing=false")
    code = verify("small.yaml", overrides, shrink=True, as_json=False)
    printed = capfd.readouterr().out
    assert code == 0, printed
    assert "adapters of rank 4, pairs of answers (sigmoid), shrunk to 3 layers" in printed
    monkeypatch.setattr(adapters, "switched_off", lambda models: nullcontext())
    assert verify("small.yaml", overrides, shrink=True, as_json=False) == 1


@pytest.mark.full
def test_a_reference_of_its_own_is_shrunk_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    transformers.Qwen3Config(hidden_size=64, vocab_size=264).save_pretrained(tmp_path / "other")
    (tmp_path / "other/model.safetensors").touch()
    overrides = (DATA, "preference={reference: other, loss: ipo}", "parallel.schedule=zbv")
    code = verify("small.yaml", overrides, shrink=True, as_json=False)
    assert code == 0, capfd.readouterr().out


def test_rounding_is_not_mistaken_for_a_fault() -> None:
    overrides = (DATA, "preference={}", "precision.compute=bfloat16")
    done = CliRunner().invoke(cli.app, ["verify", "small.yaml", *overrides])
    assert done.exit_code == 2
    assert "in bfloat16 a pair's loss comes of differences between sums that are rounded; use" in done.stderr
