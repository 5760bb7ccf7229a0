"""Distillation: a teacher over the student's mesh gives the numbers of two models in one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, ZeroCase
from harness import run_ranks
from parity import assert_same_numbers, compare, difference, one_process, reference

from cuboid.parallel import distillation


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """Tied or not -> folder. Of another family, with larger logits, so that it knows more than its students."""
    folders = {}
    for tied in (False, True):
        model = one_process(Case(family="qwen3", tied=tied))
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(12)
        folders[tied] = str(tmp_path_factory.mktemp("teacher"))
        model.save_pretrained(folders[tied])
    return folders


CELLS = [
    Case(1, 1, 2),
    Case(1, 2, 1),
    Case(2, 2, 2, "1f1b", tied=True),
    Case(2, 1, 1, "zbv", tied=True, shard=False),
]
MORE_CELLS = [
    Case(2, 1, 2, "interleaved_1f1b", sequence=False),
    Case(2, 1, 1, "gpipe"),
    Case(2, 1, 1, "looped_bfs", tied=True),
    Case(2, 2, 1, "interleaved_zero_bubble"),
    Case(2, 2, 2, "dualpipe_v"),
    Case(2, 1, 2, activation_checkpointing="full"),
    Case(2, 1, 1, frozen="leading"),
    Case(1, 2, 2, family="mixtral", expert=2),
    Case(2, 1, 2, "zbv", lora="all"),
    Case(2, 1, 2, "1f1b", quantize="int4"),
    ZeroCase(1, 2, 1, zero_stage=2),
    ZeroCase(2, 2, 1, zero_stage=1),
]


@pytest.mark.parametrize(
    "case", [*CELLS, *(pytest.param(case, marks=pytest.mark.full) for case in MORE_CELLS)], ids=str
)
def test_mesh_equals_one_process(case: Case, teachers: dict[bool, str]) -> None:
    case = replace(case, teacher=teachers[case.tied])
    ranks = difference(case)
    assert_same_numbers(case, ranks)
    assert all("teacher" not in name for rank in ranks for name in rank.seen), "only the student is trained and saved"


def test_a_teacher_whose_rows_are_mixed_up_is_found(teachers: dict[bool, str], monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, 1, 1, teacher=teachers[False])
    expected = reference(case)
    take = distillation.LogitsKept.take
    monkeypatch.setattr(distillation.LogitsKept, "take", lambda self: take(self).flip(0))
    ranks = run_ranks(compare, case.world_size, case, expected, timeout=120)
    assert max(rank.gradient for rank in ranks) > 1e-2


def test_a_teacher_of_which_each_rank_sees_its_own_words_is_found(
    teachers: dict[bool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank's softmax over its part of the vocabulary alone."""
    case = Case(1, 1, 2, teacher=teachers[False])
    expected = reference(case)
    monkeypatch.setattr(distillation, "_log_softmax", lambda scores, group: scores.log_softmax(-1))
    ranks = run_ranks(compare, case.world_size, case, expected, timeout=120)
    assert max(rank.gradient for rank in ranks) > 1e-2
