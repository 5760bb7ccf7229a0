"""What preference tuning cannot do, and a reference that cannot be one: refused, with what would work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cases import FAMILIES
from samples import write_rows
from test_check import LLAMA, complaints, recipe
from transformers import CONFIG_MAPPING

from cuboid.trainer.check_preference import preference_errors

PAIRS = {"kind": "preference", "path": "pairs.jsonl"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text")
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])


def reference(**values: Any) -> dict[str, str]:
    """A folder whose config differs from the policy's in ``values``."""
    config = LLAMA | values
    CONFIG_MAPPING[config.pop("model_type")](**config).save_pretrained("other")
    Path("other/model.safetensors").touch()
    return {"reference": "other"}


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        (
            {"data": PAIRS},
            "data.kind=preference reads pairs of answers, and nothing says how they are compared; use preference={}, "
            "or another kind",
        ),
        (
            {"preference": {}},
            "preference={...} needs pairs of answers, and data.kind=text has none; use null, or data.kind=preference",
        ),
        (
            {"data": PAIRS, "preference": {"loss": "ipo", "label_smoothing": 0.1}},
            "preference.label_smoothing=0.1 means nothing for preference.loss=ipo; use 0, or loss sigmoid",
        ),
        (
            {"data": PAIRS, "preference": {}, "prune": {}},
            "prune={...} is not proven with preference; use null, or preference=null",
        ),
        (
            {"data": PAIRS, "preference": {"reference": "adapter"}},
            "preference.reference=adapter is the model without its adapters, and lora is null; use null for a copy of "
            "the model as it begins, or lora={}",
        ),
        (
            {"data": PAIRS, "preference": {"reference": "adapter"}, "lora": {"bias": "all"}},
            "preference.reference=adapter trains some of the model itself (lora.bias), which would stay when the "
            "adapters are left out; use null, or leave lora.bias out",
        ),
        (
            {"data": PAIRS, "preference": {"reference": "adapter"}, "lora": {"modules_to_save": ["lm_head"]}},
            "preference.reference=adapter trains some of the model itself (lora.modules_to_save)",
        ),
        (
            {"data": PAIRS, "preference": {"reference": "./nowhere"}},
            "preference.reference=./nowhere is no folder",
        ),
        (
            {"data": PAIRS, "preference": {}, "model": FAMILIES["mixtral"]},
            "preference.reference=null is a mixtral with experts, of which no second copy is offered yet; use adapter "
            "and lora, or a dense model",
        ),
        (
            {
                "data": PAIRS,
                "preference": {"reference": "adapter"},
                "lora": {},
                "model": FAMILIES["mixtral"],
                "moe": {"bias_update": 0.1},
            },
            "moe.bias_update=0.1 moves the reference's choice of experts too (preference.reference=adapter); use 0",
        ),
    ],
)
def test_what_does_not_go_together(sections: dict[str, Any], told: str) -> None:
    (line,) = complaints(recipe(**sections))
    assert line.startswith(told)


@pytest.mark.parametrize(
    ("values", "parallel", "told"),
    [
        (
            {"vocab_size": 300},
            {},
            "preference.reference=other has vocab_size=300, and the model that is trained 264; use a model with the "
            "same vocabulary",
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 4},
            {},
            "preference.reference=other is a mixtral with experts, of which no second copy is offered yet",
        ),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 1},
            {"tensor": 2},
            "parallel.tensor=2 does not divide num_key_value_heads=1 of other (preference.reference=other); use 1",
        ),
        (
            {"max_position_embeddings": 64},
            {},
            "data.sequence_length=128 is longer than the model's max_position_embeddings=64 "
            "(preference.reference=other)",
        ),
    ],
)
def test_a_reference_of_another_kind(values: dict[str, Any], parallel: dict[str, int], told: str) -> None:
    (line,) = complaints(recipe(data=PAIRS, preference=reference(**values), parallel=parallel))
    assert line.startswith(told)


def test_what_later_work_offers_is_refused_beside_pairs() -> None:
    """Fields whose other values are not offered yet: no recipe has them, and pairs would not be right with them."""
    whole = recipe(data=PAIRS, preference={"reference": "adapter"}, lora={})
    lora = whole.lora and whole.lora.model_copy(update={"init": "pissa"})
    deepspeed = whole.parallel.model_copy(update={"engine": "deepspeed"})
    later = {"quantize": {"bits": 4}, "lora": lora, "parallel": deepspeed}
    assert not [*preference_errors(whole)]
    found = [str(error) for name in later for error in preference_errors(whole.model_copy(update={name: later[name]}))]
    assert found == [
        "quantize={...} is not proven with preference; use null, or preference=null",
        "preference.reference=adapter is not the model as it was: lora.init=pissa takes the adapters out of its "
        "weights; use null, or lora.init=default",
        "preference.reference=adapter is not proven with parallel.engine=deepspeed; use null, or native",
    ]


def test_a_teacher_beside_pairs_is_refused() -> None:
    reference()
    (line,) = complaints(recipe(data=PAIRS, preference={}, distill={"teacher": "other"}))
    assert line == "distill={...} is not proven with preference; use null, or preference=null"
