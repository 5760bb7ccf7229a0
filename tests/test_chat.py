"""Chat and instruct data: what is predicted, how examples are packed and cut, and what is said of broken rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from samples import BYTES, CHATML, UNMARKED, chats, examples, prepared, said, save_chat_tokenizer, write_rows

from cuboid.parallel.errors import FieldError, UserError
from cuboid.parallel.loss import IGNORE
from cuboid.trainer.check_data import data_errors
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.tokenizer import PretrainedTokenizer, open_tokenizer

Message = Mapping[str, Any]
SMOLLM2 = Path(__file__).parents[1] / "models" / "smollm2"

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]


CONVERSATIONS: list[list[Message]] = [
    said("Who are you?", "I am a program."),
    [{"role": "system", "content": "Be brief."}, *said("Ö 🎉?", "  Yes — ж.  ", "Really?\n\n", "Yes.\n")],
    [
        *said("How is the weather?"),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"sky": "grey"}'},
        {"role": "assistant", "content": "Grey."},
    ],
    said("Say it twice.", "It.", "Again.", "It."),
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PretrainedTokenizer]:
    templates = {"marked": CHATML, "unmarked": UNMARKED, "none": None}
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: PretrainedTokenizer(str(save_chat_tokenizer(folder / name, t))) for name, t in templates.items()}


@pytest.mark.parametrize("template", ["marked", "unmarked"])
def test_ids_and_mask_are_what_transformers_makes_of_a_marked_template(tmp_path, tokenizers, template):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tokenizers["marked"]._name)
    path = write_rows(tmp_path / "x.jsonl", [{"messages": m, "tools": TOOLS} for m in CONVERSATIONS])
    data = prepared(path, tmp_path / "cache", kind="chat", tokenizer=tokenizers[template], sequence_length=256)
    wanted = []
    for messages in CONVERSATIONS:
        expected = reference.apply_chat_template(
            messages, TOOLS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = expected["input_ids"], expected["assistant_masks"]
        assert 0 < sum(mask) < len(mask)
        labels = [token if answers else IGNORE for token, answers in zip(ids[1:], mask[1:], strict=True)]
        wanted.append((ids, [*labels, IGNORE]))
    assert sorted(examples(data)) == sorted(wanted)


def test_bytes_speak_chatml_in_plain_words(tmp_path):
    path = chats(tmp_path / "x.jsonl", CONVERSATIONS[:2])
    data = prepared(path, tmp_path / "cache", kind="chat", chat_template="chatml", sequence_length=256)
    texts, answers = [], []
    for ids, labels in examples(data):
        texts.append(bytes(token for token in ids if token < 256).decode())
        answers.append(bytes(label for label in labels if label >= 0).decode())
    assert sorted(answers) == ["  Yes — ж.  <|im_end|>Yes.\n<|im_end|>", "I am a program.<|im_end|>"]
    turns = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\nI am a program.<|im_end|>\n"
    assert turns in texts


def test_instruct_by_columns_with_and_without_a_template(tmp_path, tokenizers):
    rows = [
        {"q": "Add.", "more": "1 + 1", "a": "2", "rules": "Be right."},
        {"q": "Name a colour.", "more": "", "a": "Blue", "rules": None},
    ]
    columns = {"prompt": "q", "response": "a", "input": "more", "system": "rules"}
    path = write_rows(tmp_path / "x.jsonl", rows)
    options = {"kind": "instruct", "columns": columns, "sequence_length": 128}
    plain = prepared(path, tmp_path / "cache", **options)
    found = {bytes(ids[:-1]).decode(): labels for ids, labels in examples(plain)}
    assert sorted(found) == ["Be right.\n\nAdd.\n\n1 + 1\n\n2", "Name a colour.\n\nBlue"]
    assert [label for label in found["Name a colour.\n\nBlue"] if label >= 0] == [*b"Blue", BYTES.end]
    tokenizer = tokenizers["unmarked"]
    through = prepared(path, tmp_path / "cache", tokenizer=tokenizer, **options)
    chat = [
        [{"role": "system", "content": "Be right."}, *said("Add.\n\n1 + 1", "2")],
        said("Name a colour.", "Blue"),
    ]
    same = prepared(
        chats(tmp_path / "y.jsonl", chat), tmp_path / "cache", kind="chat", tokenizer=tokenizer, sequence_length=128
    )
    assert through.fingerprint == same.fingerprint


def test_tables_hold_conversations_too(tmp_path, tokenizers, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    tokenizer = tokenizers["unmarked"]
    rows = [{"messages": m, "tools": json.dumps(TOOLS)} for m in CONVERSATIONS]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")  # each message gets a tool_calls, mostly null
    options = {"kind": "chat", "tokenizer": tokenizer, "sequence_length": 256}
    table = prepared(str(tmp_path / "x.parquet"), tmp_path / "cache", **options)
    lines = write_rows(tmp_path / "x.jsonl", [row | {"tools": TOOLS} for row in rows])
    assert table.fingerprint == prepared(lines, tmp_path / "cache", **options).fingerprint
    (tmp_path / "x.csv").write_text("prompt,response\n1 + 1,two\n2 + 2,\n")
    with pytest.raises(UserError, match=r"x\.csv, row 2: column response is empty"):
        prepared(str(tmp_path / "x.csv"), tmp_path / "cache", kind="instruct")
    assert prepared(str(tmp_path / "x.csv"), tmp_path / "cache", kind="instruct", broken="skip").num_documents == 1


THINKS = "{% if loop.last %}<think>{% endif %}{{ message.content }}{% for"
FORGETS = UNMARKED.replace("{{ message.content }}{% for", THINKS)
"""Writes thoughts in the last turn alone, as templates of reasoning models do."""
GOOD = {"messages": CONVERSATIONS[0]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"messages": [', "not JSON"),
        ({"conversations": []}, r"no column messages \(there are: conversations\); set data.columns"),
        ({"messages": "hello"}, "column messages holds str, not a list of messages"),
        ({"messages": []}, "column messages holds an empty list"),
        ({"messages": ["hello"]}, "message 1 of messages is str, not a mapping with role and content"),
        ({"messages": [{"from": "x"}]}, r"message 1 of messages has no role \(it has: from\)"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 of messages: content is int, not text"),
        ({"messages": said("Speak!", "")}, "message 2 of messages: the assistant says nothing"),
        ({"messages": CONVERSATIONS[0], "tools": "[{"}, "column tools is not JSON"),
        ({"messages": CONVERSATIONS[0], "tools": "{}"}, "column tools holds dict, not a list of tools"),
        ({"messages": CONVERSATIONS[2]}, "template refuses it: TemplateError: chatml has no form for tool_calls"),
        ({"messages": CONVERSATIONS[0], "tools": TOOLS}, "chatml has no form for tools"),
    ],
)
def test_a_broken_row_stops_or_is_skipped_and_told(tmp_path, row, words, capfd):
    path = write_rows(tmp_path / "x.jsonl", [GOOD, row, GOOD])
    options = {"kind": "chat", "chat_template": "chatml", "sequence_length": 128}
    with pytest.raises(UserError, match=rf"x\.jsonl, line 2: .*{words}"):
        prepared(path, tmp_path / "cache", **options)
    for _ in range(2):  # made, and from the cache
        data = prepared(path, tmp_path / "cache", broken="skip", **options)
        assert data.num_documents == 2
        assert data.facts["left_out"].startswith(f"broken and skipped: 1 ({path}, line 2: ")
    assert capfd.readouterr().err.count("broken and skipped: 1") == 1


def test_broken_text_is_skipped_too_and_nothing_left_is_told(tmp_path):
    (tmp_path / "1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "2.txt").write_text("whole")
    data = prepared(f"{tmp_path}/*.txt", tmp_path / "cache", broken="skip")
    assert (data.num_documents, data.num_tokens) == (1, 6)
    with pytest.raises(FieldError, match=r"has no usable document: broken and skipped: 1 \(.*1.txt is not UTF-8"):
        prepared(f"{tmp_path}/1.txt", tmp_path / "cache", broken="skip")
    path = write_rows(tmp_path / "x.jsonl", [{"messages": said("Only a question?")}])
    with pytest.raises(FieldError, match="has no usable document: without a token to predict: 1"):
        prepared(path, tmp_path / "cache", kind="chat", chat_template="chatml")
    with pytest.raises(FieldError, match=r"2.txt is running text, without the columns messages; give .jsonl"):
        prepared(f"{tmp_path}/2.txt", tmp_path / "cache", kind="chat", chat_template="chatml")


def test_a_template_that_writes_a_beginning_otherwise_later_is_told_with_the_place(tmp_path):
    tokenizer = PretrainedTokenizer(str(save_chat_tokenizer(tmp_path / "forgets", FORGETS)))
    once, twice = {"messages": CONVERSATIONS[0]}, {"messages": CONVERSATIONS[3]}
    path = write_rows(tmp_path / "x.jsonl", [once, twice])
    options = {"kind": "chat", "tokenizer": tokenizer, "sequence_length": 128}
    words = r"x.jsonl, line 2: the chat template writes the beginning up to message 2 otherwise when more follows"
    with pytest.raises(UserError, match=words):
        prepared(path, tmp_path / "cache", **options)
    (tmp_path / "marked.jinja").write_text(CHATML)
    marked = prepared(path, tmp_path / "cache", chat_template=str(tmp_path / "marked.jinja"), **options)
    assert marked.num_documents == 2


def test_templates_that_cannot_be_used_are_told_before_anything_is_read(tmp_path, tokenizers):
    def told(**data: Any) -> list[str]:
        given = {"kind": "chat", "path": path, "sequence_length": 64, **data}
        recipe = Recipe.model_validate(
            {
                "name": "x",
                "model": {"config": {"model_type": "llama"}},
                "data": given,
                "train": {"steps": 1, "global_batch": 1},
            }
        )
        return [str(error) for error in data_errors(recipe, 400)]

    path = chats(tmp_path / "x.jsonl", CONVERSATIONS)
    assert told(chat_template="chatml") == []
    assert told(tokenizer=tokenizers["marked"]._name) == []
    (line,) = told(tokenizer=tokenizers["none"]._name)
    assert line == (
        "data.chat_template=auto finds no chat template in the tokenizer, which data.kind=chat needs; "
        "use chatml, a file with a Jinja template, or the tokenizer of a chat model"
    )
    for name, source, words in (
        ("masks", UNMARKED.replace("{{ message.content }}{% for", "{% for"), "masks everything"),
        ("broken", "{% for %}", "is no Jinja template"),
    ):
        (tmp_path / name).write_text(source)
        (line,) = told(chat_template=str(tmp_path / name))
        assert words in line
    (line,) = told(chat_template="nowhere.jinja")
    assert line.startswith("data.chat_template=nowhere.jinja is no file; use auto, chatml or a file with a Jinja")
    lines = told(chat_template="chatml", cross_documents=True, text_column="body", columns={"prompt": "q"})
    assert lines == [
        "data.text_column=body means nothing for data.kind=chat; use text, or data.kind=text",
        "data.cross_documents=true means nothing for data.kind=chat; use false, or data.kind=text",
        "data.columns.prompt=q means nothing for data.kind=chat; use prompt, or data.kind=instruct or preference",
    ]
    (line,) = told(kind="text", truncation="drop")
    assert line.endswith("means nothing for data.kind=text; use end, or data.kind=chat, instruct or preference")


def test_a_tokenizer_that_does_not_tell_places_is_refused(tmp_path):
    from transformers import CanineTokenizer

    CanineTokenizer().save_pretrained(tmp_path / "slow")
    (tmp_path / "slow" / "config.json").write_text('{"model_type": "canine"}')
    path, tokenizer = chats(tmp_path / "x.jsonl", CONVERSATIONS[:1]), PretrainedTokenizer(str(tmp_path / "slow"))
    with pytest.raises(
        FieldError, match=r"data.tokenizer=.*slow has no fast form, .*; use a model with a tokenizer.json"
    ):
        prepared(path, tmp_path / "cache", kind="chat", chat_template="chatml", tokenizer=tokenizer)


@pytest.mark.full
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="`make smollm2` was not run")
def test_a_real_models_conversations_are_what_transformers_makes_of_them(tmp_path):
    """SmolLM2's template marks nothing; the reference is the same template with marks around the assistant's words."""
    from transformers import AutoTokenizer

    tokenizer = open_tokenizer("auto", pretrained=str(SMOLLM2))
    reference = AutoTokenizer.from_pretrained(SMOLLM2)
    plain = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    assert reference.chat_template.count(plain) == 1
    content = "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    said_so = "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}" + content
    marked = reference.chat_template.replace(plain, said_so + "{% else %}" + plain + "{% endif %}")
    wanted, conversations = [], [CONVERSATIONS[0], CONVERSATIONS[3]]
    for number in range(300):
        words = [f"{'Wörter ' * (turn + 1)}{number} 🎉\n\tx = {turn}" for turn in range(2 + number % 5)]
        conversations.append(said(*words))
    for messages in conversations:
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, "chat_template": marked}
        expected = reference.apply_chat_template(messages, **options)
        assert expected["input_ids"] == reference.apply_chat_template(messages)["input_ids"]
        ids, mask = expected["input_ids"], expected["assistant_masks"]
        wanted.append(
            (ids, [*(t if answers else IGNORE for t, answers in zip(ids[1:], mask[1:], strict=True)), IGNORE])
        )
    path = chats(tmp_path / "x.jsonl", conversations)
    data = prepared(path, tmp_path / "cache", kind="chat", tokenizer=tokenizer, sequence_length=256)
    assert sorted(examples(data)) == sorted(wanted)
    # newline and space are one token here: no prompt ends within it, so that no model ever says it
    path, options = chats(tmp_path / "y.jsonl", [said("Speak!", "  Yes.")]), {"kind": "chat", "tokenizer": tokenizer}
    ((ids, labels),) = examples(prepared(path, tmp_path / "cache", sequence_length=64, **options))
    predicted = [label for label in labels if label != IGNORE]
    assert tokenizer.decode(predicted) == " Yes.<|im_end|>"
    assert tokenizer.decode(ids[: ids.index(predicted[0])]).endswith("assistant\n ")
