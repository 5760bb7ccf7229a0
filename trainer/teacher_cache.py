"""What a teacher says of its likeliest tokens, written once and read instead of running it.

A cache is a folder of plain arrays, a row for each sample of T tokens:

- `keys.bin`, uint64 [n], rising: `key_of` a sample's content, so that neither its number nor the mesh matters;
- `rows.bin`, int64 [n]: where the sample with this key stands in the other two;
- `values.bin`, float32 [n, T, k + 1]: log-probabilities of the k likeliest tokens, and last of all others together;
- `ids.bin`, int32 [n, T, k]: which tokens those are;
- `facts.json`: what it was made of, written last.

A row is found by bisection of a memory map: a resumed run reads nothing twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cuboid.parallel.errors import FieldError, RunFailed, UserErrors
from cuboid.parallel.loss import IGNORE
from cuboid.trainer.cache import Facts, facts_of, mapped
from cuboid.trainer.check_distill import REWRITE, cache_errors
from cuboid.trainer.data import Batch, Dataset, Mixture
from cuboid.trainer.recipe import Recipe


def cached_teacher(recipe: Recipe, *, is_last: bool) -> CachedTeacher:
    """What `distill.cache` holds; raises UserErrors where it is not what the recipe asks for."""
    return CachedTeacher(cache_path(recipe), _facts(recipe), is_last=is_last)


def _facts(recipe: Recipe) -> Facts:
    if errors := list(cache_errors(recipe)):
        raise UserErrors(errors)
    facts = facts_of(cache_path(recipe))
    assert facts is not None
    return facts


def cache_path(recipe: Recipe) -> Path:
    assert recipe.distill is not None
    assert recipe.distill.cache is not None
    return Path(recipe.distill.cache).expanduser()


def refuse_other_data(recipe: Recipe, dataset: Dataset | Mixture) -> None:
    """Raises UserError where the samples of `distill.cache` are not those that the run reads."""
    facts, asked = _facts(recipe), samples_taught(recipe, dataset)
    assert recipe.distill is not None
    if facts["data"] != dataset.fingerprint:
        constraint = f"was written for other data (fingerprint {facts['data'][:12]}, not {dataset.fingerprint[:12]})"
    elif facts["samples"] < asked:
        constraint = f"holds {facts['samples']} samples, and the run reads {asked}"
    else:
        return
    raise FieldError("distill.cache", recipe.distill.cache, constraint, REWRITE)


def samples_taught(recipe: Recipe, dataset: Dataset | Mixture) -> int:
    """How many samples hold all that the run reads: those of its steps, or of one epoch, which holds each once. A
    mixture has no common epoch."""
    asked = recipe.train.steps * recipe.train.global_batch
    return asked if isinstance(dataset, Mixture) else min(asked, dataset.num_samples)


def key_of(input_ids: np.ndarray, position_ids: np.ndarray) -> int:
    """Of one sample's int64 [T] each: 64 bits of BLAKE2b. Among a billion samples any two share one with a chance of
    3%, and among ten million of 3 in a million."""
    digest = hashlib.blake2b(input_ids.tobytes() + position_ids.tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


class CachedTeacher:
    """Reads a cache on the rank with the last stage."""

    def __init__(self, folder: Path, facts: Facts, *, is_last: bool) -> None:
        self._folder, self._is_last = folder, is_last
        shape = facts["samples"], facts["sequence_length"]
        self._keys, self._rows = mapped(folder / "keys.bin", "<u8"), mapped(folder / "rows.bin", "<i8")
        self._values = mapped(folder / "values.bin", "<f4").reshape(*shape, facts["top_k"] + 1)
        self._ids = mapped(folder / "ids.bin", "<i4").reshape(*shape, facts["top_k"])

    def targets(self, batch: Batch) -> Mapping[str, Tensor]:
        """See `Teacher`; rows that predict nothing, as those that fill up a batch, need not be there.

        Raises:
            RunFailed: a sample is not in the cache.
        """
        if not self._is_last:
            return {}
        rows, length = batch.labels.shape
        values = np.zeros((rows, length, self._values.shape[-1]), np.float32)
        ids = np.zeros((rows, length, self._ids.shape[-1]), np.int32)
        taught = (batch.labels != IGNORE).any(1).cpu().numpy()
        contents = zip(batch.input_ids.cpu().numpy(), batch.position_ids.cpu().numpy(), strict=True)
        for row, content in enumerate(contents):
            if taught[row]:
                place = self._place(key_of(*content))
                values[row], ids[row] = self._values[place], self._ids[place]
        device = batch.labels.device
        return {"teacher": torch.from_numpy(values).to(device), "teacher_ids": torch.from_numpy(ids).to(device)}

    def _place(self, key: int) -> int:
        found = int(np.searchsorted(self._keys, np.uint64(key)))
        if found == len(self._keys) or self._keys[found] != key:
            raise RunFailed(f"{self._folder} does not hold a sample of this step: it was written for other data")
        return int(self._rows[found])
