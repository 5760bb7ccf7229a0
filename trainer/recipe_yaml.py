"""The YAML door: plain values, the place of each, and what is refused, in words. Imports no torch.

YAML 1.2 core scalars (https://yaml.org/spec/1.2.2/#103-core-schema): ``1e-6`` is a number; ``no``, ``on`` and dates are
text. The document is only composed into nodes, never constructed: no tag can name a Python object. Anchors and aliases
are refused, and so a small file cannot unfold into a large one; a recipe of more values than any has is refused before
they are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from cuboid.parallel.errors import UserError
from cuboid.trainer.recipe_errors import Path, shown

MAX_DEPTH = 32
MAX_DIGITS = 400
MAX_VALUES = 5000
MAX_KEY_CHARACTERS = 200

_TAG = "tag:yaml.org,2002:"
_PATTERNS = {
    "null": r"null|Null|NULL|~|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_FIRSTS = {"null": ("~", "n", "N", ""), "bool": "tTfF", "int": "-+0123456789", "float": "-+.0123456789"}
"""Characters with which a scalar of a kind can begin; PyYAML looks its patterns up by them ("": an empty scalar)."""


class Mark(NamedTuple):
    """Where a field stands; sorts by line."""

    order: int
    text: str


@dataclass
class Parsed:
    """Plain values, the place of each field, and what was refused below which field."""

    data: Any = None
    marks: dict[Path, Mark] = field(default_factory=dict)
    errors: list[tuple[Path, UserError]] = field(default_factory=list)


def parse_file(text: str, where: str) -> Parsed:
    """The mapping that a whole file holds; raises UserError, with the line, where it is no YAML of ours."""
    root = _compose(text, where)
    if not isinstance(root, yaml.MappingNode):
        what = "is empty" if root is None else "is not a mapping of keys to values"
        raise UserError(f"{where}: {what}; a recipe begins like `name: ...`")
    reader = _Reader(where, None)
    reader.parsed.data = reader.plain(root, ())
    return reader.parsed


def parse_value(text: str, path: Path, mark: Mark) -> Parsed:
    """A scalar or flow collection for the field ``path``, all of it marked with ``mark``; raises UserError."""
    node = _compose(text, "")
    if not isinstance(node, yaml.ScalarNode | None) and not node.flow_style:
        raise UserError("a value is a scalar, [a list] or {key: value}")
    reader = _Reader("", mark)
    reader.parsed.data = None if node is None else reader.plain(node, path)
    return reader.parsed


def dump(data: Mapping[str, Any]) -> str:
    """YAML that `parse_file` reads back to equal values."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for kind, firsts in _FIRSTS.items():
        for first in firsts:
            table.setdefault(first, []).append((_TAG + kind, re.compile(f"(?:{_PATTERNS[kind]})\\Z")))
    return table


class _Loader(yaml.SafeLoader):
    """Composes nodes; refuses anchors, aliases, deep nesting and too many values."""

    yaml_implicit_resolvers = _resolvers()
    depth = values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            words = "anchors and aliases (& and *) are refused; write it out, or quote the text"
            raise yaml.MarkedYAMLError(problem=words, problem_mark=event.start_mark)
        if self.depth >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=event.start_mark)
        self.values += 1
        if self.values > MAX_VALUES:
            words = f"more than {MAX_VALUES} keys and values, which no recipe has"
            raise yaml.MarkedYAMLError(problem=words, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what this door would read as something else than text."""

    yaml_implicit_resolvers = _resolvers()


def _compose(text: str, where: str) -> Any:
    try:
        return _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark and where else ""
        raise UserError(f"{where}{line}: {error.problem or error.context}".removeprefix(": ")) from error
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {str(error).splitlines()[0]}".removeprefix(": ")) from error


class _Reader:
    """Turns nodes into plain values; goes on after an error, so that all are told at once."""

    def __init__(self, where: str, mark: Mark | None) -> None:
        self.where, self.mark, self.parsed = where, mark, Parsed()

    def plain(self, node: yaml.Node, path: Path) -> Any:
        try:
            if isinstance(node, yaml.ScalarNode):
                return _scalar(node)
            if node.tag not in (_TAG + "map", _TAG + "seq"):
                raise UserError(_refused(node.tag))
        except UserError as error:
            self._refuse(path, node, error)
            return None
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, (*path, str(place))) for place, item in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)
        return self._mapping(node, path)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(path, key_node, UserError("a key that is itself a mapping or a list is refused"))
                continue
            if len(key_node.value) > MAX_KEY_CHARACTERS:
                self._refuse(path, key_node, UserError(f"the key {shown(str(key_node.value))} is too long"))
                continue
            inner = (*path, str(key_node.value))
            if inner[-1] in data:
                words = f"{'.'.join(inner)} stands twice, first at {self.parsed.marks[inner].text}"
                self._refuse(inner, key_node, UserError(words))
                continue
            self.parsed.marks[inner] = self._mark(key_node)
            data[inner[-1]] = self.plain(value_node, inner)
        return data

    def _refuse(self, path: Path, node: yaml.Node, error: UserError) -> None:
        self.parsed.marks[path] = self._mark(node)
        self.parsed.errors.append((path, error))

    def _mark(self, node: yaml.Node) -> Mark:
        line = node.start_mark.line + 1
        return self.mark or Mark(line, f"{self.where}:{line}")


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    kind, text = node.tag.removeprefix(_TAG), str(node.value)
    if kind == "str":
        return text
    if kind not in _PATTERNS:
        raise UserError(_refused(node.tag))
    if not re.fullmatch(_PATTERNS[kind], text) or len(text) > MAX_DIGITS:
        raise UserError(f"{shown(text)} cannot be read as {kind}")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))


def _refused(tag: str) -> str:
    return f"the tag {shown(tag.replace(_TAG, '!!'))} is refused; a recipe is plain values"
