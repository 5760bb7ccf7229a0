"""Adapters: on every mesh they train as in peft's own model in one process, and the frozen rest keeps its bits."""

from __future__ import annotations

import re

import pytest
import torch
from cases import Case
from harness import run_ranks
from parity import assert_same_numbers, compare, difference, one_process, reference

from cuboid.parallel import dora, tensor
from cuboid.parallel.expert_adapters import local_experts, without_adapters
from cuboid.parallel.tensor import Role

CASES = [
    Case(1, 2, 2, lora="all", activation_checkpointing="full"),
    Case(2, 2, 2, "zbv", tied=True, shard=False, lora="some"),
    Case(2, 1, 2, "1f1b", "gpt2", lora="all"),  # transposed linears, a column gathered, a row cut
    Case(2, 1, 2, "gpipe", sequence=False, lora="whole"),
    Case(1, 2, 2, family="qwen3_moe", expert=2, lora="experts"),
    Case(1, 2, 2, family="gpt2", activation_checkpointing="full", lora="dora"),
    Case(1, 2, 2, family="blocks", lora="nf4", activation_checkpointing="full"),
]
EVERY = [
    Case(2, 2, 1, "interleaved_zero_bubble", "qwen3", lora="biases"),
    Case(2, 1, 2, "dualpipe_v", "qwen2", tied=True, lora="biases"),
    Case(2, 1, 2, "interleaved_1f1b", "phi3", lora="all"),
    Case(2, 1, 2, "looped_bfs", "olmo2", lora="whole"),
    Case(2, 1, 2, "zbv", "gemma2", lora="whole"),
    Case(1, 4, 1, shard=2, lora="all"),
    Case(2, 1, 2, lora="head"),
    Case(1, 1, 2, sequence=False, lora="head"),
    Case(2, 2, 1, "zbv", "qwen3", lora="dora"),
    Case(2, 1, 2, "1f1b", "llama", sequence=False, lora="dora"),
    Case(1, 1, 2, family="phi3", lora="dora"),  # a column gathered and a row of whole tokens
    Case(1, 2, 2, family="mixtral", expert=2, shard=False, lora="dora"),
    Case(2, 2, 1, "zbv", "mixtral", lora="experts"),
    Case(1, 2, 1, family="gpt_oss", expert=2, lora="experts"),  # transposed
    Case(1, 2, 2, family="olmoe", activation_checkpointing="full", shard=False, lora="down"),
    Case(2, 2, 1, "1f1b", "qwen3_moe", expert=2, lora="whole"),
    Case(2, 2, 2, "zbv", "blocks", lora="nf4"),
    Case(1, 4, 1, family="blocks", shard=2, lora="nf4-whole"),
    Case(2, 1, 2, "interleaved_zero_bubble", "blocks", sequence=False, lora="nf4-some"),
    Case(2, 2, 1, "dualpipe_v", "blocks", tied=True, shard=False, lora="nf4-some"),
    Case(1, 2, 2, family="mixtral_blocks", expert=2, lora="nf4"),
]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.full) for case in EVERY)], ids=str)
def test_adapters_train_as_in_one_process(case: Case) -> None:
    ranks = difference(case)
    assert_same_numbers(case, ranks)
    weights = reference(case).weights
    linears = {name for name in weights if re.search(r"_proj(\.base_layer)?\.weight$", name)}
    in_bytes = {n for rank in ranks for n, held in rank.work.held.items() if held.whole_numel < weights[n].numel()}
    assert in_bytes == (linears if "nf4" in case.lora else set())


def test_a_gradient_that_is_not_summed_over_tensor_ranks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A beside a column, with the part of its gradient that comes through this rank's rows of B taken for the whole."""
    case = Case(1, 1, 2, sequence=False, lora="all")
    forgotten = {**tensor._ADAPTER, Role.COLUMN: {"A": Role.TOKENS, "B": Role.COLUMN}}
    monkeypatch.setattr(tensor, "_ADAPTER", forgotten)
    ranks = run_ranks(compare, case.world_size, case, reference(case), timeout=120)
    assert all(rank.gradient > 1e-2 for rank in ranks)
    assert all(".lora_A." in rank.worst_gradient for rank in ranks)


@pytest.mark.full
def test_lengths_of_the_part_of_a_row_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank takes the length of its own part of a cut row for that of the whole."""
    case, lengths = Case(1, 1, 2, lora="dora"), dora._lengths
    monkeypatch.setattr(dora, "_lengths", lambda *args, group: lengths(*args, group=None))
    ranks = run_ranks(compare, case.world_size, case, reference(case), timeout=120)
    assert all(min(rank.losses) > 1e-4 for rank in ranks)


def test_adapters_of_experts_that_are_switched_off_add_nothing() -> None:
    outer = one_process(Case(family="mixtral", lora="experts")).get_submodule("model.layers.0.mlp.experts")
    own, inner = without_adapters(outer), outer.get_submodule("base_layer")
    frozen = {name: own.get_parameter(name).clone() for name in ("gate_up_proj", "down_proj")}
    for switched_off in ([], [inner, outer]):
        for wrapper in switched_off:
            wrapper._disable_adapters = True
        with local_experts(outer):
            assert all(torch.equal(getattr(own, name), frozen[name]) is bool(switched_off) for name in frozen)
