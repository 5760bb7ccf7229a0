"""A teacher that cannot teach this model on this mesh is refused, with what would work."""

from pathlib import Path

import pytest
from test_check import LLAMA, complaints, recipe
from transformers import CONFIG_MAPPING


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text")


def teacher(**values):
    """A folder whose config differs from the student's in ``values``."""
    config = LLAMA | values
    CONFIG_MAPPING[config.pop("model_type")](**config).save_pretrained("teacher")
    Path("teacher/model.safetensors").touch()
    return {"teacher": "teacher"}


@pytest.mark.parametrize(
    ("values", "parallel", "told"),
    [
        (
            {"vocab_size": 300},
            {},
            "distill.teacher=teacher has vocab_size=300, and the model that is trained 264; use a teacher with the "
            "same vocabulary",
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 4},
            {},
            "distill.teacher=teacher is a mixtral with experts, which teach nobody yet; use a dense teacher",
        ),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 1},
            {"tensor": 2},
            "parallel.tensor=2 does not divide num_key_value_heads=1 of teacher (distill.teacher=teacher); use 1",
        ),
        (
            {"num_hidden_layers": 2},
            {"pipeline": 4, "microbatches": 4},
            "parallel.pipeline=4 makes 4 stages, more than num_hidden_layers=2 (distill.teacher=teacher); use at most "
            "2",
        ),
        (
            {"max_position_embeddings": 64},
            {},
            "data.sequence_length=128 is longer than the model's max_position_embeddings=64 (distill.teacher=teacher); "
            "use at most 64",
        ),
        (
            {"model_type": "cohere"},
            {},
            "distill.teacher=teacher computes something that stages leave out",
        ),
    ],
)
def test_what_does_not_go_together(values, parallel, told):
    (line,) = complaints(recipe(distill=teacher(**values), parallel=parallel))
    assert told in line


def test_a_teacher_that_is_not_there():
    (line,) = complaints(recipe(distill={"teacher": "./nowhere"}))
    assert line.startswith("distill.teacher=./nowhere")
