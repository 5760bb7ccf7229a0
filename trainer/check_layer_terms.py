"""What of a student's layers cannot be compared with its teacher's, in words. Imports no torch until it looks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import gcd
from typing import TYPE_CHECKING

from cuboid.parallel.errors import FieldError, UserError, one_of
from cuboid.parallel.layout import divisors
from cuboid.trainer.plans import PROJECTIONS
from cuboid.trainer.recipe import Recipe

if TYPE_CHECKING:
    from cuboid.trainer.model_config import PretrainedConfig


def layer_errors(recipe: Recipe, student: PretrainedConfig, teacher: PretrainedConfig) -> Iterator[FieldError]:
    """Of `distill.hidden` and `distill.attention`."""
    settings = recipe.distill
    assert settings is not None
    terms = {"hidden": "hidden states", "attention": "queries, keys and values"}
    for name, outputs in terms.items():
        weight, field = getattr(settings, name), f"distill.{name}"
        if not weight:
            continue
        if settings.cache is not None:
            constraint = f"compares {outputs}, and distill.cache={settings.cache} holds predictions alone"
            yield FieldError(field, weight, constraint, "use 0, or distill.cache=null")
        if recipe.prune is not None and recipe.prune.method == "layers":
            constraint = "compares layers with the teacher's, and prune.method=layers takes some away"
            yield FieldError(field, weight, constraint, "use 0, or another prune.method")
        if student.num_hidden_layers > teacher.num_hidden_layers:
            layers = f"{student.num_hidden_layers} layers with the teacher's {teacher.num_hidden_layers}"
            yield FieldError(field, weight, f"compares {layers}", "use 0, or a teacher with as many")
    if settings.hidden and student.hidden_size != teacher.hidden_size:
        constraint = f"compares hidden_size={student.hidden_size} with the teacher's {teacher.hidden_size}"
        remedy = "use 0, a teacher as wide as the student, or distill.attention"
        yield FieldError("distill.hidden", settings.hidden, constraint, remedy)
    if settings.attention:
        yield from _relation_errors(recipe, student, teacher)


def _relation_errors(recipe: Recipe, student: PretrainedConfig, teacher: PretrainedConfig) -> Iterator[FieldError]:
    settings, tensor = recipe.distill, recipe.parallel.tensor
    assert settings is not None
    layers, heads = settings.relations(student)
    if list(layers) != sorted(set(layers)) or layers[-1] >= student.num_hidden_layers:
        constraint = f"is not a rising list of the model's layers, which are 0 to {student.num_hidden_layers - 1}"
        remedy = "name each once, in order; or use null for the last"
        yield FieldError("distill.attention_layers", list(layers), constraint, remedy)
    widths: dict[str, int] = {}
    for whose, config in (("model that is trained", student), ("teacher", teacher)):
        own = _projections(config, tensor)
        if own is None:
            return  # told where this model is checked
        if not own:
            where = f"in each layer of the {whose} ({config.model_type})" + ", divided by heads" * (tensor > 1)
            constraint = f"finds no q_proj, k_proj and v_proj {where}"
            yield FieldError("distill.attention", settings.attention, constraint, "use 0, or models of other families")
            return
        widths |= {f"{size} features of {name.rpartition('.')[2]} in the {whose}": size for name, size in own.items()}
    failing = [f"does not divide the {words}" for words, size in widths.items() if size % heads]
    failing += [f"is not a multiple of parallel.tensor={tensor}"] * (heads % tensor > 0)
    if failing:
        works = [count for count in divisors(gcd(*widths.values())) if count % tensor == 0]
        value, which = str(heads), ""
        if settings.relation_heads is None:
            value, which = "null", f"takes the model's {heads} key-value heads, and {heads} "
        yield FieldError("distill.relation_heads", value, which + failing[0], f"use {one_of(works)}")


def _projections(config: PretrainedConfig, tensor: int) -> Mapping[str, int] | None:
    """Features of queries, keys and values; empty where not every layer has a linear for each, all alike, of which a
    tensor rank has its own heads; None where the model cannot be built."""
    from cuboid.parallel.tensor import Role
    from cuboid.trainer.model import draw_blueprint, tensor_plan

    try:
        blueprint = draw_blueprint(config)
        plan = tensor_plan(blueprint) if tensor > 1 else {}
    except UserError:
        return None
    stem = f"{blueprint.anatomy.base}.{blueprint.anatomy.layers}"
    if any(plan and plan.get(f"{stem}.*.{name}") is not Role.COLUMN for name in PROJECTIONS):
        return {}
    found = [dict(layer.named_modules()) for layer in blueprint.model.get_submodule(stem).children()]
    widths = [{name: layer[name].out_features for name in PROJECTIONS if name in layer} for layer in found]
    return widths[0] if len(widths[0]) == len(PROJECTIONS) and widths.count(widths[0]) == len(widths) else {}
