"""Examples in sequences: whole, dense, cut as asked, found at once, the same ever after."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import run_ranks
from runs import recipe_on
from samples import BYTES, examples, prepared, write_rows

from cuboid.parallel.errors import FieldError
from cuboid.parallel.loss import IGNORE
from cuboid.parallel.mesh import connect
from cuboid.trainer import packing
from cuboid.trainer.assemble import assemble, initial_weights
from cuboid.trainer.data import prepare
from cuboid.trainer.model import draw_blueprint, whole_model
from cuboid.trainer.model_config import read_checked_config
from cuboid.trainer.packing import best_fit
from cuboid.trainer.recipe import Recipe

LENGTH = 32


def instructions(path: Path, number: int, longest: int = 60) -> str:
    """Questions and answers of any length; the answers of very different ones."""
    generator = np.random.default_rng(number)
    rows = []
    for row in range(number):
        question, answer = generator.integers(1, longest // 2, 2)
        rows.append({"prompt": f"{row}" + "q" * question, "response": "a" * (1 + answer * (row % 4 == 0))})
    return write_rows(path, rows)


def cut_by_hand(path: str, truncation: str) -> list[tuple[list[int], list[int]]]:
    """The examples that are left, from the rows themselves."""
    left = []
    for row in map(json.loads, Path(path).read_text().splitlines()):
        ids = [*f"{row['prompt']}\n\n{row['response']}".encode(), BYTES.end]
        answer = len(row["response"]) + 1
        labels = [*([IGNORE] * (len(ids) - answer - 1)), *ids[-answer:], IGNORE]
        if len(ids) > LENGTH:
            if truncation == "drop":
                continue
            cut = slice(LENGTH) if truncation == "end" else slice(len(ids) - LENGTH, None)
            ids, labels = ids[cut], [*labels[cut][:-1], IGNORE]
        if set(labels) != {IGNORE}:
            left.append((ids, labels))
    return left


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("truncation", ["end", "start", "drop"])
def test_examples_stay_whole_or_are_cut_as_asked(tmp_path: Path, packed: bool, truncation: str) -> None:
    path = instructions(tmp_path / "x.jsonl", 80)
    fields = {"kind": "instruct", "sequence_length": LENGTH, "truncation": truncation, "packing": packed}
    data = prepared(path, tmp_path / "cache", **fields)
    wanted = cut_by_hand(path, truncation)
    assert len(wanted) == 80 if truncation == "start" else 20 < len(wanted) < 80
    assert sorted(examples(data)) == sorted(wanted), "each once an epoch"
    cut = sum(len(ids) == LENGTH for ids, _ in wanted)
    assert (f"dropped as too long: {80 - len(wanted)}" in data.facts["left_out"]) == (len(wanted) < 80)
    assert ("cut to the length of a sequence" in data.facts["left_out"]) == (truncation != "drop" and cut > 0)
    needed = sum(len(ids) for ids, _ in wanted) / LENGTH
    assert data.num_samples == len(wanted) if not packed else needed <= data.num_samples <= 1.1 * needed + 1
    batch = data.batch(range(data.num_samples))
    assert (batch.labels != IGNORE).any(1).all(), "a sequence that predicts nothing"


def test_nothing_left_is_told_with_what_helps(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": "p" * 50, "response": "r"}] * 3)
    words = r"data.sequence_length=32 leaves no example .*: all 3 are dropped or cut before one; use more, or "
    for truncation in ("end", "drop"):
        with pytest.raises(FieldError, match=words):
            prepared(path, tmp_path / "cache", kind="instruct", sequence_length=32, truncation=truncation)
    assert prepared(path, tmp_path / "c", kind="instruct", sequence_length=32, truncation="start").num_documents == 3


@pytest.mark.parametrize("longest", [1, 7, 64, 200])
def test_best_fit_overfills_none_and_wastes_little(longest: int) -> None:
    lengths = np.random.default_rng(longest).integers(1, longest + 1, 5000)
    place = best_fit(lengths, 200)
    used = np.bincount(place, weights=lengths)
    assert used.max() <= 200
    assert used.min() > 0
    assert len(used) <= 11 / 9 * np.ceil(lengths.sum() / 200) + 1
    assert np.array_equal(place, best_fit(lengths, 200))
    # no two sequences could be one: best fit would have filled the first before it opened the second
    assert sum(sorted(used)[:2]) > 200 or len(used) == 1


def test_any_sequence_is_found_at_once_and_the_packing_is_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = instructions(tmp_path / "x.jsonl", 3000)
    options = {"kind": "instruct", "sequence_length": 128}
    data = prepared(path, tmp_path / "cache", **options)
    n = data.num_samples
    whole = data.batch(range(n - 8, n + 16))
    parts = [data.batch(range(n - 8 + 6 * rank, n - 2 + 6 * rank)) for rank in range(4)]
    for field in ("input_ids", "labels", "position_ids"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts]))
        assert getattr(whole, field).is_contiguous()
        assert getattr(whole, field).dtype == torch.int64
    seconds = []  # of the processor: the machine may be busy with other things
    for number in itertools.islice(itertools.count(10**12, 10**9 + 7), 50):
        began = time.thread_time()
        data.batch(range(number, number + 16))
        seconds.append(time.thread_time() - began)
    assert statistics.median(seconds) < 2e-3

    def again(*_: object) -> None:
        raise AssertionError("packed once more")

    monkeypatch.setattr(packing, "best_fit", again)
    assert prepared(path, tmp_path / "cache", **options).fingerprint == data.fingerprint
    with pytest.raises(AssertionError, match="packed once more"):
        prepared(path, tmp_path / "cache", **options | {"sequence_length": 127})


def test_the_fingerprint_tells_masks_templates_and_cuts_apart(tmp_path: Path) -> None:
    def fingerprint(rows: list[dict[str, str]], **fields: object) -> str:
        path = write_rows(tmp_path / "x.jsonl", rows)
        return prepared(path, tmp_path / "cache", **{"kind": "instruct", "sequence_length": 16, **fields}).fingerprint

    rows = [{"prompt": "ab", "response": "c" * 20}, {"prompt": "a", "response": "b"}]
    shifted = [{"prompt": "ab\n\n" + "c" * 10, "response": "c" * 8}, rows[1]]  # the same ids, another mask
    found = [
        fingerprint(rows),
        fingerprint(rows, truncation="drop"),
        fingerprint(rows, truncation="start"),
        fingerprint(rows, packing=False),
        fingerprint(rows, chat_template="chatml", truncation="start"),
        fingerprint(rows[::-1]),
        fingerprint(shifted),
        fingerprint(rows, seed=1),
    ]
    assert len(set(found)) == len(found)
    assert fingerprint(rows) == found[0]


def _enlarge(parameters: Iterable[torch.Tensor]) -> None:
    """Initial weights are so small that attention hardly matters."""
    with torch.no_grad():
        for parameter in parameters:
            if parameter.dim() > 1:
                parameter.mul_(5)


def evaluated(recipe: Recipe, cache: Path) -> list[tuple[float, int]]:
    """In every rank: (loss, predicted tokens) of an epoch, packed and with a sequence for each example."""
    found = []
    with connect(recipe.layout, timeout_seconds=60) as block:
        blueprint = draw_blueprint(read_checked_config(recipe.model), attention="auto")
        engine = assemble(recipe, block, blueprint, initial_weights(recipe, blueprint))
        _enlarge(parameter for _, parameter in engine.parameters)
        for packed in (True, False):
            settings = recipe.data.model_copy(update={"packing": packed})
            data = prepare(settings, tokenizer=BYTES, seed=recipe.seed, cache=cache)
            share = recipe.train.global_batch // block.layout.data
            numbers = range(block.coordinate.data * share, data.num_samples, recipe.train.global_batch)
            batches = (data.batch(range(n, min(n + share, data.num_samples))) for n in numbers)
            found.append(engine.evaluate(batches)[:2])
    return found


def test_a_packed_example_is_to_a_mesh_what_it_is_alone_to_transformers(tmp_path: Path) -> None:
    path = instructions(tmp_path / "x.jsonl", 48)
    data = {"kind": "instruct", "path": path, "sequence_length": 64}
    recipe = recipe_on("2x1x2", changes={"data": data})
    found = run_ranks(evaluated, recipe.layout.world_size, recipe, tmp_path / "cache", timeout=120)
    blueprint = draw_blueprint(read_checked_config(recipe.model), attention="auto")
    model, read = whole_model(blueprint), initial_weights(recipe, blueprint)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            read(name, tuple(slice(0, size) for size in parameter.shape), parameter)
        _enlarge(model.parameters())
        total, count = 0.0, 0
        for ids, labels in examples(prepared(path, tmp_path / "cache", kind="instruct", sequence_length=64)):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            total += F.cross_entropy(logits.double(), torch.tensor(labels), ignore_index=IGNORE, reduction="sum").item()
            count += sum(label != IGNORE for label in labels)
    for losses in found:
        for loss, tokens in losses:
            assert tokens == count
            assert loss == pytest.approx(total / count, rel=1e-6)
