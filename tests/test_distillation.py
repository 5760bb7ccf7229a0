"""Distillation: a teacher over the student's mesh gives the numbers of two models in one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, ZeroCase
from harness import run_ranks
from parity import assert_same_numbers, compare, difference, one_process, reference

from cuboid.parallel import distillation, relations
from cuboid.trainer import assemble


def written(case: Case, folder: Path) -> str:
    """A teacher's folder, with larger logits, so that it knows more than its students."""
    model = one_process(case)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(12)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, str]:
    """Tied or not, or with experts -> folder. Of another family."""
    models = {tied: Case(family="qwen3", tied=tied) for tied in (False, True)} | {"experts": Case(family="mixtral")}
    return {kind: written(case, tmp_path_factory.mktemp("teacher")) for kind, case in models.items()}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model of eight layers."""
    return written(Case(family="qwen3", layers=8), tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model of eight layers that is four times as wide as its students."""
    return written(Case(family="blocks", layers=8), tmp_path_factory.mktemp("wide"))


CELLS = [
    Case(1, 1, 2),
    Case(1, 2, 1),
    Case(2, 2, 2, "1f1b", tied=True),
    Case(2, 1, 1, "zbv", tied=True, shard=False),
    Case(2, 1, 2, "interleaved_1f1b", tied=True, top_k=5),
]
MORE_CELLS = [
    Case(2, 1, 2, "interleaved_1f1b", sequence=False),
    Case(2, 1, 1, "gpipe", prune="magnitude"),
    Case(2, 1, 1, "looped_bfs", tied=True),
    Case(2, 2, 1, "interleaved_zero_bubble"),
    Case(2, 2, 2, "dualpipe_v", shard=False),
    Case(2, 1, 2, activation_checkpointing="full"),
    Case(2, 1, 1, frozen="leading"),
    Case(1, 2, 2, family="mixtral", expert=2, lora="experts"),
    Case(2, 1, 2, "zbv", lora="all"),
    Case(2, 1, 2, "interleaved_1f1b", prune="layers"),
    Case(1, 1, 2, lora="dora"),
    Case(1, 2, 1, family="blocks", lora="nf4"),
    Case(2, 1, 2, "1f1b", quantize="int4"),
    ZeroCase(1, 2, 1, zero_stage=2),
    ZeroCase(1, 2, 1, zero_stage=3),
    ZeroCase(2, 2, 1, zero_stage=1),
    Case(1, 2, 2, tied=True, top_k=70),  # more than a rank's part of the vocabulary holds
]


@pytest.mark.parametrize(
    "case", [*CELLS, *(pytest.param(case, marks=pytest.mark.full) for case in MORE_CELLS)], ids=str
)
def test_mesh_equals_one_process(case: Case, teachers: dict[Any, str]) -> None:
    case = replace(case, teacher=teachers[case.tied])
    ranks = difference(case)
    assert_same_numbers(case, ranks)
    assert all("teacher" not in name for rank in ranks for name in rank.seen), "only the student is trained and saved"


HIDDEN = [
    Case(2, 1, 2, "zbv", layers=4, hidden="mse"),
    Case(2, 1, 2, "1f1b", layers=2, tied=True, sequence=False, hidden="cosine", activation_checkpointing="full"),
]
MORE_HIDDEN = [
    Case(2, 2, 1, "interleaved_zero_bubble", layers=4, hidden="cosine"),
    Case(2, 1, 2, "dualpipe_v", layers=4, hidden="mse", top_k=5, lora="all"),
    ZeroCase(2, 2, 1, layers=4, zero_stage=1, hidden="mse"),
]


@pytest.mark.parametrize(
    "case", [*HIDDEN, *(pytest.param(case, marks=pytest.mark.full) for case in MORE_HIDDEN)], ids=str
)
def test_hidden_states_are_drawn_to_those_of_the_teacher(case: Case, deep: str) -> None:
    """Of twice as many layers: each layer's loss begins on its own stage."""
    case = replace(case, teacher=deep)
    assert_same_numbers(case, difference(case))


@pytest.mark.full
def test_hidden_states_of_another_layer_are_found(deep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 1, 2, layers=4, hidden="mse", teacher=deep)
    expected = reference(case)
    monkeypatch.setattr(assemble, "partners", lambda layers, of_teacher: [1, 2, 5, 7])
    ranks = run_ranks(compare, case.world_size, case, expected, timeout=120)
    assert max(rank.gradient for rank in ranks) > 1e-3


RELATED = [
    Case(2, 1, 2, "zbv", layers=4, hidden="mse", relations="some"),
    Case(
        *(2, 1, 2, "1f1b", "mistral"),
        layers=2,
        tied=True,
        sequence=False,
        relations="last",
        activation_checkpointing="full",
    ),
]
MORE_RELATED = [
    Case(2, 1, 1, "interleaved_zero_bubble", layers=4, relations="some", lora="dora"),
    Case(1, 2, 1, layers=4, family="mixtral", expert=2, lora="experts", relations="some"),
    Case(1, 1, 2, layers=2, family="blocks", lora="nf4", relations="last"),
    Case(2, 1, 1, "dualpipe_v", layers=4, quantize="int4", relations="some"),
    Case(2, 1, 1, "1f1b", layers=4, frozen="leading", hidden="cosine", relations="some"),  # no backward there
    ZeroCase(1, 2, 1, layers=2, zero_stage=3, relations="last"),
]


@pytest.mark.parametrize(
    "case", [*RELATED, *(pytest.param(case, marks=pytest.mark.full) for case in MORE_RELATED)], ids=str
)
def test_relations_between_tokens_are_drawn_to_those_of_the_teacher(case: Case, deep: str, wide: str) -> None:
    """Of a teacher of other widths where hidden states are not compared too."""
    case = replace(case, teacher=deep if case.hidden else wide)
    assert_same_numbers(case, difference(case))


@pytest.mark.full
def test_relations_to_another_document_are_found(wide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 1, 2, layers=2, relations="last", teacher=wide)
    expected, apart = reference(case), relations._apart
    monkeypatch.setattr(relations, "_apart", lambda mask, *place: apart(None, *place))
    ranks = run_ranks(compare, case.world_size, case, expected, timeout=120)
    assert max(rank.gradient for rank in ranks) > 1e-3


@pytest.mark.full
def test_experts_teach_a_dense_student(teachers: dict[Any, str]) -> None:
    case = Case(2, 2, 2, teacher=teachers["experts"])
    assert_same_numbers(case, difference(case))


def test_a_teacher_whose_rows_are_mixed_up_is_found(teachers: dict[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, 1, 1, teacher=teachers[False])
    expected = reference(case)
    take = distillation.LogitsKept.take
    monkeypatch.setattr(distillation.LogitsKept, "take", lambda self: {"teacher": take(self)["teacher"].flip(0)})
    ranks = run_ranks(compare, case.world_size, case, expected, timeout=120)
    assert max(rank.gradient for rank in ranks) > 1e-2


def test_a_teacher_of_which_each_rank_sees_its_own_words_is_found(
    teachers: dict[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank's softmax over its part of the vocabulary alone."""
    case = Case(1, 1, 2, teacher=teachers[False])
    expected = reference(case)
    monkeypatch.setattr(distillation, "_log_softmax", lambda scores, group: scores.log_softmax(-1))
    ranks = run_ranks(compare, case.world_size, case, expected, timeout=120)
    assert max(rank.gradient for rank in ranks) > 1e-2
