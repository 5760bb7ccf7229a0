"""`cuboid evaluate`: what a finished model makes of text that it has not seen, and of the user's own tasks."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from cuboid.parallel.errors import UserError
from cuboid.trainer.held_out import SAMPLES, measure, passage_at, passage_of
from cuboid.trainer.model_folder import finished, load_model, read_config
from cuboid.trainer.tasks import ask, read_task


def evaluate(source: Path, *, data: str | None, tasks: Sequence[Path], samples: int | None, length: int | None) -> None:
    """Print the loss and perplexity of the model of a run, a checkpoint or a Hugging Face folder, and its scores.

    Args:
        data: text, given like `data.path`; None: what the run's own evaluation reads, or tasks alone.
        tasks: files of `tasks.read_task`.
        samples: how many are read of ``data``; None: 32.
        length: tokens in each; None: 512, or what the model takes.

    Raises:
        UserError: there is no model, or no text, or a task's file is refused.
    """
    questions = [read_task(path) for path in tasks]
    with tempfile.TemporaryDirectory() as place, finished(source, beside=Path(place) / "it") as found:
        passage = passage_of(found.recipe, None) if found.recipe and not tasks else None
        if data is not None:
            config = read_config(found.folder)
            passage = passage_at(data, field="--data", config=config, samples=samples or SAMPLES, length=length)
        elif (passage is None and not tasks) or samples or length:
            raise UserError("there is no text to measure on; give --data, a text named as data.path names one")
        model = load_model(found.folder)
        if passage is not None:
            result = measure(model, passage, found.folder)
            print(f"held-out loss  {result}, {result.tokens:,} tokens of {passage.words}")
        for task in questions:
            print(ask(model, found.folder, task))
