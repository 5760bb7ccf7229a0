"""What no field can tell alone: the recipe against itself, the model and the machine, before any process starts.

Each check yields every error it finds, with the values that would work. Imports no torch until the model is looked at.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from math import gcd
from typing import TYPE_CHECKING, TypeVar

from cuboid.parallel.errors import FieldError, UserError, UserErrors, one_of
from cuboid.parallel.layout import divisors
from cuboid.trainer.check_best import best_errors
from cuboid.trainer.check_data import data_errors
from cuboid.trainer.check_distill import as_of, cache_errors, teach_errors, teacher_errors, teacher_recipe
from cuboid.trainer.check_engine import engine_errors
from cuboid.trainer.check_faults import fault_errors
from cuboid.trainer.check_folders import folder_errors
from cuboid.trainer.check_lora import lora_errors, target_errors
from cuboid.trainer.check_mesh import mesh_errors, virtual_stages
from cuboid.trainer.check_preference import own_reference, preference_errors, reference_errors, reference_recipe
from cuboid.trainer.check_prune import prunable_errors, prune_errors, structure_errors
from cuboid.trainer.check_quantize import group_errors, quantize_errors
from cuboid.trainer.elastic import elastic_errors
from cuboid.trainer.recipe import LaunchSettings, Recipe

if TYPE_CHECKING:
    from cuboid.trainer.model_config import PretrainedConfig

_Result = TypeVar("_Result")

RANKS_PER_CORE = 32
"""Bound on CPU ranks: a rank takes some 200 MB, so that more are a typing error and not a plan."""


@dataclass(frozen=True)
class Devices:
    """What ranks can run on: ``kind`` is cuda (one rank a GPU) or cpu (``count`` cores, which ranks may outnumber)."""

    kind: str
    count: int
    where: str = "this machine"

    @property
    def most_ranks(self) -> int:
        return self.count * (1 if self.kind == "cuda" else RANKS_PER_CORE)

    def __str__(self) -> str:
        unit = "GPU" if self.kind == "cuda" else "core"
        return f"{self.count} {unit}{'' if self.count == 1 else 's'} of {self.where}"


def local_devices(settings: LaunchSettings) -> Devices:
    """What this machine offers for ``launch.device``; raises FieldError where cuda is asked for and absent."""
    num_gpus = 0
    if settings.device != "cpu":
        import torch

        num_gpus = torch.cuda.device_count()
    if num_gpus:
        return Devices("cuda", num_gpus)
    if settings.device == "cuda":
        raise FieldError("launch.device", "cuda", "finds no GPU here that torch can use", "use cpu or auto")
    return Devices("cpu", num_cores())


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def runs_elsewhere(settings: LaunchSettings) -> bool:
    """Whether the ranks start on other machines: those of a Slurm job, or of a Ray cluster that is already there, a
    given one or the one of a submitted job."""
    given = settings.address is not None or "RAY_ADDRESS" in os.environ or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return settings.launcher == "slurm" or (settings.launcher == "ray" and given)


def resolve_devices(recipe: Recipe, devices: Devices | None) -> Recipe:
    """The recipe with ``launch.device`` and ``parallel.data`` settled where they say auto.

    Without ``devices``, which only a cluster knows, ``launch.device`` stays; raises FieldError where data cannot.
    """
    parallel, inner = recipe.parallel, recipe.parallel.pipeline * recipe.parallel.tensor
    if devices is None:
        if parallel.data == "auto":
            constraint = "cannot be settled before the cluster is reached"
            raise FieldError("parallel.data", "auto", constraint, "give a number of ranks")
        return recipe
    if parallel.data == "auto":
        if devices.kind == "cuda" and inner > devices.count:
            constraint = f"has no room: pipeline x tensor = {inner} ranks on {devices}"
            raise FieldError("parallel.data", "auto", constraint, f"use a pipeline x tensor of at most {devices.count}")
        parallel = parallel.model_copy(update={"data": max(1, devices.count // inner)})
    launch = recipe.launch.model_copy(update={"device": devices.kind})
    return recipe.model_copy(update={"parallel": parallel, "launch": launch})


def check(recipe: Recipe, devices: Devices | None) -> None:
    """Raises UserErrors with everything that is wrong between fields, model and machine.

    Args:
        recipe: resolved by `resolve_devices`.
        devices: of this machine; None where ranks run elsewhere, and the launcher looks for their room there.
    """
    here = not runs_elsewhere(recipe.launch)
    errors = [
        *(rank_errors(recipe, devices) if devices else ()),
        *settings_errors(recipe, runs_here=here),
        *folder_errors(recipe, runs_here=here),
        *_launch_errors(recipe),
    ]
    model_errors, config = _attempt(lambda: _config(recipe))
    errors += model_errors
    if config is not None:
        errors += [
            *_tensor_errors(recipe, config),
            *_expert_errors(recipe, config),
            *_stage_errors(recipe, config),
            *_model_errors(recipe, config),
            *_teacher_errors(recipe, config),
            *_reference_errors(recipe, config),
        ]
    errors += data_errors(recipe, config and config.vocab_size)
    if devices:  # a machine that only submits needs no tracker
        errors += _track_errors(recipe)
    if errors:
        raise UserErrors(errors)


def settings_errors(recipe: Recipe, *, runs_here: bool) -> Iterator[UserError]:
    """The recipe against itself: what neither its files nor a machine is needed to tell.

    Args:
        runs_here: ranks start on this machine, so that the packages they need must be there.
    """
    yield from mesh_errors(recipe)
    yield from elastic_errors(recipe)
    yield from _warmup_errors(recipe)
    yield from engine_errors(recipe, runs_here=runs_here)
    yield from prune_errors(recipe)
    yield from lora_errors(recipe, runs_here=runs_here)
    yield from preference_errors(recipe)
    yield from quantize_errors(recipe, runs_here=runs_here)
    yield from best_errors(recipe)
    yield from fault_errors(recipe)
    yield from _length_errors(recipe)


def check_teacher(recipe: Recipe, devices: Devices | None) -> None:
    """`check` for a command that runs the recipe's teacher alone: the student need not fit on its mesh."""
    errors: list[UserError] = list(teach_errors(recipe))
    if not errors:
        assert recipe.distill is not None
        own = teacher_recipe(recipe)
        errors += as_of("distill.teacher", recipe.distill.teacher, _attempt(lambda: check(own, devices))[0])
        found, config = _attempt(lambda: _config(recipe))
        teacher = _attempt(lambda: _config(own))[1]
        errors += found
        if config is not None and teacher is not None:
            errors += teacher_errors(recipe, config, teacher)
    if errors:
        raise UserErrors(errors)


def rank_errors(recipe: Recipe, devices: Devices) -> Iterator[UserError]:
    """Ranks against the machine."""
    layout = recipe.layout
    if layout.world_size <= devices.most_ranks:
        return
    inner = layout.pipeline * layout.tensor
    fits = devices.most_ranks // inner
    remedy = f"use parallel.data={fits}" if fits else f"use at most {devices.most_ranks} ranks in all"
    bound = f"{devices}" if devices.kind == "cuda" else f"{devices} ({RANKS_PER_CORE} ranks a core at most)"
    if devices.kind == "cuda":
        remedy += ", or launch.device=cpu"
    yield FieldError("parallel", layout, f"makes {layout.world_size} ranks, more than the {bound}", remedy)


def _warmup_errors(recipe: Recipe) -> Iterator[UserError]:
    warmup, steps = recipe.optimizer.warmup_steps, recipe.train.steps
    if warmup > steps:
        remedy = f"use at most {steps}"
        yield FieldError("optimizer.warmup_steps", warmup, f"is more than train.steps={steps}", remedy)


def _length_errors(recipe: Recipe) -> Iterator[UserError]:
    length, tensor = recipe.data.sequence_length, recipe.parallel.tensor
    if recipe.parallel.sequence and length % tensor:
        below = length // tensor * tensor
        works = one_of([value for value in (below, below + tensor) if value >= 2])
        constraint = f"is not a multiple of parallel.tensor={tensor}, whose ranks share each sequence"
        yield FieldError("data.sequence_length", length, constraint, f"use {works}, or parallel.sequence=false")


def _launch_errors(recipe: Recipe) -> Iterator[UserError]:
    if recipe.launch.launcher == "ray" and find_spec("ray") is None:
        yield FieldError("launch.launcher", "ray", "needs the package ray", "pip install 'cuboid[ray]', or use local")


def _config(recipe: Recipe) -> PretrainedConfig:
    from cuboid.trainer.model_config import config_of

    return config_of(recipe)


def _tensor_errors(recipe: Recipe, config: PretrainedConfig) -> Iterator[UserError]:
    """Heads, features and vocabulary are divided whole among tensor ranks."""
    tensor, model = recipe.parallel.tensor, recipe.model.pretrained or f"this {config.model_type}"
    if tensor == 1:
        return
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "n_inner", "vocab_size")
    sizes = {name: value for name in names if isinstance(value := getattr(config, name, None), int)}
    failing = [f"{name}={value}" for name, value in sizes.items() if value % tensor]
    if not failing:
        return
    remedy = f"use {one_of(divisors(gcd(*sizes.values())))}"
    vocabulary = sizes["vocab_size"]
    if recipe.model.config is not None and failing == [f"vocab_size={vocabulary}"]:
        remedy += f", or model.config.vocab_size={-(-vocabulary // tensor) * tensor} (spare ids do no harm)"
    named = " and ".join(filter(None, (", ".join(failing[:-1]), failing[-1])))
    constraint = f"does not divide {named} of {model}"
    yield FieldError("parallel.tensor", tensor, constraint, remedy)


def _expert_errors(recipe: Recipe, config: PretrainedConfig) -> Iterator[UserError]:
    from cuboid.trainer.model_config import num_experts

    expert, count, family = recipe.parallel.expert, num_experts(config), config.model_type
    if not count:
        if expert > 1:
            yield FieldError("parallel.expert", expert, f"has nothing to divide: {family} has no experts", "use 1")
        if recipe.moe is not None:
            yield FieldError("moe", "{...}", f"has nothing to balance: {family} has no experts", "use null")
        return
    ranks = recipe.layout.data * recipe.parallel.tensor
    for number, words in ((ranks, f"data x tensor = {ranks}"), (count, f"the {count} experts of this {family}")):
        if number % expert:
            remedy = f"use {one_of(divisors(gcd(count, ranks)))}"
            yield FieldError("parallel.expert", expert, f"does not divide {words}", remedy)
    if recipe.parallel.engine == "deepspeed" and recipe.parallel.tensor > 1:
        constraint = f"sums over data alone, and each tensor rank has tokens of its own for the experts of {family}"
        yield FieldError("parallel.engine", "deepspeed", constraint, "use native, or parallel.tensor=1")
    if recipe.parallel.tensor > 1 and not recipe.parallel.sequence:
        constraint = "gives all tensor ranks the same tokens, and each would send them to the experts"
        yield FieldError("parallel.sequence", "false", constraint, "use true, or parallel.tensor=1")


def _stage_errors(recipe: Recipe, config: PretrainedConfig) -> Iterator[UserError]:
    layers, pipeline, virtual = config.num_hidden_layers, recipe.parallel.pipeline, virtual_stages(recipe)
    split = recipe.parallel.layers
    if split is not None and (len(split) != pipeline * virtual or sum(split) != layers):
        constraint = f"lays {sum(split)} layers on {len(split)} stages, but there are {layers} and {pipeline * virtual}"
        remedy = f"give {pipeline * virtual} numbers whose sum is {layers}, or null"
        yield FieldError("parallel.layers", list(split), constraint, remedy)
    if pipeline * virtual <= layers:
        return
    made = (
        f"with {virtual} stages a rank makes {pipeline * virtual} stages" if virtual > 1 else f"makes {pipeline} stages"
    )
    remedy = f"use at most {layers // virtual}" if layers >= virtual else "use schedule 1f1b"
    yield FieldError("parallel.pipeline", pipeline, f"{made}, more than num_hidden_layers={layers}", remedy)


def _model_errors(recipe: Recipe, config: PretrainedConfig) -> Iterator[UserError]:
    length, longest = recipe.data.sequence_length, getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest:
        more = ", or a larger model.config.max_position_embeddings" if recipe.model.config is not None else ""
        constraint = f"is longer than the model's max_position_embeddings={longest}"
        yield FieldError("data.sequence_length", length, constraint, f"use at most {longest}{more}")
    from cuboid.trainer.families import check_family
    from cuboid.trainer.model import draw_blueprint, prunable, tensor_plan

    try:
        errors, blueprint = _attempt(lambda: draw_blueprint(config, attention=recipe.model.attention))
    except (ValueError, ImportError) as error:  # its own words for an attention kernel or a value it cannot take
        yield UserError(f"model: transformers cannot build this {config.model_type}: {error}")
        return
    yield from errors
    if blueprint is not None:
        yield from _attempt(lambda: check_family(config))[0]
        if recipe.prune is not None:
            found = prunable(blueprint, recipe.prune.modules)
            yield from prunable_errors(recipe, config, found, prunable(blueprint, None))
            yield from structure_errors(recipe, blueprint)
        yield from target_errors(recipe, blueprint)
        plan_errors, _ = _attempt(lambda: tensor_plan(blueprint) if recipe.parallel.tensor > 1 else {})
        yield from plan_errors or group_errors(recipe, blueprint)
        if recipe.parallel.tensor > 1 and not recipe.parallel.sequence and blueprint.drops_hidden_states:
            constraint = "lets each tensor rank drop other elements of the hidden states that they share"
            yield FieldError("parallel.sequence", "false", constraint, "use true, or a config without dropout")


def _teacher_errors(recipe: Recipe, student: PretrainedConfig) -> Iterator[UserError]:
    """The teacher stands on the same mesh and reads the same sequences."""
    if recipe.distill is None:
        return
    errors, config = _other_model(teacher_recipe(recipe), runs=recipe.distill.cache is None)
    if config is not None:
        yield from teacher_errors(recipe, student, config)
    yield from as_of("distill.teacher", recipe.distill.teacher, errors)
    if not errors and not runs_elsewhere(recipe.launch):
        yield from cache_errors(recipe)


def _reference_errors(recipe: Recipe, policy: PretrainedConfig) -> Iterator[UserError]:
    """So does the reference of preference tuning, where it is a model of its own."""
    if recipe.preference is None:
        return
    config: PretrainedConfig | None = policy
    if (folder := own_reference(recipe)) is not None:
        errors, config = _other_model(reference_recipe(recipe))
        yield from as_of("preference.reference", folder, errors)
    if config is not None:
        yield from reference_errors(recipe, policy, config)


def _other_model(own: Recipe, *, runs: bool = True) -> tuple[list[UserError], PretrainedConfig | None]:
    """What is wrong with a second model on this mesh, by its own recipe; its config, where there is one. ``runs``: it
    does compute here."""
    errors, config = _attempt(lambda: _config(own))
    if config is not None and runs:
        checks = _tensor_errors, _expert_errors, _stage_errors, _model_errors
        errors += [error for check in checks for error in check(own, config)]
    return errors, config


def _track_errors(recipe: Recipe) -> list[UserError]:
    from cuboid.trainer.track import choose_tracker

    return _attempt(lambda: choose_tracker(recipe.track))[0]


def _attempt(action: Callable[[], _Result]) -> tuple[list[UserError], _Result | None]:
    """The errors of an action that raises them, and else its result."""
    try:
        return [], action()
    except UserErrors as error:
        return list(error.errors), None
    except UserError as error:
        return [error], None
