"""What preference tuning cannot do, and what its reference cannot be, in words. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cuboid.parallel.errors import FieldError
from cuboid.trainer.adapter_folder import settings_of
from cuboid.trainer.recipe import ModelSettings, Recipe
from cuboid.trainer.recipe_preference import ADAPTER

if TYPE_CHECKING:
    from cuboid.trainer.model_config import PretrainedConfig

_REFERENCE = "preference.reference"
_BESIDE = ("default", "gaussian")
"""Ways to draw an adapter (lora.init) that leave the weights beneath it as they are."""


def own_reference(recipe: Recipe) -> str | None:
    """The folder or hub id of the reference; None where it is made of the model that is trained."""
    assert recipe.preference is not None
    return None if recipe.preference.reference == ADAPTER else recipe.preference.reference


def reference_recipe(recipe: Recipe) -> Recipe:
    """The recipe by which the stages of a reference of its own are built: on the same mesh, and nothing is trained."""
    parallel: dict[str, Any] = {"engine": "native", "zero_stage": None, "offload": None, "offload_path": None}
    parallel |= {"activation_checkpointing": "none"}
    changes: dict[str, Any] = {"preference": None}
    if (folder := own_reference(recipe)) is not None:
        parallel |= {"layers": None, "expert": 1}
        changes |= {"model": ModelSettings(pretrained=folder, attention=recipe.model.attention)}
        changes |= {"lora": None, "moe": None}
    return recipe.model_copy(update=changes | {"parallel": recipe.parallel.model_copy(update=parallel)})


def preference_errors(recipe: Recipe) -> Iterator[FieldError]:
    """Every field that does not go with preference tuning, whatever the model."""
    kind, settings = recipe.data.kind, recipe.preference
    if settings is None:
        if kind == "preference":
            constraint = "reads pairs of answers, and nothing says how they are compared"
            yield FieldError("data.kind", kind, constraint, "use preference={}, or another kind")
        return
    if kind != "preference":
        constraint = f"needs pairs of answers, and data.kind={kind} has none"
        yield FieldError("preference", "{...}", constraint, "use null, or data.kind=preference")
    if settings.loss == "ipo" and settings.label_smoothing:
        constraint = "means nothing for preference.loss=ipo"
        yield FieldError("preference.label_smoothing", settings.label_smoothing, constraint, "use 0, or loss sigmoid")
    for field, beside in (("distill", recipe.distill), ("prune", recipe.prune), ("quantize", recipe.quantize)):
        if beside is not None:
            yield FieldError(field, "{...}", "is not proven with preference", "use null, or preference=null")
    if settings.reference == ADAPTER:
        yield from _adapter_errors(recipe)


def _adapter_errors(recipe: Recipe) -> Iterator[FieldError]:
    """The model without its adapters must be the one that training begins with."""
    if recipe.lora is None:
        constraint = "is the model without its adapters, and lora is null"
        yield FieldError(_REFERENCE, ADAPTER, constraint, "use null for a copy of the model as it begins, or lora={}")
        return
    try:
        settings = settings_of(recipe.lora)
    except FieldError:  # told by what looks at the adapter
        return
    trained = {"bias": settings.bias != "none", "modules_to_save": bool(settings.modules_to_save)}
    for name in (name for name, is_trained in trained.items() if is_trained):
        constraint = f"trains some of the model itself (lora.{name}), which would stay when the adapters are left out"
        yield FieldError(_REFERENCE, ADAPTER, constraint, f"use null, or leave lora.{name} out")
    if settings.init not in _BESIDE:
        constraint = f"is not the model as it was: lora.init={settings.init} takes the adapters out of its weights"
        yield FieldError(_REFERENCE, ADAPTER, constraint, "use null, or lora.init=default")
    if recipe.moe is not None and recipe.moe.bias_update:
        constraint = "moves the reference's choice of experts too (preference.reference=adapter)"
        yield FieldError("moe.bias_update", recipe.moe.bias_update, constraint, "use 0")
    if recipe.parallel.engine == "deepspeed":
        constraint = "is not proven with parallel.engine=deepspeed"
        yield FieldError(_REFERENCE, ADAPTER, constraint, "use null, or native")


def reference_errors(recipe: Recipe, policy: PretrainedConfig, reference: PretrainedConfig) -> Iterator[FieldError]:
    """Every way in which the trained model and its reference do not go together."""
    from cuboid.trainer.model_config import num_experts

    assert recipe.preference is not None
    name = recipe.preference.reference
    if reference.vocab_size != policy.vocab_size:
        constraint = f"has vocab_size={reference.vocab_size}, and the model that is trained {policy.vocab_size}"
        yield FieldError(_REFERENCE, name, constraint, "use a model with the same vocabulary")
    if name != ADAPTER and num_experts(reference):
        constraint = f"is a {reference.model_type} with experts, of which no second copy is offered yet"
        yield FieldError(_REFERENCE, name or "null", constraint, f"use {ADAPTER} and lora, or a dense model")
