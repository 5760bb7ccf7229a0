"""Rows of `chat`, `instruct` and `preference` data to examples: which columns, what they must hold, what is predicted.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cuboid.parallel.errors import FieldError, UserError
from cuboid.trainer.chat_template import CHATML, ChatTemplate, open_template
from cuboid.trainer.corpus import Example, Form, Pair, Row, text_form
from cuboid.trainer.foreign import parse_json
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
    if settings.kind == "preference":
        key = ["preference", template and template.identity, columns.prompt, columns.chosen, columns.rejected]
        answers = (columns.chosen, columns.rejected)
        return Form(key, answers, (columns.prompt,), "data.columns", lambda row: _preference(row, settings, template))
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
    return template.example(_messages(given, name), _tools(row.get(columns.tools), columns.tools))


def _messages(given: Sequence[object], name: str) -> list[dict[str, Any]]:
    return [_message(message, f"message {number} of {name}") for number, message in enumerate(given, start=1)]


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
            value = parse_json(value.encode())
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
        return _plain((system, question), response)
    said = [{"role": "system", "content": system}] if system else []
    return template.example([*said, {"role": "user", "content": question}, {"role": "assistant", "content": response}])


def _plain(before: Sequence[str], answer: str) -> Example:
    start = "".join(f"{part}\n\n" for part in before if part)
    return Example(start + answer, ((len(start), len(start + answer)),), ends=True)


def _preference(row: Row, settings: DataSettings, template: ChatTemplate | None) -> Pair:
    """Texts behind the prompt, as `_instruct` puts them; or conversations, whose prompt is a column of its own or what
    both begin with: TRL's forms."""
    columns = settings.columns
    names, given = (columns.chosen, columns.rejected), (row[columns.chosen], row[columns.rejected])
    prompt = row.get(columns.prompt)
    for name, answer in zip(names, given, strict=True):
        if not (isinstance(answer, str | list) and answer) or type(answer) is not type(given[0]):
            both = "a text or a list of messages, the same as the other answer"
            raise UserError(f"column {name} holds {_words(answer)}, not {both}; set data.columns")
    if given[0] == given[1]:
        raise UserError(f"columns {columns.chosen} and {columns.rejected} are the same: nothing is preferred")
    if isinstance(given[0], str):
        question = _text(row, columns.prompt) if columns.prompt in row else ""
        if not question:
            raise UserError(f"column {columns.prompt} is absent or empty, which answers that are texts need")
        if template is None:
            return Pair(*(_plain((question,), answer) for answer in given))
        asked: Sequence[dict[str, Any]] = [{"role": "user", "content": question}]
        return Pair(*(template.answer(asked, [{"role": "assistant", "content": answer}]) for answer in given))
    if template is None:
        raise UserError(f"holds conversations, and there is no chat template; set data.chat_template, such as {CHATML}")
    said = [_messages(answer, name) for answer, name in zip(given, names, strict=True)]
    asked, said = _asked(prompt, said, columns.prompt)
    for name, answer in zip(names, said, strict=True):
        if not answer or answer[0]["role"] != "assistant":
            found = f"begins with {answer[0]['role']}" if answer else "is empty"
            raise UserError(f"the answer in column {name} {found}, and not with the assistant, behind the prompt")
    return Pair(*(template.answer(asked, answer) for answer in said))


def _asked(
    prompt: object, said: Sequence[list[dict[str, Any]]], name: str
) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """(the prompt, both answers): as given, or parted where two conversations begin to differ."""
    if isinstance(prompt, list):
        return _messages(prompt, name), list(said)
    shared = 0
    while shared < min(map(len, said)) and said[0][shared] == said[1][shared]:
        shared += 1
    if shared:
        return said[0][:shared], [answer[shared:] for answer in said]
    if isinstance(prompt, str) and prompt:
        return [{"role": "user", "content": prompt}], list(said)
    raise UserError(f"column {name} holds {_words(prompt)}, and the answers share no beginning: there is no prompt")


def _text(row: Row, name: str | None) -> str:
    value = row[name] if name else None
    if value is not None and not isinstance(value, str):
        raise UserError(f"column {name} holds {_words(value)}, not text; set data.columns")
    return value or ""


def _words(value: object) -> str:
    if value is None:
        return "null"
    return "an empty list" if value == [] else type(value).__name__
