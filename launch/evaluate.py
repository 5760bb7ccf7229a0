"""`cuboid evaluate`: what a finished model makes of text that it has not seen."""

from __future__ import annotations

import tempfile
from pathlib import Path

from cuboid.parallel.errors import UserError
from cuboid.trainer.held_out import SAMPLES, measure, passage_at, passage_of
from cuboid.trainer.model_folder import finished, load_model, read_config


def evaluate(source: Path, *, data: str | None, samples: int | None, length: int | None) -> None:
    """Print the loss and perplexity of the model of a run, a checkpoint or a Hugging Face folder.

    Args:
        data: text, given like `data.path`; None: what the run's own evaluation reads.
        samples: how many are read of ``data``; None: 32.
        length: tokens in each; None: 512, or what the model takes.

    Raises:
        UserError: there is no model, or no text.
    """
    with tempfile.TemporaryDirectory() as place, finished(source, beside=Path(place) / "it") as found:
        if data is not None:
            config = read_config(found.folder)
            passage = passage_at(data, field="--data", config=config, samples=samples or SAMPLES, length=length)
        else:
            own = passage_of(found.recipe, None) if found.recipe else None
            if own is None or samples or length:
                raise UserError("there is no text to measure on; give --data, a text named as data.path names one")
            passage = own
        result = measure(load_model(found.folder), passage, found.folder)
        print(f"held-out loss  {result}, {result.tokens:,} tokens of {passage.words}")
