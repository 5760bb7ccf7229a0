"""The loss of a finished model on text that it has not seen, in one process and by transformers' own forward.

Shapes: B rows of samples at a time, T tokens of a sample, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cuboid.parallel.errors import FieldError
from cuboid.parallel.loss import IGNORE, perplexity
from cuboid.parallel.stages import Masks
from cuboid.trainer.data import Batch, Dataset, Mixture, held_out_settings, prepare
from cuboid.trainer.model import Blueprint, find_parts, whole_masks
from cuboid.trainer.model_folder import Config, Model, quietly, read_config
from cuboid.trainer.recipe import DataSettings, Recipe
from cuboid.trainer.tokenizer import PretrainedTokenizer
from cuboid.trainer.tokens import cache_folder

SAMPLES, SEQUENCE_LENGTH = 32, 512
"""For a folder that no recipe came with: how many samples, of how many tokens."""
_ROWS = 4


@dataclass(frozen=True)
class HeldOut:
    """What a model makes of a text."""

    loss: float
    """Mean over the predicted tokens, in nats."""
    tokens: int
    """Predicted."""

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    def __str__(self) -> str:
        return f"{self.loss:.4f} (perplexity {self.perplexity:,.2f})"


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Which text is held out, and how much of it is read."""

    field: str
    """Where the user named it."""
    data: DataSettings
    samples: int
    """At most so many."""
    seed: int = 0
    """Of their order."""

    @property
    def words(self) -> str:
        """The text's name."""
        return self.data.path if isinstance(self.data.path, str) else ", ".join(self.data.path)

    def open(self, folder: Path) -> Dataset | Mixture:
        """The samples, in the tokens of the model in ``folder``.

        Raises:
            UserError: the text or the tokenizer cannot be read.
        """
        try:
            with quietly():
                tokenizer = PretrainedTokenizer(str(folder), field="tokenizer")
            if tokenizer.vocab_size > (size := read_config(folder).vocab_size):
                constraint = f"has ids up to {tokenizer.vocab_size - 1}, which do not fit the model's vocab_size={size}"
                raise FieldError("tokenizer", folder, constraint, "put the model's own tokenizer there")
            return prepare(self.data, tokenizer=tokenizer, seed=self.seed, cache=cache_folder())
        except FieldError as error:
            if error.field != "data.path":
                raise
            raise FieldError(self.field, error.value, error.constraint, error.remedy) from error

    def read(self, folder: Path) -> Batch:
        """All the samples at once."""
        dataset = self.open(folder)
        return dataset.batch(range(min(self.samples, dataset.num_samples)))


def passage_of(recipe: Recipe, path: str | None) -> Passage | None:
    """What the recipe's evaluation reads, so that the loss is its `eval_loss`, or as much of the text at ``path``; None
    where there is neither. Of pairs of answers no loss is a model's alone: what ``path`` names is read as text."""
    of_pairs = recipe.data.kind == "preference"
    wanted = path if of_pairs else path or recipe.data.eval_path
    if wanted is None:
        return None
    data = held_out_settings(recipe.data.model_copy(update={"eval_path": wanted}))
    assert data is not None
    if of_pairs:
        data = data.model_copy(update={"kind": "text"})
    return Passage(
        field="data.eval_path" if path is None else "--eval-path",
        data=data,
        samples=recipe.train.eval_batches * recipe.train.global_batch,
        seed=recipe.seed,
    )


def passage_at(path: str, *, field: str, config: Config, samples: int = SAMPLES, length: int | None = None) -> Passage:
    """Text for a model that no recipe came with: documents one after another, apart, cut every ``length`` tokens (512,
    or as many as the model takes).

    Raises:
        FieldError: ``length`` is more than the model takes.
    """
    longest = getattr(config, "max_position_embeddings", None) or length or SEQUENCE_LENGTH
    if length is not None and length > longest:
        constraint = f"is longer than the model's max_position_embeddings={longest}"
        raise FieldError("--length", length, constraint, f"use at most {longest}")
    data = DataSettings(kind="text", path=path, sequence_length=length or min(SEQUENCE_LENGTH, longest))
    return Passage(field=field, data=data, samples=samples)


def attention_masks(model: Model, position_ids: Tensor) -> Masks | None:
    """What transformers' own forward takes as its attention mask so that documents are kept apart."""
    return whole_masks(Blueprint(model.config, model, find_parts(model), model.dtype), position_ids)


@torch.no_grad()
def measure(model: Model, passage: Passage, folder: Path) -> HeldOut:
    """Mean loss of the model, whose tokenizer is in ``folder``, over the passage's samples, each once."""
    dataset = passage.open(folder)
    count = min(passage.samples, dataset.num_samples)
    total, tokens = 0.0, 0
    for start in range(0, count, _ROWS):
        batch = dataset.batch(range(start, min(start + _ROWS, count)))  # [B, T] each
        masks = attention_masks(model, batch.position_ids)
        logits_BTV = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=masks, use_cache=False
        ).logits.float()
        labels = batch.labels.flatten()
        total += F.cross_entropy(logits_BTV.flatten(0, 1), labels, ignore_index=IGNORE, reduction="sum").item()
        tokens += int((labels != IGNORE).sum())
    return HeldOut(total / max(tokens, 1), tokens)
