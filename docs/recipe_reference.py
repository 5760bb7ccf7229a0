"""Prints docs/recipe.md from the recipe's schema: `make docs` writes it, a test checks that it is current."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from cuboid.trainer.recipe import Recipe

Schema = Mapping[str, Any]

HEAD = """\
# The recipe

<!-- Written by `make docs` from the schema in trainer/recipe.py; edit that instead. -->

One YAML file says what a run trains. The schema is closed: an unknown key is an error that names the nearest known
one, and all errors come at once, with file and line, before any process starts. Any field is overridden on the command
line, as in `parallel.tensor=4`; the value is a YAML 1.2 scalar or flow mapping, and a mapping replaces the whole value.
`cuboid schema` prints the same as JSON Schema, for editors.

"No other yet" marks a key whose other values belong to later work and are refused today.
"""


def reference() -> str:
    schema = Recipe.model_json_schema()
    return "\n".join([HEAD, *_tables("At the top", "", schema, schema["$defs"])])


def _tables(title: str, path: str, section: Schema, defined: Mapping[str, Schema]) -> Iterator[str]:
    """The table of a section's own keys, and those of the sections in it."""
    inner = {key: name for key, field in section["properties"].items() if (name := _section(field))}
    own = {key: field for key, field in section["properties"].items() if key not in inner}
    yield from _table(title, section["description"], own)
    for key, name in inner.items():
        words = section["properties"][key].get("description")
        described = {**defined[name], "description": " ".join(filter(None, (defined[name]["description"], words)))}
        yield from _tables(f"`{path}{key}`", f"{path}{key}.", described, defined)


def _section(field: Schema) -> str | None:
    """What a part of the recipe is called in the schema, also where it may be null instead."""
    for option in (field, *field.get("anyOf", ())):
        if "$ref" in option:
            return option["$ref"].rpartition("/")[2]
    return None


def _table(title: str, description: str, fields: Mapping[str, Schema]) -> Iterator[str]:
    yield f"## {title}\n{description}\n"
    yield "| key | value | default | meaning |\n|---|---|---|---|"
    for key, field in fields.items():
        default = f"`{_yaml(field['default'])}`" if "default" in field else "needed"
        meaning = field["description"]
        yield f"| `{key}` | {_values(field)} | {default} | {' '.join(meaning.split())} |"
    yield ""


def _values(field: Schema) -> str:
    """What may stand there, in words."""
    if "anyOf" in field:
        return " or ".join(_values(option) for option in field["anyOf"])
    if "const" in field:
        return f"`{_yaml(field['const'])}`"
    if field.get("enum") == [field.get("default")]:
        return f"`{_yaml(field['default'])}`; no other yet"
    if "enum" in field:
        return ", ".join(f"`{_yaml(value)}`" for value in field["enum"])
    if field["type"] == "array":
        items = field.get("prefixItems")
        return f"{len(items)} numbers" if items else f"list of {_values(field['items'])}"
    words = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true`, `false`"}
    return words.get(field["type"], {"null": "`null`", "object": "mapping"}.get(field["type"], "")) + _bounds(field)


def _bounds(field: Schema) -> str:
    signs = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    return "".join(f" {word} {_yaml(field[key])}" for key, word in signs.items() if key in field)


def _yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    print(reference(), end="")
