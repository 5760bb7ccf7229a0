"""`cuboid teach`: the teacher alone is shown the run's samples, and what it says is written into `distill.cache`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from cuboid.parallel.mesh import Block, connect
from cuboid.trainer.assemble import live_teacher
from cuboid.trainer.cache import Facts, flush
from cuboid.trainer.check_distill import CACHE_FORMAT
from cuboid.trainer.data import Batch, Dataset, Mixture, prepare
from cuboid.trainer.model import local_folder
from cuboid.trainer.model_config import config_of
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.teacher import Teacher
from cuboid.trainer.teacher_cache import cache_path, key_of, samples_taught
from cuboid.trainer.tokenizer import open_tokenizer
from cuboid.trainer.tokens import cache_folder
from cuboid.trainer.weights import fingerprint


def teach(recipe: Recipe, folder: Path) -> None:
    """What every rank runs: write the recipe's cache. It gets its name when all is on disk.

    Args:
        recipe: whose mesh the teacher stands on, and whose batches it is shown.
        folder: of the ranks' logs; nothing of this goes there.
    """
    assert recipe.distill is not None
    device = torch.device("cpu") if recipe.launch.device == "cpu" else None
    with connect(recipe.layout, timeout_seconds=recipe.launch.timeout_seconds, device=device) as block:
        # the student's: its vocabulary and tokenizer make the samples
        pretrained, vocabulary = recipe.model.pretrained, config_of(recipe).vocab_size
        tokenizer = open_tokenizer(recipe.data.tokenizer, pretrained=pretrained, vocab_size=vocabulary)
        dataset = prepare(recipe.data, tokenizer=tokenizer, seed=recipe.seed, cache=cache_folder())
        write(recipe, block, live_teacher(recipe, block), dataset)


def write(recipe: Recipe, block: Block, teacher: Teacher, dataset: Dataset | Mixture) -> None:
    """Each rank with a last stage writes the rows of its own samples; tensor ranks know the same, and one writes."""
    settings = recipe.distill
    assert settings is not None
    assert settings.top_k is not None
    final, count = cache_path(recipe).absolute(), samples_taught(recipe, dataset)
    folder, length = final.with_name(f".{final.name}.partial"), recipe.data.sequence_length
    row_bytes = {"keys.bin": 8, "values.bin": 4 * length * (settings.top_k + 1), "ids.bin": 4 * length * settings.top_k}
    if block.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of a killed one
        folder.mkdir(parents=True)
        for name, size in row_bytes.items():
            with open(folder / name, "wb") as file:
                file.truncate(count * size)
    dist.barrier()
    for first, batch in _batches(recipe, block, dataset, count):
        full = batch.filled_up(recipe.batch_plan.global_batch // block.layout.data)
        said, rows = teacher.targets(full.to(block.device)), len(batch.labels)
        if said and rows and block.coordinate.tensor == 0:
            contents = zip(batch.input_ids.numpy(), batch.position_ids.numpy(), strict=True)
            arrays = {"keys.bin": np.array([key_of(*content) for content in contents], "<u8")}
            arrays |= {"values.bin": said["teacher"][:rows].cpu().numpy()}
            arrays |= {"ids.bin": said["teacher_ids"][:rows].cpu().numpy()}
            for name, array in arrays.items():
                with open(folder / name, "r+b") as file:
                    file.seek(first * row_bytes[name])
                    file.write(np.ascontiguousarray(array).tobytes())
    dist.barrier()
    if block.rank == 0:
        facts = {
            "format": CACHE_FORMAT,
            "teacher": fingerprint(local_folder(settings.teacher)),
            "data": dataset.fingerprint,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "sequence_length": length,
            "samples": count,
        }
        _conclude(folder, final, facts)
    dist.barrier()


def _batches(recipe: Recipe, block: Block, dataset: Dataset | Mixture, count: int) -> Iterator[tuple[int, Batch]]:
    """This data rank's share of each of the run's first batches, and the number of its first sample; of the last batch
    there may be less, or nothing."""
    plan = recipe.batch_plan
    for number in range(1, -(-count // plan.global_batch) + 1):
        samples = plan.samples(number, block.coordinate.data)
        yield samples.start, dataset.batch(samples[: max(0, count - samples.start)])


def _conclude(folder: Path, final: Path, facts: Facts) -> None:
    """Sort the keys, write the facts, and give the folder its name."""
    keys = np.fromfile(folder / "keys.bin", "<u8")
    rows = np.argsort(keys, kind="stable").astype("<i8")
    keys[rows].tofile(folder / "keys.bin")
    rows.tofile(folder / "rows.bin")
    for path in folder.iterdir():
        with open(path, "r+b") as file:
            flush(file)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    with open(folder / "facts.json", "w") as file:
        json.dump({**facts, "bytes": sizes}, file, indent=1)
        flush(file)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(folder, final)
