"""A finished model made smaller: the held-out loss before and after, the folder loaded again and compared.

The one procedure of every method; what a method does with the weights is its own file (`quantize`, `low_rank`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cuboid.trainer import inspection
from cuboid.trainer.calibration import Calibration
from cuboid.trainer.data import Batch
from cuboid.trainer.export import Exported
from cuboid.trainer.held_out import HeldOut, Passage, measure, passage_at, passage_of
from cuboid.trainer.model_folder import (
    Config,
    Finished,
    Model,
    check_equal,
    finished,
    is_model_folder,
    load_model,
    logits,
    quietly,
    read_config,
    refuse_compressed,
    weight_bytes,
)
from cuboid.trainer.out_folder import disk_errors_of, new_folder
from cuboid.trainer.tokenizer import save_tokenizer


class Method(Protocol):
    """A way to make a model smaller."""

    @property
    def calibration(self) -> Calibration | None:
        """The text that it asks which inputs the layers meet; None: it does not ask."""

    def check(self, config: Config) -> None:
        """Raises UserError where this model cannot be made smaller so."""

    def apply(self, folder: Path, calibration: Batch | None) -> Model:
        """The smaller model of the one in ``folder``; a calibration set is given to a method that asks for one."""

    def save(self, model: Model, folder: Path) -> None:
        """Write weights and config of the smaller model."""

    def load(self, folder: Path) -> Model:
        """The smaller model, out of what `save` wrote."""

    def words(self, model: Model) -> Sequence[str]:
        """What was done to the weights, a line each."""


@dataclass(frozen=True)
class Compressed:
    """What became of a model. The folder was loaded again, and its logits equal those of the model measured."""

    exported: Exported | None
    """The checkpoint that it was made of; None where the source was a Hugging Face folder."""
    passage: Passage | None
    """The held-out text."""
    before: HeldOut | None
    after: HeldOut | None
    bytes_before: int
    """Of the safetensors files."""
    bytes_after: int
    calibration: str | None
    """Which text was asked, how much of it, and how much of the held-out text it has."""
    words: tuple[str, ...]


def compress(
    source: Path, out: Path, method: Method, *, eval_path: str | None = None, overwrite: bool = False
) -> Compressed:
    """Write the model of ``source``, a run, a checkpoint or a Hugging Face folder, to ``out``, made smaller.

    The model is in memory twice at most. ``out`` appears when all is written and checked.

    Raises:
        UserError: there is no model, it cannot be made smaller so, a text cannot be read, or ``out`` may not be
            written.
        RunFailed: the folder does not give the smaller model's logits.
    """
    origin = source if is_model_folder(source) else inspection.resolve(source)
    with new_folder(out, source=origin, overwrite=overwrite) as folder, finished(source, beside=out) as model:
        refuse_compressed(model.folder)
        config = read_config(model.folder)
        method.check(config)
        passage = _passage(model, eval_path, config)
        asked = method.calibration.read(model, config, passage) if method.calibration else None
        before = measure(load_model(model.folder), passage, model.folder) if passage else None
        smaller = method.apply(model.folder, asked.batch if asked else None)
        after = measure(smaller, passage, model.folder) if passage else None
        expected, words = logits(smaller), tuple(method.words(smaller))
        with disk_errors_of(out), quietly():
            method.save(smaller, folder)
            save_tokenizer(str(model.folder), folder, pretrained=None, max_tokens=None)
        del smaller
        check_equal(logits(method.load(folder)), expected, out)
        return Compressed(
            exported=model.exported,
            passage=passage,
            before=before,
            after=after,
            bytes_before=weight_bytes(model.folder),
            bytes_after=weight_bytes(folder),
            calibration=asked.words if asked else None,
            words=words,
        )


def _passage(model: Finished, path: str | None, config: Config) -> Passage | None:
    if model.recipe is not None:
        return passage_of(model.recipe, path)
    return passage_at(path, field="--eval-path", config=config) if path else None
