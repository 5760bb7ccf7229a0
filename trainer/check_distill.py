"""The teacher of a distillation: what is trained beside it, and what it cannot be, in words. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cuboid.parallel.errors import FieldError, UserError
from cuboid.trainer.cache import Facts, facts_of
from cuboid.trainer.check_layer_terms import layer_errors
from cuboid.trainer.recipe import ModelSettings, Recipe

if TYPE_CHECKING:
    from cuboid.trainer.model_config import PretrainedConfig


CACHE_FORMAT = 1
REWRITE = "write it anew: cuboid teach RECIPE"


def teacher_recipe(recipe: Recipe) -> Recipe:
    """The recipe by which a teacher's stages are built: another model on the student's mesh, of which nothing is
    trained."""
    assert recipe.distill is not None
    parallel = {
        "layers": None,
        "engine": "native",
        "zero_stage": None,
        "offload": None,
        "offload_path": None,
        "expert": 1,
    }
    # it reads the student's tokens
    own = recipe.model.pretrained or "bytes" if recipe.data.tokenizer == "auto" else recipe.data.tokenizer
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"tokenizer": own}),
            "model": ModelSettings(pretrained=recipe.distill.teacher, attention=recipe.model.attention),
            "parallel": recipe.parallel.model_copy(update=parallel | {"activation_checkpointing": "none"}),
            "moe": None,
            "distill": None,
            "lora": None,
            "prune": None,
            "quantize": None,
        }
    )


def teacher_errors(recipe: Recipe, student: PretrainedConfig, teacher: PretrainedConfig) -> Iterator[FieldError]:
    """Every way in which the two models do not go together."""
    assert recipe.distill is not None
    name = recipe.distill.teacher
    if teacher.vocab_size != student.vocab_size:
        constraint = f"has vocab_size={teacher.vocab_size}, and the model that is trained {student.vocab_size}"
        yield FieldError("distill.teacher", name, constraint, "use a teacher with the same vocabulary")
    yield from layer_errors(recipe, student, teacher)
    top_k, vocabulary = recipe.distill.top_k, student.vocab_size
    if top_k is not None and top_k >= vocabulary:
        constraint = f"leaves none of the {vocabulary} tokens over"
        yield FieldError("distill.top_k", top_k, constraint, f"use at most {vocabulary - 1}, or null for all")


def cache_errors(recipe: Recipe) -> Iterator[FieldError]:
    """In what the predictions in `distill.cache` are not those that the recipe asks for."""
    settings = recipe.distill
    if settings is None or settings.cache is None:
        return
    if settings.top_k is None:
        constraint = "holds the teacher's likeliest tokens, and distill.top_k=null asks for all"
        yield FieldError("distill.cache", settings.cache, constraint, "give distill.top_k, or no cache")
        return
    facts = facts_of(Path(settings.cache).expanduser())
    if facts is None or facts.get("format") != CACHE_FORMAT or not _is_consistent(facts):
        remedy = "write them first: cuboid teach RECIPE; or use null"
        yield FieldError("distill.cache", settings.cache, "holds no predictions of a teacher", remedy)
        return
    from cuboid.trainer.model import local_folder
    from cuboid.trainer.weights import fingerprint

    asked = {"temperature": settings.temperature, "top_k": settings.top_k}
    wrong = [f"distill.{name}={facts[name]}" for name, value in asked.items() if facts[name] != value]
    if facts["sequence_length"] != recipe.data.sequence_length:
        wrong.append(f"data.sequence_length={facts['sequence_length']}")
    if facts["teacher"] != fingerprint(local_folder(settings.teacher)):
        wrong.append("a distill.teacher with other weights")
    if wrong:
        constraint = f"was written with {' and '.join(wrong)}"
        yield FieldError("distill.cache", settings.cache, constraint, f"use the same, or {REWRITE}")


def _is_consistent(facts: Facts) -> bool:
    """Whether the files have the sizes that follow from what the facts say of them."""
    if not facts.keys() >= {"temperature", "teacher", "data", "samples", "sequence_length", "top_k"}:
        return False
    samples, length, top_k = (facts[name] for name in ("samples", "sequence_length", "top_k"))
    if not all(type(number) is int and number > 0 for number in (samples, length, top_k)):
        return False
    row = {"keys.bin": 8, "rows.bin": 8, "values.bin": 4 * length * (top_k + 1), "ids.bin": 4 * length * top_k}
    return facts["bytes"] == {name: samples * size for name, size in row.items()}


def teach_errors(recipe: Recipe) -> Iterator[FieldError]:
    """Why a teacher's predictions cannot be written into `distill.cache`, whatever the teacher."""
    settings = recipe.distill
    if settings is None:
        yield FieldError("distill", "null", "names no teacher", "give distill.teacher, distill.top_k and distill.cache")
        return
    folder = None if settings.cache is None else Path(settings.cache).expanduser()
    if folder is None:
        yield FieldError("distill.cache", "null", "names no folder to write", "give a new folder")
    elif folder.exists() and facts_of(folder) is None:  # it would be replaced
        constraint = "is there, and is not what cuboid teach has written"
        yield FieldError("distill.cache", settings.cache, constraint, "give a new folder")
    if settings.top_k is None:
        constraint = "would write the whole vocabulary of each token"
        yield FieldError("distill.top_k", "null", constraint, "give a number, such as 64")


def as_of(field: str, name: str, errors: Iterable[UserError]) -> Iterator[UserError]:
    """Errors of the own recipe of another model, which ``field`` calls ``name``, in the fields of the user's."""
    for error in errors:
        if isinstance(error, FieldError) and error.field.startswith("model."):
            yield FieldError(field, name, error.constraint, error.remedy)
        elif isinstance(error, FieldError):
            yield FieldError(error.field, error.value, f"{error.constraint} ({field}={name})", error.remedy)
        else:
            yield UserError(f"{field}={name}: {error}")
