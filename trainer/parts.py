"""What a recipe asks for around the stages of its model, as a part of this rank: losses, experts, rounding, pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed import ProcessGroup

from cuboid.parallel.distillation import DistillationLoss
from cuboid.parallel.expert import Balance, Experts, Routing
from cuboid.parallel.hidden_states import hidden_distance
from cuboid.parallel.layer_terms import Term
from cuboid.parallel.loss import SummedCrossEntropy
from cuboid.parallel.mesh import Block, expert_mesh
from cuboid.parallel.preference import PreferenceLoss
from cuboid.parallel.pruning import Pruning
from cuboid.parallel.quantization import FakeQuantization
from cuboid.parallel.relations import relation_distance
from cuboid.parallel.structures import StructuredPruning
from cuboid.trainer.model import Blueprint, expert_counts, parameter_shapes, prunable
from cuboid.trainer.plans import PROJECTIONS
from cuboid.trainer.prune import Pruner, StructurePruner
from cuboid.trainer.recipe import MoeSettings, Recipe
from cuboid.trainer.structures import structures

if TYPE_CHECKING:
    from cuboid.trainer.model_config import PretrainedConfig


def make_loss(recipe: Recipe, block: Block) -> SummedCrossEntropy:
    """Of labels, of a teacher beside them, or of pairs of answers."""
    group = block.mesh["tensor"].get_group()
    if (pairs := recipe.preference) is not None:
        return PreferenceLoss(group, beta=pairs.beta, kind=pairs.loss, label_smoothing=pairs.label_smoothing)
    if recipe.distill is None:
        return SummedCrossEntropy(group)
    return DistillationLoss(group, temperature=recipe.distill.temperature, weight=recipe.distill.weight)


def make_layer_terms(recipe: Recipe, student: PretrainedConfig, group: ProcessGroup) -> list[Term]:
    """What `distill` adds to the loss of logits; ``group`` are the tensor ranks."""
    settings, terms = recipe.distill, []
    assert settings is not None
    if settings.hidden:
        terms.append(
            Term(
                layers=range(student.num_hidden_layers),
                outputs=("",),
                weight=settings.hidden,
                distance=partial(hidden_distance, kind=settings.hidden_loss, tensor_group=group),
                is_divided=recipe.parallel.sequence,
            )
        )
    if settings.attention:
        layers, heads = settings.relations(student)
        terms.append(
            Term(
                layers=layers,
                outputs=PROJECTIONS,
                weight=settings.attention,
                distance=partial(relation_distance, heads=heads // group.size(), of_all=heads),
                is_divided=True,
            )
        )
    return terms


def make_experts(recipe: Recipe, block: Block, blueprint: Blueprint) -> Experts | None:
    """None where no layer has experts."""
    if not (counts := expert_counts(blueprint)):
        return None
    balance = Balance(**(recipe.moe or MoeSettings()).model_dump(exclude={"experts", "top_k"}))
    if recipe.parallel.engine == "deepspeed":  # which averages over data: each rank's losses are larger by as much
        ranks = block.layout.data
        balance = replace(balance, aux_loss=balance.aux_loss * ranks, z_loss=balance.z_loss * ranks)
    routing = Routing(
        balance=balance,
        normalised=getattr(blueprint.config, "norm_topk_prob", True),
        num_layers=len(counts),
        tensor_group=block.mesh["tensor"].get_group(),
    )
    num_layers = blueprint.config.num_hidden_layers
    return Experts(expert_mesh(block), routing, num_layers=num_layers, num_experts=max(counts))


def make_quantization(recipe: Recipe, block: Block) -> FakeQuantization | None:
    """None where whole weights are computed with."""
    if recipe.quantize is None:
        return None
    from cuboid.trainer.quantize import Quantization

    rounding, group = Quantization.of(recipe.quantize).rounding(), block.mesh["tensor"].get_group()
    return FakeQuantization(rounding, group, start_step=recipe.quantize.start_step)


def make_pruner(
    recipe: Recipe, block: Block, blueprint: Blueprint, parameters: Sequence[tuple[str, nn.Parameter]]
) -> Pruner | StructurePruner | None:
    """Of this rank's ``parameters``, by name; None where nothing is pruned."""
    if (settings := recipe.prune) is None:
        return None
    if settings.is_structured:
        units = structures(blueprint.config, settings, parameter_shapes(blueprint))
        own = [(parameter, units.cuts[name]) for name, parameter in parameters if name in units.cuts]
        return StructurePruner(
            settings, units, StructuredPruning(own, groups=units.groups, units=units.units, block=block)
        )
    names = prunable(blueprint, settings.modules)
    return Pruner(settings, Pruning([parameter for name, parameter in parameters if name in names], block))
