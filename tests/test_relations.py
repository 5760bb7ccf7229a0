"""Relations between tokens: the distance and its gradient, some queries at a time, against their definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cuboid.parallel.relations import relation_distance

HEADS, TOKENS = 4, 13
STUDENT, TEACHER = (torch.randn(2, TOKENS, size, generator=torch.Generator().manual_seed(size)) for size in (8, 24))
PREDICTED = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.6
CAUSAL = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
PACKED = CAUSAL.clone()
PACKED[0, :, 5:, :5] = PACKED[1, :, 9:, :9] = False
ADDED = torch.zeros(PACKED.shape).masked_fill(~PACKED, torch.finfo(torch.float32).min)


def plain(student: torch.Tensor, attends: torch.Tensor) -> torch.Tensor:
    relations = []
    for x in (student, TEACHER):
        by_head = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        scores = by_head @ by_head.mT / math.sqrt(by_head.shape[-1])
        relations.append(scores.masked_fill(~attends, -1e9).log_softmax(-1))
    apart = F.kl_div(*relations, log_target=True, reduction="none").sum(-1).mean(1)
    return apart[PREDICTED].sum()


@pytest.mark.parametrize(
    ("mask", "attends"),
    [(None, CAUSAL), (PACKED, PACKED), (ADDED, PACKED)],
    ids=["causal", "as true and false", "as scores"],
)
@pytest.mark.parametrize("chunk", [5, 128])
def test_relations_are_those_of_the_definition(mask: torch.Tensor | None, attends: torch.Tensor, chunk: int) -> None:
    ours, theirs = (STUDENT.clone().requires_grad_() for _ in range(2))
    found = relation_distance(ours, TEACHER, PREDICTED, mask, heads=HEADS, of_all=HEADS, chunk_tokens=chunk)
    wanted = plain(theirs, attends)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    (3 * found).backward()
    (3 * wanted).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_ranks_with_their_own_heads_add_up_to_the_whole() -> None:
    parts = [(ours, theirs) for ours, theirs in zip(STUDENT.chunk(2, -1), TEACHER.chunk(2, -1), strict=True)]
    found = sum(relation_distance(*part, PREDICTED, None, heads=HEADS // 2, of_all=HEADS) for part in parts)
    torch.testing.assert_close(found, plain(STUDENT, CAUSAL), rtol=1e-6, atol=0)


def test_a_model_is_as_near_to_itself_as_can_be() -> None:
    own = STUDENT.clone().requires_grad_()
    found = relation_distance(own, STUDENT, PREDICTED, PACKED, heads=HEADS, of_all=HEADS)
    found.backward()
    assert found == 0
    assert not own.grad.any()


def test_no_more_is_kept_than_the_gradient() -> None:
    """Never [heads, tokens, tokens]."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        relation_distance(
            STUDENT.bfloat16().requires_grad_(), TEACHER, PREDICTED, PACKED, heads=HEADS, of_all=HEADS, chunk_tokens=5
        )
    assert kept == [STUDENT.shape]
