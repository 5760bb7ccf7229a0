"""Preference data: the forms of pairs, what is predicted of them, how they are cut and packed, and broken ones."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
from samples import BYTES, CHATML, UNMARKED, examples, prepared, said, save_chat_tokenizer, write_rows
from test_check import recipe
from typer.testing import CliRunner

from cuboid.launch import cli
from cuboid.parallel.errors import UserError
from cuboid.parallel.loss import IGNORE
from cuboid.trainer.check_data import data_errors
from cuboid.trainer.held_out import passage_of
from cuboid.trainer.tokenizer import PretrainedTokenizer

ASKED = said("Who?", "Me.", "And how?")
CHOSEN, REJECTED = [{"role": "assistant", "content": text} for text in ("Gladly.", "No. Never.")]
EXPLICIT = {"prompt": ASKED, "chosen": [CHOSEN], "rejected": [REJECTED]}
IMPLICIT = {"chosen": [*ASKED, CHOSEN], "rejected": [*ASKED, REJECTED]}
BESIDE = {**IMPLICIT, "prompt": "And how?"}
"""As of UltraFeedback's first publication: the question once more, as a text."""
TEXTS = {"prompt": "And how?", "chosen": "Gladly.", "rejected": "No. Never."}
FIELDS: dict[str, Any] = {"kind": "preference", "chat_template": "chatml", "sequence_length": 512}


def read(path: str, tmp_path: Path, **fields: Any) -> list[tuple[str, str]]:
    """(what stands before, what is predicted, but the end) of each answer, in the order of the sequences."""
    found = []
    for ids, labels in examples(prepared(path, tmp_path / "cache", **{**FIELDS, **fields})):
        predicted = [label for label in labels if label != IGNORE]
        first = labels.index(predicted[0])
        assert labels[first : first + len(predicted)] == predicted, "one answer, without a gap"
        said = [token for token in predicted if token != BYTES.end]
        found.append((BYTES.decode(ids[: first + 1]), BYTES.decode(said)))
    return found


@pytest.mark.parametrize("row", [EXPLICIT, IMPLICIT, BESIDE], ids=["explicit", "implicit", "beside"])
def test_conversations_have_the_prompt_twice_and_predict_the_answers_alone(tmp_path: Path, row: Any) -> None:
    (chosen, rejected) = read(write_rows(tmp_path / "x.jsonl", [row]), tmp_path)
    assert chosen[0] == rejected[0]
    assert chosen[0].endswith("user\nAnd how?<|im_end|>\n<|im_start|>assistant\n")
    assert "Me." in chosen[0], "an earlier turn of the assistant is prompt"
    assert (chosen[1], rejected[1]) == ("Gladly.<|im_end|>", "No. Never.<|im_end|>")


def test_texts_are_a_question_and_its_answers_with_a_template_and_without(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [TEXTS])
    (chosen, rejected) = read(path, tmp_path)
    before = "<|im_start|>user\nAnd how?<|im_end|>\n<|im_start|>assistant\n"
    assert (chosen, rejected) == ((before, "Gladly.<|im_end|>"), (before, "No. Never.<|im_end|>"))
    (chosen, rejected) = read(path, tmp_path, chat_template="auto")
    assert (chosen, rejected) == (("And how?\n\n", "Gladly."), ("And how?\n\n", "No. Never."))


@pytest.mark.parametrize("template", [CHATML, UNMARKED], ids=["marked", "unmarked"])
def test_a_tokenizers_own_template_gives_the_ids_that_transformers_gives(tmp_path: Path, template: str) -> None:
    tokenizer = PretrainedTokenizer(str(save_chat_tokenizer(tmp_path / "tokenizer", template)))
    path = write_rows(tmp_path / "x.jsonl", [EXPLICIT])
    fields = {**FIELDS, "chat_template": "auto", "tokenizer": tokenizer}
    found = list(examples(prepared(path, tmp_path / "cache", **fields)))
    inner = tokenizer._tokenizer
    for (ids, labels), answer in zip(found, (CHOSEN, REJECTED), strict=True):
        whole = inner.apply_chat_template([*ASKED, answer], return_dict=False)
        assert ids[: len(whole)] == whole
        start = len(inner.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False))
        assert [label for label in labels if label != IGNORE] == whole[start:-1], "all but the newline behind it"
        assert labels[start - 1] == whole[start]


def test_tables_hold_the_same_pairs(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([json.loads(json.dumps(EXPLICIT))])
    table.to_parquet(tmp_path / "x.parquet")
    expected = read(write_rows(tmp_path / "x.jsonl", [EXPLICIT]), tmp_path)
    assert read(str(tmp_path / "x.parquet"), tmp_path) == expected
    datasets.Dataset.from_list([TEXTS]).to_csv(tmp_path / "x.csv")
    columns = {"prompt": "prompt", "chosen": "rejected", "rejected": "chosen"}
    assert [answer for _, answer in read(str(tmp_path / "x.csv"), tmp_path, columns=columns)] == [
        "No. Never.<|im_end|>",
        "Gladly.<|im_end|>",
    ]


def plain(prompt: int, chosen: int, rejected: int, name: str = "p") -> Mapping[str, str]:
    """A pair of so many tokens without a template: of the prompt with its empty line, of the answers without an end."""
    return {"prompt": name * (prompt - 2), "chosen": "c" * chosen, "rejected": "r" * rejected}


def lengths(tmp_path: Path, rows: list[Any], **fields: Any) -> list[tuple[int, int]]:
    """(prompt, answer) tokens of each answer."""
    path = write_rows(tmp_path / "x.jsonl", rows)
    return [(len(before), len(answer)) for before, answer in read(path, tmp_path, chat_template="auto", **fields)]


@pytest.mark.parametrize(
    ("truncation", "wanted"),
    [
        ("end", [(8, 4), (8, 19)]),  # the chosen one takes 13 of 40 with its end, and leaves the rejected one 27
        ("start", [(2, 4), (2, 30)]),  # 12 too many: 6 off either
        ("drop", []),
    ],
)
def test_a_pair_that_is_too_long_is_cut_so_that_the_prompts_stay_alike(
    tmp_path: Path, truncation: str, wanted: list[tuple[int, int]]
) -> None:
    rows = [plain(8, 4, 30), plain(5, 3, 3, "q")]
    found = lengths(tmp_path, rows, truncation=truncation, sequence_length=40, packing=False)
    assert sorted(found) == sorted([*wanted, (5, 3), (5, 3)])


def test_both_are_cut_at_the_end_where_both_are_long(tmp_path: Path) -> None:
    assert lengths(tmp_path, [plain(8, 50, 90)], sequence_length=40) == [(8, 12), (8, 12)]


def test_a_cut_that_leaves_one_answer_nothing_leaves_the_pair_out(tmp_path: Path) -> None:
    data = prepared(
        write_rows(tmp_path / "x.jsonl", [plain(8, 4, 4), plain(30, 4, 4)]),
        tmp_path / "cache",
        **{**FIELDS, "sequence_length": 40, "chat_template": "auto"},
    )
    assert (data.num_samples, data.packs and data.packs.dropped) == (1, 1)
    assert data.facts["left_out"] == "dropped as too long: 1"


@pytest.mark.parametrize("packing", [True, False])
def test_a_sequence_holds_whole_pairs(tmp_path: Path, packing: bool) -> None:
    """In any order of the sequences a chosen answer is followed by the rejected one to the same prompt."""
    rows = [plain(3, 1 + row % 7, 1 + row % 5, chr(65 + row % 26)) for row in range(60)]
    path = write_rows(tmp_path / "x.jsonl", rows)
    fields = {**FIELDS, "chat_template": "auto", "sequence_length": 64, "packing": packing}
    data = prepared(path, tmp_path / "cache", **fields)
    batch, pairs = data.batch(range(data.num_samples)), 0
    for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
        begins = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        documents = [slice(first, stop) for first, stop in pairwise(begins)]
        predicting = [part for part in documents if (labels[part] != IGNORE).any()]
        assert predicting == documents[: len(predicting)]
        assert len(predicting) % 2 == 0
        assert packing or len(predicting) == 2
        for chosen, rejected in zip(predicting[::2], predicting[1::2], strict=True):
            words = [BYTES.decode(ids[part].tolist()) for part in (chosen, rejected)]
            assert words[0][0] == words[1][0]
            assert (words[0][3], words[1][3]) == ("c", "r")
            pairs += 1
    assert pairs == len(rows)
    assert data.num_samples < len(rows) / 2 if packing else data.num_samples == len(rows)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x", "chosen": "y"}, "no column rejected (there are: prompt, chosen); set data.columns"),
        ({**TEXTS, "rejected": "Gladly."}, "columns chosen and rejected are the same: nothing is preferred"),
        ({**TEXTS, "rejected": None}, "column rejected holds null, not a text or a list of messages"),
        ({**TEXTS, "rejected": [REJECTED]}, "column rejected holds list, not a text or a list of messages, the same"),
        ({"chosen": "y", "rejected": "z"}, "column prompt is absent or empty, which answers that are texts need"),
        (
            {"chosen": [CHOSEN], "rejected": [REJECTED]},
            "column prompt holds null, and the answers share no beginning: there is no prompt",
        ),
        ({**EXPLICIT, "chosen": [*ASKED, CHOSEN]}, "the answer in column chosen begins with user, and not with the"),
        ({"chosen": [*ASKED, CHOSEN], "rejected": ASKED}, "the answer in column rejected is empty, and not with the"),
        ({**EXPLICIT, "chosen": [{"role": "assistant"}]}, "message 1 of chosen: the assistant says nothing"),
    ],
)
def test_a_broken_pair_is_told_by_its_line_or_left_out(tmp_path: Path, row: Any, words: str) -> None:
    path = write_rows(tmp_path / "x.jsonl", [TEXTS, row])
    with pytest.raises(UserError, match=re.escape(f"x.jsonl, line 2: {words}")):
        prepared(path, tmp_path / "cache", **FIELDS)
    data = prepared(path, tmp_path / "cache", **FIELDS, broken="skip")
    assert data.facts["left_out"].startswith("broken and skipped: 1 (")


def test_conversations_need_a_template(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [EXPLICIT])
    with pytest.raises(UserError, match=r"there is no chat template; set data.chat_template, such as chatml"):
        prepared(path, tmp_path / "cache", **{**FIELDS, "chat_template": "auto"})


def test_columns_of_pairs_mean_nothing_for_other_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("text")
    (error,) = data_errors(recipe(data={"columns": {"chosen": "good"}}), None)
    assert str(error).endswith("means nothing for data.kind=text; use chosen, or data.kind=preference")


def test_pairs_are_shown_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    write_rows(Path("pairs.jsonl"), [EXPLICIT, TEXTS])
    Path("look.yaml").write_text(
        "name: look\nmodel: {config: {model_type: llama, hidden_size: 32, vocab_size: 512}}\n"
        "data: {kind: preference, path: pairs.jsonl, chat_template: chatml, sequence_length: 512, tokenizer: bytes}\n"
        "preference: {}\ntrain: {steps: 2, global_batch: 2}\n"
    )
    printed = CliRunner().invoke(cli.app, ["data", "look.yaml", "--show", "1"]).output
    names = [line for line in printed.splitlines() if line.startswith("---")]
    assert names == [f"--- pair {pair}, {answer}" for pair in (1, 2) for answer in ("chosen", "rejected")]
    assert re.findall("⟦(.*?)⟧", printed, re.DOTALL) == ["Gladly.<|im_end|>", "No. Never.<|im_end|>"] * 2
    assert "training: 2 pairs, " in printed


def test_a_finished_model_is_not_measured_on_pairs(tmp_path: Path) -> None:
    """Their loss is one against a reference; a text that is named is read as a text."""
    pairs = recipe(data={"kind": "preference", "path": "pairs.jsonl", "eval_path": "pairs.jsonl"}, preference={})
    assert passage_of(pairs, None) is None
    named = passage_of(pairs, "text.txt")
    assert named is not None
    assert (named.data.kind, named.data.path) == ("text", "text.txt")
