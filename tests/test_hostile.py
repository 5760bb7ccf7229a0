"""Checkpoints of an enemy, and broken ones: refused by name, in words, at a small price; the one before is taken."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hostile import ALWAYS, BOMBS, changed, header_of, mutations, refusal
from hypothesis import given
from stores import differing, flip, placed, save, sign

from cuboid.parallel.layout import Layout
from cuboid.trainer import inspection
from cuboid.trainer.cache import facts_of
from cuboid.trainer.checkpoint import load, newest
from cuboid.trainer.manifest import FACTS, LATEST, MANIFEST, TENSORS, CheckpointError, marked
from cuboid.trainer.shards import encode_header


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of step 1; everything that reading it imports is imported."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save(folder, placed(Layout(), None), 1)
    load(folder / "step-00000001", placed(Layout(), None))
    return folder / "step-00000001"


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return shutil.copytree(original, tmp_path / original.name)


def load_checkpoint(path: Path) -> None:
    load(path, placed(Layout(), None))


PICKED = ((MANIFEST, "lists within bounds"), (TENSORS, "keys within bounds"), (FACTS, "lists"))
EVERY = [
    (name, bomb)
    for bomb in BOMBS
    for name in (MANIFEST, FACTS, TENSORS)
    if name != FACTS or "within bounds" not in bomb  # what a run wants to know is nobody's but its own
]


@pytest.mark.parametrize(
    ("name", "bomb"),
    [pytest.param(*case, marks=[] if case in PICKED else pytest.mark.full) for case in EVERY],
)
def test_json_that_unfolds_is_refused(checkpoint: Path, name: str, bomb: str) -> None:
    (checkpoint / name).write_bytes(BOMBS[bomb])
    if name != MANIFEST:
        sign(checkpoint)
    for work in (load_checkpoint, inspection.inspect):
        assert name in refusal(work, checkpoint)


def other_dtype(entries: dict[str, Any]) -> None:
    next(entry for key, entry in entries.items() if key != "__metadata__")["dtype"] = "I32"


def other_shape(entries: dict[str, Any]) -> None:
    entry = next(entry for key, entry in entries.items() if len(entry.get("shape", ())) == 2)
    entry["shape"] = entry["shape"][::-1]


def overlapping(entries: dict[str, Any]) -> None:
    first, second = [entry for key, entry in entries.items() if key != "__metadata__"][:2]
    second["data_offsets"] = first["data_offsets"]


def outside(entries: dict[str, Any]) -> None:
    next(entry for key, entry in entries.items() if key != "__metadata__")["data_offsets"] = [0, 1 << 50]


def endless_shape(entries: dict[str, Any]) -> None:
    next(entry for key, entry in entries.items() if key != "__metadata__")["shape"] = [1 << 62, 1 << 62]


HEADERS = (other_dtype, other_shape, overlapping, outside, endless_shape)


@pytest.mark.parametrize("lie", HEADERS)
def test_a_shard_whose_header_lies_is_refused(checkpoint: Path, lie: Callable[[dict[str, Any]], None]) -> None:
    shard = next(checkpoint.glob("*.safetensors"))
    entries, rest = header_of(shard)
    lie(entries)
    shard.write_bytes(encode_header(entries) + rest)
    table = json.loads((checkpoint / TENSORS).read_text())
    for record in table.values():  # the pieces lie elsewhere in the file now; the enemy says so
        for chunk in record["chunks"]:
            chunk["start"] = 0
    (checkpoint / TENSORS).write_text(json.dumps(table))
    sign(checkpoint)
    assert shard.name in refusal(load_checkpoint, checkpoint)


@pytest.mark.parametrize(
    "content", [b"../../elsewhere", b"/etc", b"step-00000009", b"\0" * 100, b"x" * 10_000_000, b""]
)
def test_a_latest_that_leads_nowhere_is_not_followed(checkpoint: Path, content: bytes) -> None:
    (checkpoint.parent / LATEST).write_bytes(content)
    named = marked(checkpoint.parent, LATEST)
    assert named is None or named == checkpoint.parent / "step-00000009"
    assert inspection.newest(checkpoint.parent) == checkpoint


@pytest.mark.parametrize(
    ("name", "is_signed"),
    [
        (MANIFEST, False),  # signed, it would be written anew
        ("shard", True),
        *(pytest.param(*case, marks=pytest.mark.full) for case in ((FACTS, True), (TENSORS, True), ("shard", False))),
    ],
)
def test_whatever_is_changed_in_a_checkpoint(original: Path, name: str, is_signed: bool) -> None:
    """Found by the file's name; or, where the enemy signed it, refused, or loaded with every tensor as it was."""
    with tempfile.TemporaryDirectory() as place:
        path = shutil.copytree(original, Path(place) / original.name)
        file = next(path.glob("*.safetensors")) if name == "shard" else path / name
        good = file.read_bytes()
        header, tail = (good[: 8 + int.from_bytes(good[:8], "little")], good) if name == "shard" else (good, b"")

        @ALWAYS
        @given(mutations(header))
        def check(content: bytes) -> None:
            whole = content + tail[len(header) :]
            with changed(file, whole), changed(path / MANIFEST, (path / MANIFEST).read_bytes()):
                if is_signed:
                    sign(path)
                faults = inspection.verify(path)
                assert is_signed or whole == good or (len(faults) == 1 and file.name in faults[0])
                tensors = placed(Layout(), None)
                with suppress(CheckpointError):
                    load(path, tensors)
                    assert differing(tensors, generation=1) == []

        check()


def swap(shard: Path) -> None:
    """The same name and size, of the checkpoint before."""
    shard.write_bytes((shard.parents[1] / "step-00000001" / shard.name).read_bytes())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "first in tensor "),
        (lambda shard: os.truncate(shard, shard.stat().st_size // 2), "bytes instead of"),
        (lambda shard: shard.unlink(), "No such file"),
        (swap, "first in tensor "),
    ],
    ids=["flipped bit", "truncated", "missing", "swapped"],
)
def test_a_broken_shard_costs_one_checkpoint(tmp_path: Path, damage: Callable[[Path], Any], words: str) -> None:
    save(tmp_path, placed(Layout(), None), 1, 2)
    shard = next((tmp_path / "step-00000002").glob("*.safetensors"))
    damage(shard)
    events: list[dict[str, Any]] = []
    started = time.monotonic()
    path = newest(tmp_path, event=lambda kind, **fields: events.append(fields))
    assert path == tmp_path / "step-00000001"
    tensors = placed(Layout(), None)
    load(path, tensors)
    assert time.monotonic() - started < 20
    assert differing(tensors, generation=1) == []
    ((fault,),) = (event["faults"] for event in events)
    assert shard.name in fault
    assert words in fault


@pytest.mark.parametrize("named", ["step-00000009", "step-00000001"], ids=["dangling", "stale"])
def test_a_wrong_latest_costs_nothing(tmp_path: Path, named: str) -> None:
    save(tmp_path, placed(Layout(), None), 1, 2)
    (tmp_path / LATEST).write_text(f"{named}\n")
    assert newest(tmp_path) == inspection.resolve(tmp_path) == tmp_path / "step-00000002"


@pytest.mark.parametrize(
    "facts",
    [
        BOMBS["lists"],
        BOMBS["depth"],
        json.dumps({"bytes": {"../../secret": 3}}).encode(),
        json.dumps({"bytes": {"pipe": 0}}).encode(),
        json.dumps({"bytes": [1]}).encode(),
        b"[]",
    ],
)
def test_a_cache_that_is_none_is_made_anew(tmp_path: Path, facts: bytes) -> None:
    (tmp_path / "entry").mkdir()
    os.mkfifo(tmp_path / "entry" / "pipe")
    (tmp_path / "entry" / "facts.json").write_bytes(facts)
    assert facts_of(tmp_path / "entry") is None
