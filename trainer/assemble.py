"""The one ordered assembly: from a recipe and a live block of ranks to an engine that can step."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import nn

from cuboid.parallel.data import apply_data_parallel
from cuboid.parallel.distillation import LargestKept, LogitsKept
from cuboid.parallel.expert import Experts, expert_modules
from cuboid.parallel.gradients import TiedWeights
from cuboid.parallel.layer_terms import LayerTerms, partners
from cuboid.parallel.local import localise
from cuboid.parallel.mesh import Block
from cuboid.parallel.nf4 import hold_in_4_bits
from cuboid.parallel.pipeline import Loss, Pipeline
from cuboid.parallel.preference import LogProbabilitiesKept, PreferenceLoss
from cuboid.parallel.quantization import FakeQuantization
from cuboid.parallel.schedules import stage_indices
from cuboid.parallel.stages import Stage, apply_activation_checkpointing, cut_stage, split_layers
from cuboid.parallel.tensor import apply_tensor_parallel
from cuboid.trainer.check_distill import teacher_recipe
from cuboid.trainer.check_mesh import virtual_stages
from cuboid.trainer.check_preference import reference_recipe
from cuboid.trainer.depth import name_in_folder
from cuboid.trainer.engine import Engine, NativeEngine
from cuboid.trainer.model import (
    DTYPES,
    Blueprint,
    draw_blueprint,
    estimate_costs,
    initialise_buffers,
    local_folder,
    parameter_shapes,
    seeded_tensors,
    tensor_plan,
)
from cuboid.trainer.model_config import config_of, layers_in_folder
from cuboid.trainer.optimizer import ShardedAdamW
from cuboid.trainer.parts import make_experts, make_layer_terms, make_loss, make_pruner, make_quantization
from cuboid.trainer.plans import stored_names
from cuboid.trainer.preference import Preference
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.recipe_preference import ADAPTER
from cuboid.trainer.teacher import LiveTeacher, Teacher
from cuboid.trainer.teacher_cache import cached_teacher
from cuboid.trainer.weights import CopyInto, fill, from_full, from_safetensors


def assemble(recipe: Recipe, block: Block, blueprint: Blueprint, weights: CopyInto) -> Engine:
    """Build this rank's part of the run. Why each line stands where it does is said beside it."""
    # before the model's own stages, which are cut out of the blueprint
    reference = _reference(recipe, block, blueprint, weights)
    experts = make_experts(recipe, block, blueprint)
    quantization = make_quantization(recipe, block)
    stages = build_stages(recipe, block, blueprint, weights, experts, quantization)
    parameters = named_parameters(stages)
    tied = TiedWeights(stages, block)
    tied.follow()
    loss, teacher = make_loss(recipe, block), _teacher(recipe, block, blueprint)
    layer_terms = teacher.layer_terms if isinstance(teacher, LiveTeacher) else None
    for stage in stages:
        stage.watch = layer_terms
    numbered: dict[int, nn.Module] = dict(zip(stages_of_rank(recipe, block), stages, strict=True))
    preference = None
    if isinstance(loss, PreferenceLoss):
        preference = _preference(recipe, block, loss, *(reference or (blueprint, numbered)))
    if recipe.parallel.engine == "deepspeed":
        os.environ["DS_ACCELERATOR"] = block.device.type  # read when deepspeed is first imported
        from cuboid.trainer.zero import ZeroEngine, divide

        (index,) = numbered  # no schedule that it knows lays two on a rank
        zero = divide(stages[0], parameters, tied, recipe, block)
        return ZeroEngine(
            block=block,
            pipeline=_pipeline(recipe, block, blueprint, {index: zero}, loss),
            loss=loss,
            parameters=parameters,
            experts=experts,
            tied=tied,
            teacher=teacher,
            layer_terms=layer_terms,
            quantization=quantization,
            preference=preference,
            averaged_over=block.layout.data,
            saves_frozen=recipe.lora is None,
            zero=zero,
        )
    return NativeEngine(
        block=block,
        pipeline=_pipeline(recipe, block, blueprint, numbered, loss),
        loss=loss,
        parameters=parameters,
        experts=experts,
        tied=tied,
        teacher=teacher,
        layer_terms=layer_terms,
        quantization=quantization,
        preference=preference,
        # after the values: the optimizer works on views of the final shards
        optimizer=ShardedAdamW(parameters, recipe.optimizer),
        clip_grad_norm=recipe.optimizer.clip_grad_norm,
        pruner=make_pruner(recipe, block, blueprint, parameters),
        saves_frozen=recipe.lora is None,
    )


def build_stages(
    recipe: Recipe,
    block: Block,
    blueprint: Blueprint,
    weights: CopyInto,
    experts: Experts | None = None,
    quantization: FakeQuantization | None = None,
) -> list[Stage]:
    """This rank's stages, divided over tensor, expert and data, with their first values."""
    settings, split = recipe.parallel, layers_of_stages(recipe, blueprint)
    stages = []
    for index in stages_of_rank(recipe, block):
        stage = divided_stage(recipe, block, blueprint, split[index], experts, quantization)
        if settings.engine == "native":
            apply_data_parallel(
                stage,
                block.data_mesh,
                experts=[module for _, _, module, _ in expert_modules(stage)],
                expert_mesh=experts.mesh["expert_replica"] if experts else None,
                shard=recipe.is_sharded,
                reshard_after_forward=reshards_after_forward(recipe),
                compute=blueprint.compute,
                reduce=DTYPES[recipe.precision.reduce],
            )
        # only now memory: shards alone, on their device
        stage.to_empty(device=block.device)
        stage.tie()
        initialise_buffers(blueprint, stage)
        stages.append(stage)
    fill(named_parameters(stages), weights)
    if settings.engine == "deepspeed":
        # after the values, which find their place by the DTensors
        for stage in stages:
            localise(stage)
    return stages


def divided_stage(
    recipe: Recipe,
    block: Block,
    blueprint: Blueprint,
    layers: Sequence[int],
    experts: Experts | None = None,
    quantization: FakeQuantization | None = None,
) -> Stage:
    """The stage of these layers on `meta`, with what this rank has of each matrix, before it is sharded over data."""
    settings = recipe.parallel
    plan = tensor_plan(blueprint) if settings.tensor > 1 else {}
    # cut on meta first: nothing that this rank does not compute ever takes memory
    stage = cut_stage(blueprint.model, layers, anatomy=blueprint.anatomy, masks=blueprint.masks)
    # before anything is divided: blocks of a matrix, not its numbers
    if recipe.lora is not None and recipe.lora.base == "nf4":
        hold_in_4_bits(stage.layers)
    # before tensor parallelism, whose exchanges lie around a product with rounded weights
    if quantization is not None:
        quantization.apply(stage, head=blueprint.anatomy.head)
    # before sharding over data: FSDP shards what tensor parallelism left to this rank
    apply_tensor_parallel(stage, block.mesh["tensor"], plan, sequence=settings.sequence)
    # before sharding too: experts are sharded over other ranks than the rest
    if experts is not None:
        experts.divide(stage)
    # before sharding, so that a layer's parameters are gathered once around its recomputation
    if settings.activation_checkpointing == "full":
        apply_activation_checkpointing(stage)
    return stage


def _teacher(recipe: Recipe, block: Block, blueprint: Blueprint) -> Teacher | None:
    if recipe.distill is None:
        return None
    if recipe.distill.cache is None:
        split = layers_of_stages(recipe, blueprint) if recipe.distill.compares_layers else None
        return live_teacher(recipe, block, student=split)
    last = recipe.parallel.pipeline * virtual_stages(recipe) - 1
    return cached_teacher(recipe, is_last=last in stages_of_rank(recipe, block))


def live_teacher(recipe: Recipe, block: Block, *, student: Sequence[range] | None = None) -> LiveTeacher:
    """The model of `distill.teacher` on this block, which takes part in no training. Where layers are compared,
    ``student`` are those of its stages: each layer's partner stands on the same stage."""
    settings, own, group = recipe.distill, teacher_recipe(recipe), block.mesh["tensor"].get_group()
    assert settings is not None
    layer_terms = None
    if student is not None:
        compared = partners(student[-1].stop, config_of(own).num_hidden_layers)
        ends = [compared[part.stop - 1] + 1 for part in student]
        counts = tuple(stop - start for start, stop in pairwise([0, *ends]))
        own = own.model_copy(update={"parallel": own.parallel.model_copy(update={"layers": counts})})
        layer_terms = LayerTerms(compared, make_layer_terms(recipe, config_of(recipe), group), tensor_group=group)
    blueprint = draw_blueprint(config_of(own), attention=own.model.attention, compute=own.precision.compute)
    stages = _frozen_stages(own, block, blueprint, initial_weights(own, blueprint))
    kept = LogitsKept()
    if settings.top_k is not None:
        kept = LargestKept(group, k=settings.top_k, temperature=settings.temperature)
    for stage in stages.values():
        stage.watch = layer_terms and layer_terms.teacher
    return LiveTeacher(_pipeline(own, block, blueprint, stages, kept), kept, layer_terms)


def _reference(
    recipe: Recipe, block: Block, blueprint: Blueprint, weights: CopyInto
) -> tuple[Blueprint, Mapping[int, Stage]] | None:
    """Blueprint and stages of a preference tuning's reference; None where it is no model of its own."""
    if recipe.preference is None or recipe.preference.reference == ADAPTER:
        return None
    own = reference_recipe(recipe)
    if recipe.preference.reference is None:
        blueprint = replace(blueprint, model=copy.deepcopy(blueprint.model))
    else:
        compute, attention = own.precision.compute, own.model.attention
        blueprint = draw_blueprint(config_of(own), attention=attention, compute=compute)
        weights = initial_weights(own, blueprint)
    return blueprint, _frozen_stages(own, block, blueprint, weights)


def _frozen_stages(recipe: Recipe, block: Block, blueprint: Blueprint, weights: CopyInto) -> Mapping[int, Stage]:
    """This rank's stages, by number, of a model that is only run forward."""
    blueprint.model.requires_grad_(False)
    stages = build_stages(recipe, block, blueprint, weights, make_experts(recipe, block, blueprint))
    TiedWeights(stages, block).follow()
    return dict(zip(stages_of_rank(recipe, block), stages, strict=True))


def _preference(
    recipe: Recipe, block: Block, loss: PreferenceLoss, blueprint: Blueprint, stages: Mapping[int, nn.Module]
) -> Preference:
    """``stages`` and their blueprint are the reference's, or the trained model's with its adapters."""
    kept = LogProbabilitiesKept(loss.group)
    beneath: Callable[[], AbstractContextManager[None]] = nullcontext
    if recipe.preference and recipe.preference.reference == ADAPTER:
        from cuboid.trainer.adapters import switched_off

        beneath = partial(switched_off, list(stages.values()))
    return Preference(
        loss=loss, reference=_pipeline(recipe, block, blueprint, stages, kept), kept=kept, beneath=beneath
    )


def layers_of_stages(recipe: Recipe, blueprint: Blueprint) -> list[range]:
    """Which layers each stage computes: as the recipe says, or balanced by estimated cost."""
    if recipe.parallel.layers is not None:
        bounds = [0, *accumulate(recipe.parallel.layers)]
        return [range(start, stop) for start, stop in pairwise(bounds)]
    costs = estimate_costs(
        blueprint, sequences=recipe.batch_plan.microbatch_size, sequence_length=recipe.data.sequence_length
    )
    return split_layers(costs, recipe.parallel.pipeline * virtual_stages(recipe))


def prepared(recipe: Recipe, blueprint: Blueprint) -> tuple[Blueprint, CopyInto]:
    """The model that is trained, with adapters where the recipe has them, and its first values."""
    weights = initial_weights(recipe, blueprint)
    if recipe.lora is None:
        return blueprint, weights
    from cuboid.trainer.adapters import adapt

    return adapt(recipe, blueprint, weights)


def initial_weights(recipe: Recipe, blueprint: Blueprint) -> CopyInto:
    """Where the model's own first values come from: a folder's safetensors, or the seed. Where experts are made of a
    dense model, their routers come from the seed, and all else from the folder."""
    drawn = from_full(seeded_tensors(blueprint, seed=recipe.seed))
    if recipe.model.pretrained is None:
        return drawn
    anatomy, upcycled = blueprint.anatomy, recipe.moe is not None and recipe.moe.experts is not None
    shapes = parameter_shapes(blueprint)
    routers = {name for name in shapes if upcycled and f".{anatomy.router}." in name}
    kept, layers = layers_in_folder(recipe.model), f"{anatomy.base}.{anatomy.layers}."
    in_folder = {name: name_in_folder(name, kept, layers=layers) for name in shapes if name not in routers}
    stored = from_safetensors(
        local_folder(recipe.model.pretrained),
        shapes={theirs: shapes[name] for name, theirs in in_folder.items()},
        base=anatomy.base,
        family=blueprint.config.model_type,
        dense=upcycled,
        stored_names=stored_names(blueprint.config),
    )

    def copy_into(name: str, part: tuple[slice, ...], target: torch.Tensor) -> None:
        if name in routers:
            drawn(name, part, target)
        else:
            stored(in_folder[name], part, target)

    return copy_into


def named_parameters(stages: list[Stage]) -> list[tuple[str, nn.Parameter]]:
    """Every parameter of this rank under its global name; a tied copy comes under the embedding's. Where both stand on
    this rank, the first is meant: `TiedWeights.follow` gives the other its values."""
    named: dict[str, nn.Parameter] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            named.setdefault(stage.anatomy.global_name(name), parameter)
    return list(named.items())


def reshards_after_forward(recipe: Recipe) -> bool:
    """Under a pipeline many microbatches are in flight: gathering again for each backward would multiply traffic."""
    reshard = recipe.parallel.reshard
    return recipe.parallel.pipeline == 1 if reshard == "auto" else reshard


def _pipeline(
    recipe: Recipe, block: Block, blueprint: Blueprint, modules: Mapping[int, nn.Module], loss: Loss
) -> Pipeline:
    return Pipeline(
        modules,
        schedule=recipe.parallel.schedule,
        microbatches=recipe.parallel.microbatches,
        group=block.mesh["pipeline"].get_group(),
        loss=loss,
        whereabouts=block.whereabouts,
        **microbatch_shapes(recipe, blueprint, block),
    )


def stages_of_rank(recipe: Recipe, block: Block) -> tuple[int, ...]:
    """Their numbers."""
    settings, rank = recipe.parallel, block.coordinate.pipeline
    return stage_indices(
        settings.schedule, pipeline=settings.pipeline, rank=rank, virtual_stages=virtual_stages(recipe)
    )


def microbatch_shapes(recipe: Recipe, blueprint: Blueprint, block: Block) -> dict[str, torch.Tensor]:
    """On meta, for one microbatch: hidden states between stages [B, T_local, D], logits [B, T, V_local]."""
    batch, tokens, ranks = recipe.batch_plan.microbatch_size, recipe.data.sequence_length, block.layout.tensor
    tokens_local = tokens // ranks if recipe.parallel.sequence else tokens
    config, dtype = blueprint.config, blueprint.compute
    return {
        "boundary": torch.empty(batch, tokens_local, config.hidden_size, dtype=dtype, device="meta"),
        "logits": torch.empty(batch, tokens, config.vocab_size // ranks, dtype=dtype, device="meta"),
    }
