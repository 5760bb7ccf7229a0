"""What of `data` cannot be read, in words. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from cuboid.parallel.errors import FieldError, UserError, one_of
from cuboid.trainer.conversations import form_of
from cuboid.trainer.corpus import find_corpus
from cuboid.trainer.recipe import MIXTURE, ColumnSettings, DataSettings, Recipe
from cuboid.trainer.recipe_errors import shown
from cuboid.trainer.tokenizer import open_tokenizer

_BELONGS = {
    "text": ("text_column", "cross_documents"),
    "chat": ("chat_template", "truncation", "columns.messages", "columns.tools"),
    "instruct": (
        "chat_template",
        "truncation",
        *(f"columns.{name}" for name in ("prompt", "response", "input", "system")),
    ),
    "preference": ("chat_template", "truncation", *(f"columns.{name}" for name in ("prompt", "chosen", "rejected"))),
}
"""Fields that mean something for some kinds only."""


def data_errors(recipe: Recipe, vocab_size: int | None) -> Iterator[UserError]:
    """Every field of `data` that cannot be right, with the values that can.

    Args:
        vocab_size: the model's; None where there is no model, and tokenizer and template are not looked at.
    """
    data = recipe.data
    if recipe.train.eval_first and not recipe.train.eval_every:
        remedy = "use train.eval_every=1 or more, or false"
        yield FieldError("train.eval_first", "true", "needs train.eval_every", remedy)
    if recipe.train.eval_every and data.eval_path is None:
        constraint = "has nothing to evaluate on"
        yield FieldError("train.eval_every", recipe.train.eval_every, constraint, "give data.eval_path, or use 0")
    yield from _kind_errors(data)
    yield from _weight_errors(data)
    form, errors = None, []
    if vocab_size is not None:
        try:
            pretrained = recipe.model.pretrained
            form = form_of(data, open_tokenizer(data.tokenizer, pretrained=pretrained, vocab_size=vocab_size))
        except UserError as error:
            errors.append(error)
    for field, path, split in (("path", data.path, data.split), ("eval_path", data.eval_path, data.eval_split)):
        if path is None:
            continue
        try:
            find_corpus(path, split=split, subset=data.subset, form=form)
        except FieldError as error:
            yield FieldError(f"data.{field}", error.value, error.constraint, error.remedy)
    yield from errors


def _kind_errors(data: DataSettings) -> Iterator[FieldError]:
    """Fields that were set and would do nothing."""
    for name in dict.fromkeys(field for fields in _BELONGS.values() for field in fields):
        section, _, key = name.rpartition(".")
        given = getattr(data.columns if section else data, key)
        default = (ColumnSettings if section else DataSettings).model_fields[key].default
        if name not in _BELONGS[data.kind] and given != default:
            kinds = one_of([kind for kind, fields in _BELONGS.items() if name in fields])
            remedy = f"use {shown(default)}, or data.kind={kinds}"
            yield FieldError(f"data.{name}", shown(given), f"means nothing for data.kind={data.kind}", remedy)


def _weight_errors(data: DataSettings) -> Iterator[FieldError]:
    if data.weights is None:
        return
    entries = 1 if isinstance(data.path, str) else len(data.path)
    given = shown(list(data.weights))
    if isinstance(data.path, str) or len(data.weights) != entries:
        constraint = f"gives {len(data.weights)} for {entries} of data.path"
        yield FieldError("data.weights", given, constraint, "give data.path as a list, and a weight for each entry")
    elif min(data.weights) * MIXTURE < sum(data.weights):
        constraint = f"gives an entry of data.path less than 1 of {MIXTURE} sequences"
        remedy = f"use at least {sum(data.weights) / MIXTURE:.2g}, or leave the entry out"
        yield FieldError("data.weights", given, constraint, remedy)
