"""The teacher of a distillation: what is trained beside it, and what it cannot be, in words. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from cuboid.parallel.errors import FieldError, UserError
from cuboid.trainer.recipe import ModelSettings, Recipe

if TYPE_CHECKING:
    from cuboid.trainer.model_config import PretrainedConfig


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
    return recipe.model_copy(
        update={
            "model": ModelSettings(pretrained=recipe.distill.teacher, attention=recipe.model.attention),
            "parallel": recipe.parallel.model_copy(update=parallel | {"activation_checkpointing": "none"}),
            "moe": None,
            "distill": None,
            "lora": None,
            "prune": None,
        }
    )


def teacher_errors(recipe: Recipe, student: PretrainedConfig, teacher: PretrainedConfig) -> Iterator[FieldError]:
    """Every way in which the two models do not go together."""
    from cuboid.trainer.model_config import num_experts

    assert recipe.distill is not None
    name = recipe.distill.teacher
    if teacher.vocab_size != student.vocab_size:
        constraint = f"has vocab_size={teacher.vocab_size}, and the model that is trained {student.vocab_size}"
        yield FieldError("distill.teacher", name, constraint, "use a teacher with the same vocabulary")
    if num_experts(teacher):
        constraint = f"is a {teacher.model_type} with experts, which teach nobody yet"
        yield FieldError("distill.teacher", name, constraint, "use a dense teacher")


def as_of(field: str, name: str, errors: Iterable[UserError]) -> Iterator[UserError]:
    """Errors of the own recipe of another model, which ``field`` calls ``name``, in the fields of the user's."""
    for error in errors:
        if isinstance(error, FieldError) and error.field.startswith("model."):
            yield FieldError(field, name, error.constraint, error.remedy)
        elif isinstance(error, FieldError):
            yield FieldError(error.field, error.value, f"{error.constraint} ({field}={name})", error.remedy)
        else:
            yield UserError(f"{field}={name}: {error}")
