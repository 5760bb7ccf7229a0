"""The lm_eval door: a task of the user's own, a YAML file beside its questions, asked of a finished model.

What computes is the harness (Gao et al. 2021, "A framework for few-shot language model evaluation"); what reads is not.
Its own reader lets a task file name Python functions, other files and metrics to download, and fills its templates
without a sandbox. Here a task file is a closed set of the same keys with plain values, and a template names columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuboid.parallel.errors import FieldError, UserError, UserErrors, one_of
from cuboid.trainer.model_folder import Model, load_tokenizer, quietly
from cuboid.trainer.recipe_yaml import parse_file

_METRICS = {"multiple_choice": ("acc", "acc_norm"), "generate_until": ("exact_match",)}
"""Kinds of questions, and what is counted of the answers."""
_KEYS = (
    "task",
    "dataset_path",
    "dataset_kwargs",
    "test_split",
    "output_type",
    "doc_to_text",
    "doc_to_choice",
    "doc_to_target",
    "target_delimiter",
    "generation_kwargs",
    "metric_list",
)
_TEMPLATES = ("doc_to_text", "doc_to_choice", "doc_to_target")
_TEMPLATE = re.compile(r"(?:[^{]|\{(?![{%#])|\{\{ *[A-Za-z]\w* *\}\})*", re.DOTALL)
"""Text, and columns by their names: {{question}}."""
_ROWS = 4


@dataclass(frozen=True)
class Answers:
    """What a model reached in a task."""

    task: str
    questions: int
    scores: Mapping[str, float]
    """By metric."""

    def __str__(self) -> str:
        scores = ", ".join(f"{metric} {score:.4f}" for metric, score in self.scores.items())
        return f"{self.task}  {scores}, {self.questions:,} questions"


def read_task(path: Path) -> dict[str, Any]:
    """The task file's values, in lm_eval's keys, the questions' file made absolute.

    Raises:
        UserErrors: all that is wrong with it.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FieldError("--tasks", path, "cannot be read", "name a task's YAML file") from error
    parsed = parse_file(text, str(path))
    values: dict[str, Any] = parsed.data
    errors = [error for _, error in parsed.errors] or list(_mistakes(values, path.parent))
    if errors:
        raise UserErrors([UserError(f"{path}: {error}") for error in errors])
    questions = path.parent / values["dataset_kwargs"]["data_files"]
    return {**values, "dataset_kwargs": {"data_files": {values["test_split"]: str(questions.absolute())}}}


def ask(model: Model, folder: Path, task: Mapping[str, Any]) -> Answers:
    """Ask the model, whose tokenizer is in ``folder``, every question of a task of `read_task`."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    name = task["task"]
    with quietly():
        asked = HFLM(pretrained=model, tokenizer=load_tokenizer(folder), batch_size=_ROWS)
        questions = {name: ConfigurableTask(config=dict(task))}
        found = lm_eval.evaluate(asked, questions, bootstrap_iters=0, log_samples=False, verbosity="ERROR")
    figures = found["results"][name]
    scores = {metric["metric"]: figures[f"{metric['metric']},none"] for metric in task["metric_list"]}
    return Answers(name, found["n-samples"][name]["effective"], scores)


def _mistakes(values: Mapping[str, Any], folder: Path) -> Iterator[UserError]:
    for key in values.keys() - set(_KEYS):
        yield UserError(f"{key} is not read, since it may run code or read elsewhere; the keys are {', '.join(_KEYS)}")
    for key in ("task", "test_split"):
        if not isinstance(values.get(key), str) or not values[key]:
            yield FieldError(key, values.get(key), "is not a name", f"write for example {key}: test")
    if values.get("dataset_path") != "json":
        constraint = "is read by a script or from elsewhere"
        yield FieldError("dataset_path", values.get("dataset_path"), constraint, "use json")
    options = values.get("dataset_kwargs")
    file = options.get("data_files") if isinstance(options, dict) and options.keys() == {"data_files"} else None
    if not isinstance(file, str) or Path(file).suffix != ".jsonl" or not (folder / file).is_file():
        constraint = "names no file of questions"
        yield FieldError(
            "dataset_kwargs", options, constraint, "write {data_files: NAME.jsonl}, as seen from this file"
        )
    for key in _TEMPLATES:
        value = values.get(key)
        if isinstance(value, str) and not _TEMPLATE.fullmatch(value):
            constraint = "is more than text and names of columns, and could run code"
            yield FieldError(key, value, constraint, "use {{column}} alone")
        elif not isinstance(value, str | int | None) and not _is_texts(value):
            yield FieldError(key, value, "is not text", "use {{column}}, or a list of texts for doc_to_choice")
    kind = values.get("output_type")
    if kind not in _METRICS:
        yield FieldError("output_type", kind, "is not offered", f"use {one_of(list(_METRICS))}")
        return
    metrics = values.get("metric_list")
    if not isinstance(metrics, list) or not metrics or not all(_is_metric(metric, kind) for metric in metrics):
        remedy = f"use a list of {one_of([f'{{metric: {name}}}' for name in _METRICS[kind]])}"
        yield FieldError("metric_list", metrics, f"is not what {kind} is judged by", remedy)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and _TEMPLATE.fullmatch(item) for item in value)


def _is_metric(value: object, kind: str) -> bool:
    return isinstance(value, dict) and value.keys() == {"metric"} and value["metric"] in _METRICS[kind]
