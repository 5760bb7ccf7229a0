"""Examples in sequences: whole, dense, cut as asked, found at once, the same ever after."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import BYTES, examples, prepared, write_rows

from cuboid.parallel.errors import FieldError
from cuboid.parallel.loss import IGNORE
from cuboid.trainer import packing
from cuboid.trainer.packing import best_fit

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
