"""A family that has Llama's parts and another arithmetic is refused, not trained wrongly in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from cuboid.parallel.errors import FieldError
from cuboid.trainer.families import check_family
from cuboid.trainer.model import draw_blueprint, tensor_plan


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma", "granite", "smollm3", "mixtral"])
def test_families_that_stages_compute_exactly(family: str) -> None:
    before = torch.get_rng_state()
    check_family(AutoConfig.for_model(family))
    assert torch.equal(torch.get_rng_state(), before), "the trial must not move the run's random numbers"


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("granite", {"embedding_multiplier": 12.0}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("gpt2", {}),
    ],
)
def test_families_that_do_more_than_their_parts_are_refused(family: str, values: dict[str, Any]) -> None:
    with pytest.raises(FieldError, match=f"model.model_type={family} "):
        check_family(AutoConfig.for_model(family, **values))


def test_a_module_without_a_tensor_role_is_refused_by_name() -> None:
    config = AutoConfig.for_model("mixtral", num_hidden_layers=2, hidden_size=32, intermediate_size=32, vocab_size=64)
    with pytest.raises(FieldError, match=r"mlp.experts .*; use parallel.tensor=1"):
        tensor_plan(draw_blueprint(config))
