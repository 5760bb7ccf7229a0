"""Tasks of the user's own: scored as by hand, and no task file runs code."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import transformers  # noqa: F401  (its log handler keeps the stream that it finds first; not the runner's)
from stores import make_model, save_model
from typer.testing import CliRunner

from cuboid.launch import cli
from cuboid.trainer.export import export_hf
from cuboid.trainer.model_folder import load_model

QUESTIONS = [
    {"start": "All that is", "ends": [" gold", " silver and tin"], "right": 0},
    {"start": "does not", "ends": [" hum", " glitter"], "right": 1},
    {"start": "Not all those", "ends": [" who wander", " are"], "right": 1},
    {"start": "The old that", "ends": [" is strong", " fell"], "right": 0},
    {"start": "Deep roots", "ends": [" are not reached", " break", " x"], "right": 2},
]
CHOICE = {
    "task": "endings",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": "questions.jsonl"},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{start}}",
    "doc_to_choice": "ends",
    "doc_to_target": "right",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's folder, `model`, and the questions."""
    place = tmp_path_factory.mktemp("tasks")
    save_model(make_model(tied=True, vocab_size=257), place / "run", 1)
    export_hf(place / "run", place / "model")
    (place / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    return place


def asked(place: Path, task: dict[str, object] | str) -> tuple[int, str]:
    """Exit code and words of the command; JSON is YAML too."""
    (place / "task.yaml").write_text(task if isinstance(task, str) else json.dumps(task))
    words = ["evaluate", str(place / "model"), "--tasks", str(place / "task.yaml")]
    done = CliRunner().invoke(cli.app, words)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return done.exit_code, re.sub(r"\s+", " ", done.stdout if done.exit_code == 0 else done.stderr)


def logarithm(model: torch.nn.Module, start: str, end: str) -> float:
    """Of the probability of the bytes of ``end`` after ``start``."""
    ids = torch.tensor([*start.encode(), *end.encode()])
    with torch.no_grad():
        predicted = model(ids[None, :-1]).logits[0].log_softmax(-1)
    each = predicted.gather(1, ids[1:, None])[:, 0]
    return each[len(start.encode()) - 1 :].sum().item()


def test_choices_are_scored_as_by_hand(place: Path) -> None:
    model = load_model(place / "model")
    right, right_by_length = 0, 0
    for question in QUESTIONS:
        scores = [logarithm(model, question["start"], end) for end in question["ends"]]
        by_length = [score / len(end) for score, end in zip(scores, question["ends"], strict=True)]
        right += scores.index(max(scores)) == question["right"]
        right_by_length += by_length.index(max(by_length)) == question["right"]
    code, told = asked(place, CHOICE)
    assert code == 0, told
    assert told == f"endings acc {right / 5:.4f}, acc_norm {right_by_length / 5:.4f}, 5 questions "
    assert 0 < right < 5


def test_answers_are_generated_and_compared(place: Path) -> None:
    """The right answer of each question but one is what the model itself goes on with."""
    model, lines = load_model(place / "model"), []
    for question in QUESTIONS:
        ids = list(question["start"].encode())
        for _ in range(4):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answer = bytes(ids[-4:]).decode("utf-8", "replace")
        lines.append({"start": question["start"], "end": answer if lines else "something else"})
    (place / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = {key: value for key, value in CHOICE.items() if key != "doc_to_choice"} | {
        "dataset_kwargs": {"data_files": "answers.jsonl"},
        "output_type": "generate_until",
        "doc_to_target": "{{end}}",
        "generation_kwargs": {"max_gen_toks": 4, "until": [], "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    code, told = asked(place, task)
    assert code == 0, told
    assert told == "endings exact_match 0.8000, 5 questions "


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"process_docs": "x"}, "process_docs is not read, since it may run code or read elsewhere"),
        ({"include": "other.yaml"}, "include is not read"),
        ({"doc_to_text": "{{ ''.__class__.__mro__ }}"}, "is more than text and names of columns, and could run code"),
        ({"doc_to_text": "{% for x in y %}{% endfor %}"}, "is more than text and names of columns"),
        ({"doc_to_choice": ["a", "{{cycler.__init__}}"]}, "doc_to_choice=['a', '{{cycler.__init__}}'] is not text"),
        ({"dataset_path": "someone/dataset"}, "dataset_path=someone/dataset is read by a script or from elsewhere"),
        ({"dataset_kwargs": {"data_files": "code.py"}}, "names no file of questions"),
        (
            {"dataset_kwargs": {"data_files": "questions.jsonl", "trust_remote_code": True}},
            "names no file of questions",
        ),
        ({"metric_list": [{"metric": "someone/metric"}]}, "is not what multiple_choice is judged by; use a list of"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "is not what multiple_choice is judged by"),
        ({"output_type": "loglikelihood"}, "output_type=loglikelihood is not offered; use multiple_choice or"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_could_run_code_is_refused(place: Path, change: dict[str, object], words: str) -> None:
    code, told = asked(place, CHOICE | change)
    assert code == 2
    assert words in told


def test_a_function_in_a_task_file_is_refused_and_not_imported(place: Path) -> None:
    (place / "mine.py").write_text(f"open({str(place / 'ran')!r}, 'w')\ndef text(row): return 'x'\n")
    task = json.dumps(CHOICE | {"doc_to_text": "HERE"}).replace('"HERE"', "!function mine.text")
    code, told = asked(place, task)
    assert code == 2
    assert "!function" in told
    assert not os.path.exists(place / "ran")
