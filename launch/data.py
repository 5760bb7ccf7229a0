"""`cuboid data`: what a run reads, decoded, with what is predicted in colour, and how much there is. A rich door."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.text import Text

from cuboid.parallel.errors import UserError, UserErrors
from cuboid.trainer.recipe_file import read_recipe

if TYPE_CHECKING:
    import numpy as np

    from cuboid.trainer.data import Dataset, Mixture
    from cuboid.trainer.tokenizer import Tokenizer

_PREDICTED, _MASKED, _SAID = "bold green", "dim", "cyan"
_OPEN, _CLOSE = "⟦", "⟧"
"""Around what is predicted, where there is no colour."""


def show(name: str, overrides: Sequence[str], *, number: int) -> None:
    """Print statistics of the recipe's data and the first ``number`` sequences of the run.

    Raises:
        UserError: everything that is wrong with the model's config, `data` or its content.
    """
    from cuboid.trainer.check_data import data_errors
    from cuboid.trainer.data import held_out_settings, prepare
    from cuboid.trainer.model_config import config_of
    from cuboid.trainer.tokenizer import open_tokenizer
    from cuboid.trainer.tokens import cache_folder

    source = read_recipe(name, overrides)
    recipe = source.recipe()
    console = Console(highlight=False)
    try:
        vocabulary = config_of(recipe).vocab_size
        if errors := list(data_errors(recipe, vocabulary)):
            raise UserErrors(errors)
        tokenizer = open_tokenizer(recipe.data.tokenizer, pretrained=recipe.model.pretrained, vocab_size=vocabulary)
        parts = {"training": recipe.data}
        if held_out := held_out_settings(recipe.data):
            parts["evaluation"] = held_out
        found = {
            part: prepare(settings, tokenizer=tokenizer, seed=recipe.seed, cache=cache_folder())
            for part, settings in parts.items()
        }
    except UserError as error:
        raise source.located(error) from None
    for sequence in range(number):
        _print_sequence(console, found["training"], sequence, tokenizer, paired=recipe.data.kind == "preference")
    for part, dataset in found.items():
        for entry, own in _sources(dataset):
            console.print(f"{part}{entry}: {_statistics(own)}", style=_SAID, markup=False, soft_wrap=True)


def _sources(dataset: Dataset | Mixture) -> Iterator[tuple[str, Dataset]]:
    """Each data set of a mixture and its share, in words."""
    from cuboid.trainer.data import Mixture

    if not isinstance(dataset, Mixture):
        yield "", dataset
        return
    for number, (share, part) in enumerate(zip(dataset.slots, dataset.parts, strict=True), start=1):
        yield f", entry {number} of data.path ({share / dataset.slots.sum():.1%} of the sequences)", part


def _statistics(dataset: Dataset) -> str:
    counts, facts = dataset.count(), dataset.facts
    filled = 1 - counts.tokens / (dataset.num_samples * dataset.sequence_length)
    pairs = dataset.packs is not None and dataset.packs.paired
    words = [
        f"{facts['documents'] // 2:,} pairs" if pairs else f"{facts['documents']:,} documents",
        f"{facts['tokens']:,} tokens",
        f"an epoch: {dataset.num_samples:,} sequences of {dataset.sequence_length}",
        f"{counts.predicted:,} tokens predicted ({counts.predicted / counts.tokens:.1%})",
        f"{filled:.1%} filled up",
        *([facts["left_out"]] if facts["left_out"] else []),
    ]
    return ", ".join(words)


class _Run(NamedTuple):
    """Neighbouring tokens of one document, all predicted or none."""

    document: int
    predicted: bool
    text: str


def _print_sequence(
    console: Console, dataset: Dataset | Mixture, number: int, tokenizer: Tokenizer, *, paired: bool
) -> None:
    batch = dataset.batch(range(number, number + 1))
    ids, labels, positions = (part[0].numpy() for part in (batch.input_ids, batch.labels, batch.position_ids))
    console.print(f"sequence {number + 1} of the run", style=_SAID, markup=False)
    text, document = Text(), -1
    for run in _runs(ids, labels, positions, tokenizer):
        if run.document != document:
            document = run.document
            text.append("" if text.plain.endswith("\n") or not text else "\n")
            name = f"document {document + 1}"
            if paired:
                name = f"pair {document // 2 + 1}, {'rejected' if document % 2 else 'chosen'}"
            text.append(f"--- {name}\n", _SAID)
        if console.color_system:
            text.append(run.text, _PREDICTED if run.predicted else _MASKED)
        else:
            text.append(f"{_OPEN}{run.text}{_CLOSE}" if run.predicted else run.text)
    console.print(text, soft_wrap=True)


def _runs(ids: np.ndarray, labels: np.ndarray, positions: np.ndarray, tokenizer: Tokenizer) -> Iterator[_Run]:
    """The sequence, [T] each, and the token after it where that is predicted; not what fills it up."""
    import numpy as np

    from cuboid.parallel.loss import IGNORE

    shown = np.append(ids, labels[-1])
    predicted = np.concatenate([[False], labels != IGNORE])
    used = np.flatnonzero(predicted | (shown != tokenizer.pad) & (shown != IGNORE)).max(initial=-1) + 1
    document = np.cumsum(np.append(positions, -1)[:used] == 0) - 1
    changes = np.flatnonzero((np.diff(document) != 0) | (np.diff(predicted[:used]) != 0)) + 1
    begin = 0
    for first, stop in pairwise([0, *changes.tolist(), used]):
        if not first or document[first] != document[first - 1]:
            begin, before = first, ""
        # with what stands before it, since some tokenizers drop a text's first space
        whole = tokenizer.decode(shown[begin:stop].tolist())
        yield _Run(int(document[first]), bool(predicted[first]), whole[len(before) :])
        before = whole
