"""The course of the learning rate, and what is decayed."""

from __future__ import annotations

import math

import pytest
import torch

from cuboid.trainer.optimizer import is_decayed, learning_rate
from cuboid.trainer.recipe import OptimizerSettings


def course(schedule: str, **values: object) -> list[float]:
    settings = OptimizerSettings.model_validate({"learning_rate": 1.0, "schedule": schedule, "min_ratio": 0.1} | values)
    return [learning_rate(step, steps=10, settings=settings) for step in range(1, 11)]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_warmup_rises_to_the_peak_and_the_last_step_has_the_smallest_rate(schedule: str) -> None:
    rates = course(schedule, warmup_steps=4)
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[-1] == pytest.approx(0.1)
    assert sorted(rates[3:], reverse=True) == rates[3:]


def test_cosine_is_half_way_in_the_middle() -> None:
    # 4 warmup steps, 6 of the course: its middle is step 7
    assert course("cosine", warmup_steps=4)[6] == pytest.approx(0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi / 2)))


def test_constant_stays_at_the_peak() -> None:
    assert course("constant", warmup_steps=2) == [0.5] + [1.0] * 9


def test_matrices_are_decayed_norms_biases_and_embeddings_are_not() -> None:
    matrix, vector = torch.empty(2, 2), torch.empty(2)
    assert is_decayed("model.layers.0.mlp.up_proj.weight", matrix)
    assert is_decayed("lm_head.weight", matrix)
    assert not is_decayed("model.embed_tokens.weight", matrix)
    assert not is_decayed("model.norm.weight", vector)
    assert not is_decayed("model.layers.0.self_attn.q_proj.bias", vector)
