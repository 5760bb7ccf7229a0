"""A mixture: each data set with its share, its own epochs, found at once, the same on every mesh."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks
from runs import STEPS, check_resumed, losses, recipe_on, run
from samples import prepared, said, write_rows

from cuboid.trainer.check_data import data_errors
from cuboid.trainer.data import Mixture, slots
from cuboid.trainer.loop import train
from cuboid.trainer.recipe import MIXTURE

LETTERS, WEIGHTS = {"a": 40, "b": 7, "c": 300}, (2.0, 1.0, 0.5)


def mixture(folder: Path, **fields: Any) -> Mixture:
    """Rows of one letter and the row's number, a file for each letter."""
    paths = [
        write_rows(folder / f"{letter}.jsonl", [{"prompt": letter, "response": f"{row:03}"} for row in range(count)])
        for letter, count in LETTERS.items()
    ]
    options = {"kind": "instruct", "sequence_length": 12, "packing": False, "weights": WEIGHTS, **fields}
    found = prepared(paths, folder / "cache", **options)
    assert isinstance(found, Mixture)
    return found


def test_each_has_its_share_and_its_own_epochs(tmp_path: Path) -> None:
    found = mixture(tmp_path)
    assert found.slots.sum() == MIXTURE
    assert np.abs(found.slots / MIXTURE - np.array(WEIGHTS) / sum(WEIGHTS)).max() <= 1 / MIXTURE
    rows = [bytes(row[:6].tolist()).decode() for row in found.batch(range(3 * MIXTURE)).input_ids]
    for cycle in range(3):
        counts = Counter(row[0] for row in rows[cycle * MIXTURE : (cycle + 1) * MIXTURE])
        assert [counts[letter] for letter in LETTERS] == found.slots.tolist()
    for letter, count in LETTERS.items():
        own = [row for row in rows if row[0] == letter]
        seen = Counter(own).values()
        assert len(seen) == count, f"of {letter} some never come"
        # an epoch of its own may stand open at the end
        assert max(seen) - min(seen) <= 1
    assert rows[:MIXTURE] != rows[MIXTURE : 2 * MIXTURE]


def test_any_sample_is_found_at_once_whatever_the_mesh(tmp_path: Path) -> None:
    found = mixture(tmp_path)
    whole = found.batch(range(MIXTURE - 12, MIXTURE + 12))
    parts = [found.batch(range(first, first + 6)) for first in range(MIXTURE - 12, MIXTURE + 12, 6)]
    for field in ("input_ids", "labels", "position_ids"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts]))
    assert found.batch(range(10**15, 10**15 + 2)).input_ids.shape == (2, 12)
    assert found.batch(range(0)).input_ids.shape == (0, 12)
    assert mixture(tmp_path).fingerprint == found.fingerprint
    others = [mixture(tmp_path, **fields) for fields in ({"weights": (2.0, 1.0, 1.0)}, {"sequence_length": 13})]
    assert len({found.fingerprint, *(other.fingerprint for other in others)}) == 3


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0), (3.0, 2.0, 2.0), (1.0, 1022.9), (0.1, 0.7, 0.05, 0.15)])
def test_shares_are_rounded_to_the_nearest(weights: tuple[float, ...]) -> None:
    shares = slots(weights)
    assert shares.sum() == MIXTURE
    assert shares.min() >= 1
    assert np.abs(shares - np.array(weights) / sum(weights) * MIXTURE).max() < 1


def test_weights_that_cannot_be_are_told(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"text": "some"}])

    def told(**data: Any) -> str:
        (error,) = data_errors(recipe_on(changes={"data": data}), 264)
        return str(error)

    remedy = "give data.path as a list, and a weight for each entry"
    assert told(path=path, weights=[1.0]) == f"data.weights=[1.0] gives 1 for 1 of data.path; {remedy}"
    assert told(path=[path, path], weights=[1.0]) == f"data.weights=[1.0] gives 1 for 2 of data.path; {remedy}"
    assert told(path=[path, path], weights=[1.0, 2000.0]) == (
        "data.weights=[1.0, 2000.0] gives an entry of data.path less than 1 of 1024 sequences; "
        "use at least 2, or leave the entry out"
    )


@pytest.mark.full
def test_a_run_on_a_mixture_goes_on_at_the_same_sample(tmp_path: Path) -> None:
    paths = []
    for name in ("first", "second"):
        rows = [{"messages": said(name * (1 + row % 5), f"{row}" * (1 + row % 7))} for row in range(30)]
        paths.append(write_rows(tmp_path / f"{name}.jsonl", rows))
    data = {"kind": "chat", "chat_template": "chatml", "sequence_length": 128, "path": paths, "weights": [3, 1]}
    recipe = recipe_on("1x2x1", changes={"data": data})
    run(recipe, tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "stop").write_text("enough")
    assert run_ranks(train, 2, recipe, tmp_path / "parts", timeout=60) == ["enough"] * 2
    (tmp_path / "parts" / "stop").unlink()
    run(recipe, tmp_path / "parts")
    check_resumed(tmp_path / "parts", at=1)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == STEPS
