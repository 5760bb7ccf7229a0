"""A teacher that cannot teach this model on this mesh is refused, with what would work."""

from pathlib import Path

import pytest
from test_check import CPU, LLAMA, complaints, recipe
from transformers import CONFIG_MAPPING

from cuboid.parallel.errors import UserErrors
from cuboid.trainer.check import check, check_teacher, resolve_devices

CACHED = {"cache": "cache", "top_k": 8}


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
            {"tensor": 2, "sequence": False},
            "parallel.sequence=false gives all tensor ranks the same tokens, and each would send them to the experts "
            "(distill.teacher=teacher); use true, or parallel.tensor=1",
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


@pytest.mark.parametrize(
    ("values", "distill", "told"),
    [
        (
            {"hidden_size": 32},
            {},
            "distill.hidden=0.5 compares hidden_size=64 with the teacher's 32; use 0, a teacher as wide as the "
            "student, or distill.attention",
        ),
        (
            {"num_hidden_layers": 3},
            {},
            "distill.hidden=0.5 compares 4 layers with the teacher's 3; use 0, or a teacher with as many",
        ),
        (
            {},
            CACHED,
            "distill.hidden=0.5 compares hidden states, and distill.cache=cache holds predictions alone; use 0, or",
        ),
    ],
)
def test_hidden_states_that_cannot_be_compared(values, distill, told):
    lines = complaints(recipe(distill=teacher(**values) | {"hidden": 0.5} | distill))
    assert lines[0].startswith(told)


def test_more_of_the_likeliest_tokens_than_there_are():
    (line,) = complaints(recipe(distill=teacher() | {"top_k": 264}))
    assert line == "distill.top_k=264 leaves none of the 264 tokens over; use at most 263, or null for all"


def test_with_a_cache_the_teacher_need_not_fit_on_the_mesh():
    parallel = {"pipeline": 4, "microbatches": 4}
    (line,) = complaints(recipe(distill=teacher(num_hidden_layers=2) | CACHED, parallel=parallel))
    assert line.startswith("distill.cache=cache holds no predictions of a teacher; write them first: cuboid teach")


@pytest.mark.parametrize(
    ("changes", "parallel", "told"),
    [
        (None, {}, "distill=null names no teacher; give distill.teacher, distill.top_k and distill.cache"),
        ({"top_k": 8}, {}, "distill.cache=null names no folder to write; give a new folder"),
        ({"cache": "cache"}, {}, "distill.top_k=null would write the whole vocabulary of each token; give a number"),
        (
            {"cache": ".", "top_k": 8},
            {},
            "distill.cache=. is there, and is not what cuboid teach has written; give a new",
        ),
        (
            {"cache": "cache", "top_k": 8},
            {"pipeline": 4, "microbatches": 4},
            "parallel.pipeline=4 makes 4 stages, more than num_hidden_layers=3 (distill.teacher=teacher); use at most",
        ),
    ],
)
def test_what_cannot_be_taught(changes, parallel, told):
    distill = changes and teacher(num_hidden_layers=3) | changes
    with pytest.raises(UserErrors) as caught:
        check_teacher(resolve_devices(recipe(distill=distill, parallel=parallel), CPU), CPU)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(told)


def test_a_student_that_does_not_fit_on_its_teachers_mesh_may_be_taught():
    distill, parallel = teacher(num_hidden_layers=8) | CACHED, {"pipeline": 8, "microbatches": 8}
    check_teacher(resolve_devices(recipe(distill=distill, parallel=parallel), CPU), CPU)


def test_a_teacher_that_is_not_there():
    (line,) = complaints(recipe(distill={"teacher": "./nowhere"}))
    assert line.startswith("distill.teacher=./nowhere")


@pytest.mark.parametrize("term", ["hidden", "attention"])
def test_a_layer_that_goes_is_not_compared_with_the_teachers(term) -> None:
    found = complaints(recipe(distill=teacher() | {term: 0.5}, prune={"method": "layers"}))
    assert any(line.startswith(f"distill.{term}=0.5 compares layers with the teacher's") for line in found)


@pytest.mark.parametrize(
    ("values", "distill", "tensor", "told"),
    [
        (
            {"num_hidden_layers": 3},
            {},
            1,
            "distill.attention=0.5 compares 4 layers with the teacher's 3; use 0, or a teacher with as many",
        ),
        (
            {},
            CACHED,
            1,
            "distill.attention=0.5 compares queries, keys and values, and distill.cache=cache holds predictions alone; "
            "use 0, or distill.cache=null",
        ),
        (
            {},
            {"attention_layers": [0, 4]},
            1,
            "distill.attention_layers=[0, 4] is not a rising list of the model's layers, which are 0 to 3; name each "
            "once, in order; or use null for the last",
        ),
        ({}, {"attention_layers": [1, 1]}, 1, "distill.attention_layers=[1, 1] is not a rising list of the model's"),
        (
            {"model_type": "phi3", "pad_token_id": None},
            {},
            1,
            "distill.attention=0.5 finds no q_proj, k_proj and v_proj in each layer of the teacher (phi3); use 0, or",
        ),
        (
            {"model_type": "olmo2"},
            {},
            2,
            "distill.attention=0.5 finds no q_proj, k_proj and v_proj in each layer of the teacher (olmo2), divided by "
            "heads; use 0, or models of other families",
        ),
        (
            {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
            {"relation_heads": 32},
            1,
            "distill.relation_heads=32 does not divide the 48 features of q_proj in the teacher; use 1, 2, 4 or 8",
        ),
        (
            {},
            {"relation_heads": 1},
            2,
            "distill.relation_heads=1 is not a multiple of parallel.tensor=2; use 2, 4, 8, 16 or 32",
        ),
    ],
)
def test_relations_that_cannot_be_compared(values, distill, tensor, told):
    lines = complaints(recipe(distill=teacher(**values) | {"attention": 0.5} | distill, parallel={"tensor": tensor}))
    assert lines[0].startswith(told)


def test_relations_with_a_teacher_of_other_sizes() -> None:
    """No hidden size, head or family need be the same."""
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    distill = teacher(model_type="qwen3", **sizes) | {"attention": 0.5, "relation_heads": 16}
    check(recipe(distill=distill, parallel={"tensor": 2}), CPU)


def test_as_many_relations_as_key_value_heads_may_be_too_many() -> None:
    distill = teacher(num_attention_heads=2, num_key_value_heads=1, head_dim=6) | {"attention": 0.5}
    (line,) = complaints(recipe(model={"num_key_value_heads": 4}, distill=distill))
    assert line == (
        "distill.relation_heads=null takes the model's 4 key-value heads, and 4 does not divide the 6 features of "
        "k_proj in the teacher; use 1 or 2"
    )
