"""Promise 1: every mesh computes the numbers of one process. A pairwise cover; every cell is marked full."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from itertools import combinations, product
from math import prod
from pathlib import Path

import pytest
import torch
from cases import GLOBAL_BATCH, TOKENS, VOCABULARY, Case, model_config
from harness import RanksFailed, run_ranks
from parity import Difference, assert_same_numbers, compare, difference, reference
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Replicate

from cuboid.parallel import gradients, tensor
from cuboid.parallel.collectives import enter, gather_features
from cuboid.parallel.loss import IGNORE
from cuboid.parallel.schedules import SCHEDULES
from cuboid.parallel.tensor import Role
from cuboid.trainer import engine, optimizer


def cells() -> list[Case]:
    """Every combination whose options mean something on its mesh; the two families take turns."""
    result = {}
    for pipeline, data, size in product((1, 2), repeat=3):
        for schedule, tied, shard, sequence, recompute in product(
            SCHEDULES, (False, True), (True, False), (True, False), ("none", "full")
        ):
            family = ("llama", "qwen3")[(tied + shard + sequence + (recompute == "full")) % 2]
            case = Case(
                pipeline,
                data,
                size,
                schedule if pipeline > 1 else "1f1b",
                family,
                tied,
                shard or data == 1,
                sequence or size == 1,
                recompute,
            )
            if not (SCHEDULES[case.schedule].splits_backward and recompute == "full"):  # refused
                result[case] = None
    return list(result)


LARGER = [
    Case(4, 1, 1, "gpipe"),  # six layers on four stages: uneven
    Case(4, 2, 1, "1f1b", "qwen3", tied=True, shard=False, microbatches=8),
    Case(1, 4, 1, family="qwen3"),
    Case(1, 1, 4, family="qwen3", tied=True),
    Case(1, 2, 4, shard=False),
    Case(2, 1, 4, "interleaved_1f1b", tied=True),
    Case(3, 1, 2, "interleaved_1f1b", tied=True, microbatches=8, activation_checkpointing="full"),
    Case(2, 2, 2, "1f1b", microbatches=2),
    Case(2, 1, 1, "gpipe", microbatches=1),
    Case(2, 1, 3, family="smollm2", tied=True),  # 9 heads that share 3: tensor 2 would not divide them
]


def pairs(case: Case) -> set[tuple[object, ...]]:
    values = [(field.name, getattr(case, field.name)) for field in fields(case)]
    return set(combinations(values, 2))


def pairwise(cases: Iterable[Case]) -> list[Case]:
    """Few cases that hold every mesh and every pair of options which any case holds; greedy, so not the fewest."""

    def wanted(case: Case) -> set[tuple[object, ...]]:
        return pairs(case) | {(case.pipeline, case.data, case.tensor)}

    left, chosen = set().union(*(wanted(case) for case in cases)), []
    while left:
        best = max(cases, key=lambda case: len(wanted(case) & left))
        chosen.append(best)
        left -= wanted(best)
    return chosen


COVER = pairwise(cells())


def assert_exact(case: Case, folder: Path | None = None) -> None:
    """From weights in ``folder``, where one is given."""
    ranks = difference(case, folder)
    assert_same_numbers(case, ranks)
    assert_options_did_something(case, ranks)


def assert_options_did_something(case: Case, ranks: Iterable[Difference]) -> None:
    """An option that is silently left out gives the same numbers: its traces are looked for."""
    rows = GLOBAL_BATCH // case.data // case.microbatches
    width = model_config(case.family, case.tied)["hidden_size"]
    tokens = TOKENS // case.tensor if case.sequence else TOKENS
    cut = {"data": case.data if case.shard else 1, "tensor": case.tensor}
    for work in (rank.work for rank in ranks):
        assert work.layer_calls == {case.microbatches * (2 if case.activation_checkpointing == "full" else 1)}
        assert work.layer_tokens == {tokens}
        assert work.boundaries <= {(rows, tokens, width)}
        assert work.logits <= {(rows, TOKENS, VOCABULARY // case.tensor)}
        for name, held in work.held.items():
            wanted = {axis: parts for axis, parts in cut.items() if parts > 1}
            if (not held.is_matrix and "tensor" not in held.parts) or name.endswith("wpe.weight"):
                wanted.pop("tensor", None)  # of the vectors, only some are cut over the tensor axis; positions are not
            assert held.parts == wanted, name
            assert held.numel * prod(wanted.values()) == held.whole_numel, f"{name}: {held}"
    works = [rank.work for rank in ranks]
    per_stage = case.data * case.tensor
    assert sum(bool(work.logits) for work in works) == per_stage, "the last stage stands on one line of ranks"
    inner = case.pipeline - (not SCHEDULES[case.schedule].looped)  # looped, every rank has an inner stage
    assert sum(bool(work.boundaries) for work in works) == inner * per_stage


@pytest.mark.parametrize("case", COVER, ids=str)
def test_mesh_equals_one_process(case: Case) -> None:
    assert_exact(case)


@pytest.mark.parametrize("case", LARGER, ids=str)
def test_longer_axes_equal_one_process(case: Case) -> None:
    assert_exact(case)


@pytest.mark.full
@pytest.mark.parametrize("case", [case for case in cells() if case not in COVER], ids=str)
def test_every_cell_equals_one_process(case: Case) -> None:
    assert_exact(replace(case, layers=4))  # one on each stage at least; the cover above has uneven stages


Plant = Callable[[pytest.MonkeyPatch], None]
CLEARLY = 10
"""A fault is seen where a number is this many times over what `assert_exact` allows."""


def norm_within_heads_left_plain(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(tensor._WRAP, Role.HEADS, lambda module, mesh, sequence: tensor._wrap_local(module, Replicate()))


def norm_of_own_tokens_left_plain(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(tensor._WRAP, Role.TOKENS, lambda module, mesh, sequence: tensor._wrap_local(module, Replicate()))


def gradients_not_summed_where_a_block_is_entered(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tensor, "enter", lambda x, group, *, sequence: x)  # the same numbers forward


def blocks_cut_off_backward(patch: pytest.MonkeyPatch) -> None:
    def detached(x: torch.Tensor, group: ProcessGroup, *, sequence: bool) -> torch.Tensor:
        return enter(x.detach(), group, sequence=sequence).requires_grad_()

    patch.setattr(tensor, "enter", detached)


def gathered_features_not_summed(patch: pytest.MonkeyPatch) -> None:
    def copied(x_BTf: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        whole = list(gather_features(x_BTf.detach(), group).chunk(group.size(), dim=-1))
        whole[group.rank()] = x_BTf  # the same numbers forward
        return torch.cat(whole, dim=-1)

    patch.setattr(tensor, "gather_features", copied)


def learned_positions_left_plain(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tensor, "_tokens", lambda module, mesh, sequence: tensor._wrap_local(module, Replicate()))


def tied_copies_not_summed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gradients.TiedWeights, "sum_gradients", lambda self: None)


def open_sums_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "close_sums", lambda parameters: None)


def mean_of_means(patch: pytest.MonkeyPatch) -> None:
    def by_rank(self: engine.NativeEngine, labels: torch.Tensor) -> int:
        return int((labels != IGNORE).sum()) * self.block.layout.data

    patch.setattr(engine.NativeEngine, "_count_tokens", by_rank)


def clipping_skipped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "clip", lambda parameters, *, norm, limit: None)


def clipped_by_the_ranks_own_norm(patch: pytest.MonkeyPatch) -> None:
    def by_own(parameters: Iterable[nn.Parameter], *, norm: float, limit: float) -> None:
        parameters = list(parameters)
        own = gradients.squared_norm(parameters, 2).sqrt().item()
        gradients.clip(parameters, norm=own, limit=limit)

    patch.setattr(engine, "clip", by_own)


def nothing_decayed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(optimizer, "is_decayed", lambda name, parameter: False)


def everything_decayed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(optimizer, "is_decayed", lambda name, parameter: True)


def updates_counted_from_one(patch: pytest.MonkeyPatch) -> None:
    count = optimizer.ShardedAdamW.set_step
    patch.setattr(optimizer.ShardedAdamW, "set_step", lambda self, step: count(self, step + 1))


def gradient_of_nothing(patch: pytest.MonkeyPatch) -> None:
    def spoil(parameters: Iterable[nn.Parameter]) -> None:
        for parameter in list(parameters)[:1]:
            gradients.local_gradient(parameter).fill_(torch.nan)

    patch.setattr(engine, "close_sums", spoil)


SILENT: list[tuple[Plant, Case, str]] = [
    (norm_within_heads_left_plain, Case(1, 2, 2, family="qwen3"), "gradient"),
    (norm_of_own_tokens_left_plain, Case(1, 1, 2), "gradient"),
    (gradients_not_summed_where_a_block_is_entered, Case(1, 1, 2, sequence=False), "gradient"),
    (blocks_cut_off_backward, Case(1, 1, 2), "missing"),
    (gathered_features_not_summed, Case(1, 1, 2, family="phi3"), "gradient"),
    (learned_positions_left_plain, Case(1, 1, 2, family="gpt2"), "gradient"),
    (open_sums_forgotten, Case(2, 1, 2), "grad_norm"),
    (tied_copies_not_summed, Case(2, 1, 1, tied=True), "gradient"),
    (mean_of_means, Case(1, 2, 1), "loss"),
    (clipping_skipped, Case(1, 2, 1), "update"),
    (clipped_by_the_ranks_own_norm, Case(1, 1, 2), "update"),
    (nothing_decayed, Case(), "update"),
    (everything_decayed, Case(), "update"),
    (updates_counted_from_one, Case(), "update"),
]
"""Faults under which a run goes on in silence, with the number that shows them."""


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("plant", "case", "shown"), SILENT, ids=name_of)
def test_a_planted_fault_is_found(plant: Plant, case: Case, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: each of the field's silent mistakes is seen by it."""
    expected = reference(case)
    plant(monkeypatch)  # before the ranks are forked: a name that is gone fails here
    ranks = run_ranks(compare, case.world_size, case, expected, timeout=120)
    found = {
        "loss": (max(rank.losses[0] for rank in ranks), 1e-6),
        "grad_norm": (max(rank.grad_norms[0] for rank in ranks), 1e-5),
        "gradient": (max(rank.gradient for rank in ranks), 1e-5),
        "missing": (max(len(rank.missing) for rank in ranks), 0),
        "update": (max(rank.update for rank in ranks), 2e-4),
    }
    error, allowed = found.pop(shown)
    assert error > CLEARLY * allowed
    if shown == "update":
        # all before it is right, so that only the comparison of updates finds it
        assert all(error <= allowed for error, allowed in found.values()), found


def test_a_gradient_that_is_not_a_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reference(Case())
    gradient_of_nothing(monkeypatch)
    with pytest.raises(RanksFailed, match=r"not finite: model\.embed_tokens\.weight: nan"):
        run_ranks(compare, 1, Case(), expected, timeout=120)


def test_every_pair_of_options_is_covered() -> None:
    assert set().union(*map(pairs, COVER)) == set().union(*map(pairs, cells()))
    assert set(COVER) <= set(cells())
    assert len(COVER) < len(cells()) / 5
    meshes = {(case.pipeline, case.data, case.tensor) for case in COVER}
    assert meshes == set(product((1, 2), repeat=3)), "each axis alone, each pair of axes, and all three"
