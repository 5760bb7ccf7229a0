"""`cuboid data`: the first sequences of the run as text, what is predicted marked, and the counts of an epoch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from samples import UNMARKED, chats, prepared, said, save_chat_tokenizer, write_rows
from typer.testing import CliRunner

from cuboid.launch import cli
from cuboid.parallel.loss import IGNORE
from cuboid.trainer.tokenizer import PretrainedTokenizer

RECIPE = """\
name: look
model: {config: {model_type: llama, hidden_size: 32, vocab_size: 512}}
data: {kind: chat, path: chat.jsonl, chat_template: chatml, sequence_length: 192, tokenizer: bytes}
train: {steps: 2, global_batch: 2}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    Path("look.yaml").write_text(RECIPE)
    chats(Path("chat.jsonl"), [said("Hi?", "Hö."), said("And?", "No.", "Why?", "[So]."), said("x" * 200, "Lost.")])


def data(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["data", "look.yaml", *arguments])
    return done.exit_code, done.output


def test_sequences_are_shown_with_what_is_predicted_and_counted() -> None:
    code, printed = data("--show", "2")
    assert code == 0
    shown, _, statistics = printed.partition("training: ")
    assert {shown.count(f"sequence {number} of the run\n--- document 1\n") for number in (1, 2)} == {1}
    answers = re.findall("⟦(.*?)⟧", shown, re.DOTALL)
    assert sorted(answers) == sorted(f"{words}<|im_end|>" for words in ("Hö.", "No.", "[So]."))
    assert "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n⟦Hö.<|im_end|>⟧\n" in shown
    assert "xxx" not in shown
    predicted = len("Hö.No.[So].".encode()) + 3 * len("<|im_end|>")
    assert statistics.startswith("3 documents, ")
    assert f"an epoch: 2 sequences of 192, {predicted} tokens predicted (" in statistics
    assert "dropped as too long: 1" in statistics


def test_documents_of_one_sequence_are_told_apart() -> None:
    chats(Path("chat.jsonl"), [said("1", "one"), said("2", "two")])
    code, printed = data("data.sequence_length=256", "data.eval_path=chat.jsonl", "--show", "1")
    assert code == 0
    assert [line for line in printed.splitlines() if line.startswith("---")] == ["--- document 1", "--- document 2"]
    assert "training: 2 documents" in printed
    assert "evaluation: 2 documents" in printed


def test_a_mixtures_entries_are_counted_each_for_itself() -> None:
    chats(Path("more.jsonl"), [said("1", "one"), said("2", "two")])
    code, printed = data("data.path=[chat.jsonl, more.jsonl]", "data.weights=[1, 3]", "--show", "0")
    assert code == 0
    first, second = printed.splitlines()
    assert first.startswith("training, entry 1 of data.path (25.0% of the sequences): 3 documents, ")
    assert second.startswith("training, entry 2 of data.path (75.0% of the sequences): 2 documents, ")


def test_in_colour_there_are_no_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    code, printed = data("--show", "2")
    assert code == 0
    assert "⟦" not in printed
    assert re.search(r"\x1b\[1;32mHö\.<\|im_end\|>\x1b\[0m", printed)


def test_what_is_wrong_is_told_with_its_place_and_2() -> None:
    with Path("chat.jsonl").open("a") as file:
        file.write('{"messages": 3}\n')
    code, printed = data()
    assert code == 2
    assert "chat.jsonl, line 4: column messages holds int, not a list of messages" in printed
    code, printed = data("data.broken=skip", "--show", "0")
    assert code == 0
    assert "broken and skipped: 1 (chat.jsonl, line 4: " in printed
    code, printed = data("data.chat_template=none.jinja")
    assert code == 2
    assert "override `data.chat_template=none.jinja`: data.chat_template=none.jinja is no file" in printed


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "text"},
        {"kind": "text", "cross_documents": True},
        {"kind": "text", "packing": False},
        {"kind": "instruct"},
        {"kind": "instruct", "packing": False, "truncation": "start"},
        {"kind": "instruct", "truncation": "drop"},
    ],
    ids=str,
)
def test_the_counts_are_those_of_an_epoch(tmp_path: Path, fields: dict[str, Any]) -> None:
    rows = [{"prompt": "p" * (n * 7 % 23 + 1), "response": "r" * (n % 9 + 1), "text": "t" * (n + 1)} for n in range(40)]
    found = prepared(write_rows(tmp_path / "x.jsonl", rows), tmp_path / "cache", sequence_length=16, **fields)
    labels = found.batch(range(found.num_samples)).labels
    assert found.count().predicted == int((labels != IGNORE).sum())
    assert found.count().predicted < found.count().tokens <= found.num_samples * 16


def test_a_tokenizers_words_are_put_together_again(tmp_path: Path) -> None:
    folder = save_chat_tokenizer(tmp_path / "tokenizer", UNMARKED)
    tokenizer = PretrainedTokenizer(str(folder))
    text = "<|im_start|>user\n def decode(self): ж🎉<|im_end|>"
    assert tokenizer.decode(tokenizer.encode([text])[0].tolist()) == text
    code, printed = data(f"data.tokenizer={folder}", "data.chat_template=auto", "--show", "2")
    assert code == 0
    assert "<|im_start|>assistant\n⟦Hö.<|im_end|>⟧\n" in printed
