"""What is wrong with a recipe's fields, in words: value, constraint, remedy, nearest known key. Imports no torch."""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from cuboid.parallel.errors import FieldError, UserError, one_of
from cuboid.trainer.recipe import ErrorDetails, FieldInfo, Recipe
from cuboid.trainer.recipe_fields import Offered, Settings, written

Path = tuple[str, ...]
"""A field's place in the recipe: ("parallel", "tensor")."""

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    tuple: "a list",
}
_BOUNDS = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    "finite_number": "finite",
}


def mistakes(details: Sequence[ErrorDetails], data: Mapping[str, Any]) -> list[tuple[Path, UserError]]:
    """One error a field from the schema's findings on ``data``; fields in the order in which they were found."""
    by_path: dict[Path, list[ErrorDetails]] = {}
    for detail in details:
        by_path.setdefault(_path(detail), []).append(detail)
    return [(path, _mistake(path, found, data)) for path, found in by_path.items()]


def nearest(word: str, known: Sequence[str], *, likeness: float = 0.6) -> str | None:
    """The known word that ``word`` was probably meant to be."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=likeness)), None)


def shown(value: object, *, quoted: bool = False) -> str:
    """A value for a message: short, and as YAML spells it; ``quoted`` shows that a text is one."""
    text = json.dumps(value, default=str) if quoted or isinstance(value, dict | list | tuple) else written(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _path(detail: ErrorDetails) -> Path:
    """The field that an error belongs to, without the tags of union members and places in lists."""
    path: list[str] = []
    section: type[Settings] | None = Recipe
    for part in detail["loc"]:
        if section is None:
            break
        path.append(str(part))
        section = _section(section.model_fields.get(str(part)))
    if detail["type"] == "cuboid" and "field" in detail["ctx"]:
        path.append(detail["ctx"]["field"])
    return tuple(path)


def _section(field: FieldInfo | None) -> type[Settings] | None:
    """The part of the recipe that a field is, also where it may be null instead."""
    members = (field.annotation, *get_args(field.annotation)) if field else ()
    return next((member for member in members if isinstance(member, type) and issubclass(member, Settings)), None)


def _mistake(path: Path, found: Sequence[ErrorDetails], data: Mapping[str, Any]) -> UserError:
    name, first = ".".join(path), found[0]
    if first["type"] == "extra_forbidden":
        return UserError(f"{name} is not a key; {_meant(path)}")
    field = _field(path)
    if first["type"] == "missing":
        return UserError(f"{name} is missing; {_expected(field)}")
    if first["type"] == "cuboid":
        words = first["ctx"]
        if _section(field) or "field" in words:
            return UserError(f"{name} {words['constraint']}; {words['remedy']}")
        return FieldError(name, shown(first["input"]), words["constraint"], words["remedy"])
    value = _value(data, path)
    bound = next((detail for detail in found if detail["type"] in _BOUNDS), None)
    if bound:
        item = "has an item that is not" if isinstance(value, list) else "is not"
        return FieldError(name, shown(value), f"{item} {_BOUNDS[bound['type']].format(**bound.get('ctx', {}))}")
    if first["type"] == "string_pattern_mismatch":
        remedy = "use letters, digits, dots, _ and -, at most 100, a letter or digit first"
        return FieldError(name, shown(value), "is not a safe name of a folder", remedy)
    if first["type"] in ("string_too_short", "too_short"):
        return FieldError(name, shown(value, quoted=True), "is empty")
    return _wrong_type(name, value, field)


def _expected(field: FieldInfo | None) -> str:
    """What a missing field is, or the keys that a missing section must have."""
    if section := _section(field):
        return f"it needs {', '.join(name for name, inner in section.model_fields.items() if inner.is_required())}"
    return (field.description if field else None) or "it has no default"


def _wrong_type(name: str, value: object, field: FieldInfo | None) -> FieldError:
    if section := _section(field):
        return FieldError(
            name, shown(value, quoted=True), "is not a mapping", f"its keys: {', '.join(section.model_fields)}"
        )
    assert field is not None, f"{name}: an error at a place that is no field"
    choices = _choices(field)
    if choices and isinstance(value, str):
        guess = nearest(value, choices)
        hint = f"did you mean {guess}? " if guess else ""
        return FieldError(name, shown(value), "is not a choice", f"{hint}use {one_of(choices)}")
    wanted = f"is not {' or '.join(_words(field.annotation))}"
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", value, re.IGNORECASE):
        return FieldError(name, shown(value, quoted=True), wanted, "write it without quotes")
    if isinstance(value, bool | int | float) and "text" in wanted:
        return FieldError(name, shown(value), wanted, "write it in quotes")
    return FieldError(name, shown(value, quoted=True), wanted)


def _choices(field: FieldInfo) -> list[str]:
    """The words that a field takes today; empty where it takes others than words of a fixed set."""
    offered = next((mark for mark in field.metadata if isinstance(mark, Offered)), None)
    values = (
        offered.values if offered else get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    )
    return [value for value in values if isinstance(value, str)]


def _words(annotation: Any) -> Iterator[str]:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _words(member)
    elif origin is Annotated:
        yield from _words(get_args(annotation)[0])
    elif origin is Literal:
        yield from (written(value) for value in get_args(annotation))
    elif annotation is type(None):
        yield "null"
    else:
        yield _WORDS[origin or annotation]


def _meant(path: Path) -> str:
    """'did you mean parallel.tensor?', or the keys that exist there."""
    every = _every_field()
    section, word = path[:-1], path[-1]
    here = [known[-1] for known in every if known[:-1] == section]
    if close := nearest(word, here):
        return f"did you mean {'.'.join((*section, close))}?"
    elsewhere = {known[-1]: ".".join(known) for known in every}
    if close := nearest(word, list(elsewhere), likeness=0.8):
        return f"did you mean {elsewhere[close]}?"
    return f"known keys are {', '.join(here)}"


@cache
def _every_field() -> tuple[Path, ...]:
    return tuple(_fields(Recipe, ()))


def _fields(section: type[Settings], path: Path) -> Iterator[Path]:
    for name, field in section.model_fields.items():
        yield (*path, name)
        if inner := _section(field):
            yield from _fields(inner, (*path, name))


def _field(path: Path) -> FieldInfo | None:
    section: type[Settings] | None = Recipe
    field = None
    for part in path:
        field = section.model_fields.get(part) if section else None
        section = _section(field)
    return field


def _value(data: Any, path: Path) -> Any:
    for part in path:
        data = data[part]
    return data
