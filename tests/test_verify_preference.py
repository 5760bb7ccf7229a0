"""`cuboid verify` of pairs of answers: the whole models of one process, and the faults that they find."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import transformers
from samples import write_rows
from typer.testing import CliRunner
from verifying import RECIPE, Verify

from cuboid.launch import cli
from cuboid.trainer import adapters

DATA = "data={kind: preference, path: pairs.jsonl, tokenizer: bytes, sequence_length: 96}"


@pytest.fixture(autouse=True)
def _beside_pairs(tmp_path: Path, beside_a_text: None) -> None:
    rows = [{"prompt": "?" * 9, "chosen": "!" * (1 + row % 23), "rejected": "." * (1 + row % 19)} for row in range(99)]
    write_rows(tmp_path / "pairs.jsonl", rows)


def test_a_reference_beneath_the_adapters_passes_unless_they_stay_on(
    verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = (DATA, "lora={rank: 4}", "preference={reference: adapter}", "data.packing=false")
    code, printed = verify(*overrides)
    assert code == 0, printed
    assert "adapters of rank 4, pairs of answers (sigmoid), shrunk to 3 layers" in printed
    monkeypatch.setattr(adapters, "switched_off", lambda models: nullcontext())
    code, printed = verify(*overrides)
    assert code == 1, printed


@pytest.mark.full
def test_a_reference_of_its_own_is_shrunk_too(verify: Verify, tmp_path: Path) -> None:
    transformers.Qwen3Config(hidden_size=64, vocab_size=264).save_pretrained(tmp_path / "other")
    (tmp_path / "other/model.safetensors").touch()
    code, printed = verify(DATA, "preference={reference: other, loss: ipo}", "parallel.schedule=zbv")
    assert code == 0, printed


def test_rounding_is_not_mistaken_for_a_fault() -> None:
    Path("small.yaml").write_text(RECIPE.format(family="llama"))
    done = CliRunner().invoke(cli.app, ["verify", "small.yaml", DATA, "preference={}", "precision.compute=bfloat16"])
    assert done.exit_code == 2
    assert "in bfloat16 a pair's loss comes of differences between sums that are rounded; use" in done.stderr
