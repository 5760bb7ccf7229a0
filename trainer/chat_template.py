"""A conversation as text, and which of its characters an assistant wrote. Imports no torch.

A chat template is data: Jinja that transformers renders in a sandbox, with the result that `apply_chat_template` has.
A sandbox keeps it from files and Python's own objects, and bounds neither its time nor its memory: that is done here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cuboid.parallel.errors import FieldError, UserError
from cuboid.trainer.corpus import Example
from cuboid.trainer.limits import limited
from cuboid.trainer.tokenizer import Tokenizer

AUTO, CHATML = "auto", "chatml"
Message = Mapping[str, Any]

_FIELD = "data.chat_template"
_CHATML_SOURCE = """\
{% if tools %}{{ raise_exception('chatml has no form for tools') }}{% endif %}
{% for message in messages %}
{% if message['tool_calls'] %}{{ raise_exception('chatml has no form for tool_calls') }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
"""Roles and turns as plain words, for tokenizers without a template: the form of ChatML (OpenAI, 2023)."""
_SECONDS, _MEGABYTES = 0.7, 150
"""What a template may need for a question and an answer; for a conversation of the data ten times as much."""
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """Renders conversations and finds the assistant's turns in them."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source, self._special_tokens = source, special_tokens
        self._patience = 1
        content = json.dumps([source, dict(special_tokens)], sort_keys=True)
        self.identity = "sha256:" + hashlib.sha256(content.encode()).hexdigest()
        self._marks = bool(_MARKS.search(source))

    def example(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> Example:
        """The conversation, of which every assistant's turn is predicted up to the token that ends it.

        A turn is what the template adds to the messages before it and the prompt for an answer. This needs a template
        that writes a beginning alike whatever follows, which is checked. One that marks the turns by `{% generation %}`
        is taken at its word.

        Args:
            messages: role and content each, perhaps tool_calls and more that the template knows.
            tools: what the assistant may call, as JSON schemas.

        Raises:
            UserError: the template refuses the conversation, would drop a part of it, or does not begin alike.
        """
        for key, given in (("tools", tools), ("tool_calls", any(message.get("tool_calls") for message in messages))):
            if given and key not in self.source:
                raise UserError(f"holds {key}, which the chat template does not write; set {_FIELD} to one that does")
        if self._marks:
            text, turns = self._render(messages, tools, marks=True)
            return Example(text, tuple(turns), ends=False)
        text, _ = self._render(messages, tools)
        predicted = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._render(messages[:number], tools, prompt=True)
            is_last = number + 1 == len(messages)
            after = text if is_last else self._render(messages[: number + 1], tools)[0]
            if not (text.startswith(after) and after.startswith(before)):
                raise UserError(
                    f"the chat template writes the beginning up to message {number + 1} otherwise when more follows, "
                    f"so that the assistant's words cannot be told apart; set {_FIELD} to a file that marks them "
                    "with {% generation %}"
                )
            turn = _without_gap(after[len(before) :], message["content"])
            predicted.append((len(before), len(before) + len(turn)))
        return Example(text, tuple(predicted), ends=False)

    def answer(self, prompt: Sequence[Message], said: Sequence[Message]) -> Example:
        """The conversation ``prompt`` and what is ``said`` to it, of which the assistant's turns are predicted.

        Raises:
            UserError: as `example`; or the prompt for an answer is not how the conversation begins.
        """
        example = self.example([*prompt, *said])
        before, _ = self._render(prompt, None, prompt=True)
        if not example.text.startswith(before):
            raise UserError(
                "the chat template writes the prompt otherwise when an answer follows, so that the answer cannot be "
                f"told apart; set {_FIELD} to another"
            )
        turns = ((max(start, len(before)), stop) for start, stop in example.predicted)
        return Example(example.text, tuple((start, stop) for start, stop in turns if start < stop), ends=False)

    def tried(self) -> Example:
        """The example of a question and an answer; from then on the template has the patience that data needs.

        Raises:
            UserError: as `example`.
        """
        try:
            return self.example([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}])
        finally:
            self._patience = 10

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        prompt: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """(text, [start, stop) of what the template marks); with ``prompt`` up to where an answer begins."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with limited(seconds=_SECONDS * self._patience, megabytes=_MEGABYTES * self._patience):
                texts, marked = render_jinja_template(
                    [list(messages)],
                    tools=list(tools) if tools else None,
                    chat_template=self.source,
                    return_assistant_tokens_mask=marks,
                    add_generation_prompt=prompt,
                    **self._special_tokens,
                )
        except Exception as error:  # jinja2's kinds, and whatever an expression of the template raises
            raise UserError(f"the chat template refuses it: {type(error).__name__}: {error}") from error
        return texts[0], marked[0] if marks else []


def _without_gap(turn: str, content: str) -> str:
    """The turn up to its end sign; the white space that a template puts behind that is never written by a model.

    Without a sign, the white space is all that ends the turn, and stays.
    """
    stripped = turn.rstrip()
    return turn if content and stripped.endswith(content.rstrip()) else stripped


def open_template(name: str, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template that `data.chat_template` names, or None where it is auto and the tokenizer has none.

    Raises:
        FieldError: no such file, no Jinja, or it leaves nothing of an assistant's answer to predict.
    """
    source = tokenizer.chat_template if name == AUTO else given_source(name)
    if source is None:
        return None
    template = ChatTemplate(source, tokenizer.special_tokens)
    try:
        example = template.tried()
    except UserError as error:
        if isinstance(error.__cause__, TimeoutError | MemoryError):
            constraint = f"needs more than {_SECONDS} s or {_MEGABYTES} MB for a question and an answer"
            raise FieldError(_FIELD, name, constraint, f"use another template, or {CHATML}") from error
        if isinstance(error.__cause__, ImportError):
            raise FieldError(_FIELD, name, "needs the package jinja2, 3.1.6", "pip install 'cuboid[data]'") from error
        if type(error.__cause__).__name__ == "TemplateSyntaxError":
            raise FieldError(_FIELD, name, f"is no Jinja template ({error.__cause__})", "mend it") from error
        return template  # it may want other conversations than this one
    if not any("I" in example.text[first:stop] for first, stop in example.predicted):
        constraint = "masks everything: of a user's question and an assistant's answer it predicts nothing"
        raise FieldError(
            _FIELD, name, constraint, "write the assistant's content, inside {% generation %} if that is used"
        )
    return template


def given_source(name: str) -> str | None:
    """The Jinja that `data.chat_template` names in place of the tokenizer's own; None where it is auto.

    Raises:
        FieldError: no such file.
    """
    if name == AUTO:
        return None
    return _CHATML_SOURCE if name == CHATML else _read(name)


def _read(name: str) -> str:
    place = Path(name).expanduser()
    try:
        return place.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is no file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        remedy = f"use {AUTO}, {CHATML} or a file with a Jinja template (relative to {Path.cwd()})"
        raise FieldError(_FIELD, name, reason, remedy) from error
