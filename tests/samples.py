"""Small data sets as the trainer prepares them, shared by the tests of data and corpora."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cuboid.trainer.data import Dataset, prepare
from cuboid.trainer.recipe import DataSettings
from cuboid.trainer.tokenizer import ByteTokenizer, Tokenizer

BYTES = ByteTokenizer()


def prepared(path: str, cache: Path, *, seed: int = 0, tokenizer: Tokenizer = BYTES, **fields: Any) -> Dataset:
    """The data set of ``data.path``, in sequences of 8 unless ``fields`` of `data` say otherwise."""
    settings = DataSettings(kind="text", path=path, **{"sequence_length": 8, **fields})
    return prepare(settings, tokenizer=tokenizer, seed=seed, cache=cache)
