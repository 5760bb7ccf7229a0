"""Rows of `chat` and `instruct` data to examples: which columns, what they must hold, what is predicted.

Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cuboid.parallel.errors import FieldError, UserError
from cuboid.trainer.chat_template import CHATML, ChatTemplate, open_template
from cuboid.trainer.corpus import Example, Form, Row, text_form
from cuboid.trainer.recipe import DataSettings
from cuboid.trainer.tokenizer import Tokenizer


def form_of(settings: DataSettings, tokenizer: Tokenizer) -> Form:
    """What the recipe's `data.kind` makes of a row.

    Raises:
        FieldError: there is no chat template, or none that works.
    """
    if settings.kind == "text":
        return text_form(settings.text_column)
    template = open_template(settings.chat_template, tokenizer)
    columns = settings.columns
    if settings.kind == "instruct":
        optional = tuple(filter(None, (columns.input, columns.system)))
        names = [columns.prompt, columns.response, columns.input, columns.system]
        key = ["instruct", template and template.identity, *names]
        required = (columns.prompt, columns.response)
        return Form(key, (*required, *optional), (), "data.columns", lambda row: _instruct(row, settings, template))
    if template is None:
        constraint = "finds no chat template in the tokenizer, which data.kind=chat needs"
        remedy = f"use {CHATML}, a file with a Jinja template, or the tokenizer of a chat model"
        raise FieldError("data.chat_template", settings.chat_template, constraint, remedy)
    key = ["chat", template.identity, columns.messages, columns.tools]
    return Form(key, (columns.messages,), (columns.tools,), "data.columns", lambda row: _chat(row, settings, template))


def _chat(row: Row, settings: DataSettings, template: ChatTemplate) -> Example:
    name, columns = settings.columns.messages, settings.columns
    given = row[name]
    if not isinstance(given, list) or not given:
        raise UserError(f"column {name} holds {_words(given)}, not a list of messages; set data.columns.messages")
    messages = [_message(message, f"message {number} of {name}") for number, message in enumerate(given, start=1)]
    return template.example(messages, _tools(row.get(columns.tools), columns.tools))


def _message(message: object, place: str) -> dict[str, Any]:
    """Checked, and without the nulls that tables put where another row has a value."""
    if not isinstance(message, dict):
        raise UserError(f"{place} is {_words(message)}, not a mapping with role and content")
    given = {key: value for key, value in message.items() if value is not None}
    if not isinstance(given.get("role"), str):
        raise UserError(f"{place} has no role (it has: {', '.join(given) or 'nothing'})")
    if not isinstance(given.setdefault("content", ""), str):
        raise UserError(f"{place}: content is {_words(given['content'])}, not text")
    if not given["content"] and not given.get("tool_calls") and given["role"] == "assistant":
        raise UserError(f"{place}: the assistant says nothing")
    return given


def _tools(value: object, name: str) -> list[Mapping[str, Any]] | None:
    """A list of schemas, or the same as JSON in a text, as tables keep them."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"column {name} is not JSON ({error})") from error
    if value is None or (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        return value
    raise UserError(f"column {name} holds {_words(value)}, not a list of tools; set data.columns.tools")


def _instruct(row: Row, settings: DataSettings, template: ChatTemplate | None) -> Example:
    """Through the chat template; without one, the texts with an empty line between them, and the end token."""
    columns = settings.columns
    system, prompt, extra = (_text(row, name) for name in (columns.system, columns.prompt, columns.input))
    response = _text(row, columns.response)
    for name, value in ((columns.prompt, prompt), (columns.response, response)):
        if not value:
            raise UserError(f"column {name} is empty")
    question = f"{prompt}\n\n{extra}" if extra else prompt
    if template is None:
        before = "".join(f"{part}\n\n" for part in (system, question) if part)
        text = before + response
        return Example(text, ((len(before), len(text)),), ends=True)
    said = [{"role": "system", "content": system}] if system else []
    return template.example([*said, {"role": "user", "content": question}, {"role": "assistant", "content": response}])


def _text(row: Row, name: str | None) -> str:
    value = row[name] if name else None
    if value is not None and not isinstance(value, str):
        raise UserError(f"column {name} holds {_words(value)}, not text; set data.columns")
    return value or ""


def _words(value: object) -> str:
    if value is None:
        return "null"
    return "an empty list" if value == [] else type(value).__name__
