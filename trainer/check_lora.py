"""What `lora` cannot train, in words: no such module, one that is tied, what ZeRO 3 divides. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from cuboid.parallel.errors import FieldError, one_of
from cuboid.trainer.adapter_folder import settings_of
from cuboid.trainer.check_adapter_base import base_errors, size_errors
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.recipe_fields import written

if TYPE_CHECKING:
    from cuboid.trainer.model import Blueprint
    from cuboid.trainer.recipe_lora import LoraSettings


def lora_errors(recipe: Recipe, *, runs_here: bool) -> Iterator[FieldError]:
    """Every field that does not go with adapters, whatever the model.

    Args:
        runs_here: ranks start on this machine, so that the package must be there.
    """
    if recipe.lora is None:
        return
    if runs_here and find_spec("peft") is None:
        yield FieldError("lora", "{...}", "needs the package peft", "pip install 'cuboid[lora]', or use null")
    yield from base_errors(recipe)
    if recipe.moe is not None and recipe.moe.experts is not None:
        constraint = "draws a router, which lora leaves frozen: it would never learn whom to choose"
        yield FieldError("moe.experts", recipe.moe.experts, constraint, "use null, or lora=null")


def target_errors(recipe: Recipe, blueprint: Blueprint) -> Iterator[FieldError]:
    """Every name in `lora` that the model has no such module for, with those that it has; and an adapter of another
    model."""
    if recipe.lora is None or find_spec("peft") is None:
        return
    from cuboid.trainer.adapters import misfits

    try:
        settings = settings_of(recipe.lora)
    except FieldError as error:
        yield error
        return
    yield from _engine_errors(settings, recipe)
    errors = [
        *_linear_errors(settings, blueprint),
        *_expert_errors(settings, blueprint),
        *_whole_errors(settings, blueprint),
    ]
    if settings.adapter is None:
        yield from errors
    elif wrong := [f"{error.value} {error.constraint}" for error in errors] or misfits(blueprint, settings):
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        constraint = f"is no adapter of this {blueprint.config.model_type}: {'; '.join(wrong[:3])}{more}"
        yield FieldError("lora.adapter", settings.adapter, constraint, "give the model that it was made of")
    if not errors:
        yield from size_errors(recipe, settings, blueprint)


def _engine_errors(settings: LoraSettings, recipe: Recipe) -> Iterator[FieldError]:
    """DeepSpeed gathers a module's parameters around its own call, and these two are read from outside of it."""
    beside = {"dora": settings.dora, "target_parameters": bool(settings.target_parameters)}
    for field in (field for field, given in beside.items() if given and recipe.parallel.zero_stage == 3):
        constraint = f"divides matrices that lora.{field} reads when they are not gathered"
        yield FieldError("parallel.zero_stage", 3, constraint, "use 1 or 2, or parallel.engine=native")


def _linear_errors(settings: LoraSettings, blueprint: Blueprint) -> Iterator[FieldError]:
    from cuboid.trainer.adapters import linears

    found = linears(blueprint.model, blueprint.anatomy)
    remedy = f"use all-linear, or {one_of(_ends(found))}"
    if settings.targets == () and not settings.target_parameters:
        yield FieldError("lora.targets", "[]", "names nothing", remedy)
    anatomy, family = blueprint.anatomy, blueprint.config.model_type
    for target in () if settings.targets == "all-linear" else settings.targets:
        if target.endswith(settings.modules_to_save):
            constraint = f"gets no adapter beside lora.modules_to_save={target}, which trains it whole"
            yield FieldError("lora.targets", target, constraint, "leave it out of one of them")
        elif any(f".{name}".endswith(f".{target}") for name in found):
            continue
        elif target == anatomy.embedding:
            constraint = f"is the embedding of this {family}, whose adapter no tensor rank divides yet"
            yield FieldError("lora.targets", target, constraint, "train it whole by lora.modules_to_save")
        elif target != anatomy.head:
            yield FieldError("lora.targets", target, f"is no linear in a layer of this {family}", remedy)
        elif anatomy.tied:
            constraint = f"is the tied head of this {family}: merged, it and the embedding would no longer be one"
            yield FieldError("lora.targets", target, constraint, "leave it out")


def _expert_errors(settings: LoraSettings, blueprint: Blueprint) -> Iterator[FieldError]:
    """Fused experts and nothing else: peft would take any parameter whose name ends so for a matrix."""
    anatomy, family = blueprint.anatomy, blueprint.config.model_type
    names = {name: parameter.dim() for name, parameter in blueprint.model.named_parameters()}
    experts = [name for name, dims in names.items() if dims == 3 and f".{anatomy.experts}." in name]
    ends = sorted({f"experts.{name.rpartition('.')[2]}" for name in experts})
    for target in settings.target_parameters or ():
        taken = {name for name in names if f".{name}".endswith(f".{target}")}
        if not taken or not taken <= set(experts):
            constraint = f"is no parameter of fused experts of this {family}"
            remedy = f"use {one_of(ends)}" if ends else "leave it out"
            yield FieldError("lora.target_parameters", target, constraint, remedy)
    for field, value in (("dropout", settings.dropout), ("dora", settings.dora)):
        if settings.target_parameters and value:
            constraint = "is nothing that peft computes beside fused experts (lora.target_parameters)"
            remedy = "use 0" if field == "dropout" else "use false"
            yield FieldError(f"lora.{field}", written(value), constraint, remedy)


def _whole_errors(settings: LoraSettings, blueprint: Blueprint) -> Iterator[FieldError]:
    anatomy, family = blueprint.anatomy, blueprint.config.model_type
    fused = (anatomy.experts, anatomy.router) if anatomy.experts else ()
    leaves = [name for name, module in blueprint.model.named_modules() if module._parameters]
    whole = [name for name in leaves if not name.endswith(fused)]
    tied = {anatomy.head, f"{anatomy.base}.{anatomy.embedding}"} if anatomy.tied else set()
    for wanted in settings.modules_to_save:
        # peft compares the ends of names letter by letter: `norm` is input_layernorm too
        taken = [name for name in whole if name.endswith(wanted)]
        if not taken:
            constraint = f"is no module with weights of its own of this {family}, or one of experts"
            yield FieldError("lora.modules_to_save", wanted, constraint, f"use {one_of(_ends(whole))}")
        elif tied.intersection(taken):
            constraint = f"is tied in this {family}: trained apart, embedding and head would no longer be one"
            yield FieldError("lora.modules_to_save", wanted, constraint, "leave it out")


def _ends(names: Sequence[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})
