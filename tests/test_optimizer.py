"""The course of the learning rate, what is decayed, and the norm that clips."""

from __future__ import annotations

import math

import pytest
import torch

from cuboid.parallel.gradients import sum_of_squares
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


@pytest.mark.parametrize(
    ("schedule", "shapes"),
    [
        ("linear", {2: 0.75, 4: 0.5, 6: 0.25}),
        # (1 + cos(pi progress)) / 2, of which the middle alone is linear's
        ("cosine", {2: 0.5 + 0.5 * math.sqrt(0.5), 4: 0.5, 6: 0.5 - 0.5 * math.sqrt(0.5)}),
    ],
)
def test_the_course_goes_down_as_its_name_says(schedule: str, shapes: dict[int, float]) -> None:
    rates = course(schedule, warmup_steps=2)  # 8 steps of the course, so that 2 are a quarter
    for done, shape in shapes.items():
        assert rates[2 + done - 1] == pytest.approx(0.1 + 0.9 * shape, rel=1e-12), done


def test_constant_stays_at_the_peak() -> None:
    assert course("constant", warmup_steps=2) == [0.5] + [1.0] * 9


def test_matrices_are_decayed_norms_biases_and_embeddings_are_not() -> None:
    matrix, vector = torch.empty(2, 2), torch.empty(2)
    assert is_decayed("model.layers.0.mlp.up_proj.weight", matrix)
    assert is_decayed("lm_head.weight", matrix)
    for name in ("model.embed_tokens", "gpt_neox.embed_in", "transformer.wte", "transformer.wpe"):
        assert not is_decayed(f"{name}.weight", matrix), name
    assert not is_decayed("model.norm.weight", vector)
    assert not is_decayed("model.layers.0.self_attn.q_proj.bias", vector)


def test_the_norm_of_a_large_gradient_is_exact() -> None:
    gradient = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    expected = gradient.double().square().sum().item()
    assert sum_of_squares([gradient, gradient], [1.0, 0.5]).item() == pytest.approx(1.5 * expected, rel=1e-12)
