"""Mixtures of experts: every mesh computes one process's numbers, the losses and drops of balancing included."""

from __future__ import annotations

import functools
from math import prod

import pytest
import torch
from cases import GLOBAL_BATCH, Case
from parity import Difference, assert_same_numbers, difference, reference
from transformers import AutoModelForCausalLM

from cuboid.parallel.loss import IGNORE
from cuboid.trainer.model import draw_blueprint, whole_masks
from cuboid.trainer.model_config import num_experts, read_checked_config
from cuboid.trainer.plain_experts import PlainBalance
from cuboid.trainer.recipe import MoeSettings

COVER = [
    Case(1, 1, 2, family="mixtral", activation_checkpointing="full", capacity_factor=1.0),
    Case(1, 1, 2, family="olmoe"),
    Case(2, 1, 1, "zbv", family="qwen3_moe", capacity_factor=0.8),
    Case(2, 2, 1, "1f1b", family="gpt_oss", expert=2, tied=True),
    Case(1, 2, 2, family="olmoe", expert=2, shard=False, tied=True),
    Case(1, 2, 2, family="mixtral", expert=4, activation_checkpointing="full"),
    Case(1, 4, 1, family="mixtral", expert=2),
    Case(2, 2, 2, "zbv", family="qwen3_moe", expert=4, capacity_factor=1.2),
    Case(2, 2, 2, "1f1b", family="mixtral", expert=2, tied=True),
]
MORE = [
    Case(family="gpt_oss"),
    Case(2, 1, 2, "1f1b", family="qwen3_moe", expert=2),
    Case(2, 2, 1, "zbv", family="olmoe", expert=2, shard=False),
    Case(1, 2, 2, family="qwen3_moe", expert=2, shard=False, capacity_factor=1.0),
    Case(2, 2, 2, "1f1b", family="qwen3_moe", expert=1),
    Case(2, 2, 1, "1f1b", family="olmoe", expert=1, capacity_factor=1.0),
    Case(2, 1, 2, "zbv", family="mixtral", expert=1, shard=False),
    Case(1, 2, 1, family="gpt_oss", expert=1, capacity_factor=1.0),
    Case(2, 2, 1, "zbv", family="gpt_oss", expert=2, capacity_factor=1.0),
    Case(2, 2, 2, "interleaved_zero_bubble", family="olmoe", expert=4),
    Case(2, 2, 2, "dualpipe_v", family="mixtral", expert=4),
]
"""The rest of the meshes, each family on four of them, is in test_families.py."""


def assert_exact(case: Case) -> None:
    ranks = difference(case)
    assert_same_numbers(case, ranks)
    assert_experts_are_divided(case, ranks)
    expected = one_process(case.family, case.tied, case.capacity_factor)
    for rank in ranks:
        assert rank.measures is not None
        assert rank.measures.keys() == expected.keys()
        for name, value in expected.items():
            assert rank.measures[name] == pytest.approx(value, rel=1e-5), name


def assert_experts_are_divided(case: Case, ranks: list[Difference]) -> None:
    sharded = case.data * case.tensor // case.expert if case.shard else 1
    wanted = {axis: parts for axis, parts in (("expert", case.expert), ("expert_replica", sharded)) if parts > 1}
    found = [held for rank in ranks for name, held in rank.work.held.items() if ".experts." in name]
    assert found
    for held in found:
        assert {axis: parts for axis, parts in held.parts.items() if parts > 1} == wanted
        assert held.numel * prod(wanted.values()) == held.whole_numel


@functools.cache
def one_process(family: str, tied: bool, capacity_factor: float | None) -> dict[str, float | list[float]]:
    """The measures of the first step, from what transformers' routers give to the whole batch."""
    recipe = Case(family=family, tied=tied, capacity_factor=capacity_factor).recipe()
    config = read_checked_config(recipe.model)
    expected = reference(Case(family=family, tied=tied, capacity_factor=capacity_factor))
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(expected.weights, strict=False)
    model.tie_weights()
    settings = [{"aux_loss": 1.0}, {"aux_loss": 0.0, "z_loss": 1.0}]
    balances = [PlainBalance(model, MoeSettings(**each, capacity_factor=capacity_factor)) for each in settings]
    heard: list[tuple[torch.Tensor, ...]] = []
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(lambda _, args, output: heard.append(output))
    batch = expected.batches[0]
    for balance in balances:
        balance.begin(GLOBAL_BATCH)
    with torch.no_grad():
        masks = whole_masks(draw_blueprint(config), batch.position_ids)
        model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=masks, use_cache=False)
    experts, layers = num_experts(config), []
    for logits, weights, chosen in heard:
        load = torch.bincount(chosen.flatten(), minlength=experts) * experts / chosen.numel()
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
        layers.append((load, entropy, (weights == 0).float().mean()))
    loads, entropies, dropped = (torch.stack(each) for each in zip(*layers, strict=True))
    aux_loss, z_loss = (balance.loss(batch.labels, int((batch.labels != IGNORE).sum())) for balance in balances)
    return {
        "expert_load": loads.mean(0).tolist(),
        "expert_load_max": loads.max().item(),
        "expert_dropped": dropped.mean().item(),
        "router_entropy": entropies.mean().item(),
        "router_aux_loss": aux_loss.item(),
        "router_z_loss": z_loss.item(),
    }


@pytest.mark.parametrize("case", COVER, ids=str)
def test_mesh_equals_one_process(case: Case) -> None:
    assert_exact(case)


@pytest.mark.full
@pytest.mark.parametrize("case", MORE, ids=str)
def test_more_meshes_equal_one_process(case: Case) -> None:
    assert_exact(case)
