"""Killed at any file operation, changed in any byte, made by an enemy: a checkpoint is whole, or refused by name."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import RanksFailed, run_ranks
from stores import differing, fill, flip, kill_at_file_operation, listener, placed, save, sign

from cuboid.parallel.layout import Layout
from cuboid.parallel.mesh import connect
from cuboid.trainer import inspection
from cuboid.trainer.checkpoint import Checkpointer, load, newest
from cuboid.trainer.manifest import MANIFEST, TENSORS, CheckpointError, FileRecord, read_manifest
from cuboid.trainer.publish import clean


def in_child(work: Callable[..., Any], *args: Any, seconds: float = 20) -> int | None:
    """Run ``work`` in a forked process; its exit code."""
    child = get_context("fork").Process(target=work, args=args)
    child.start()
    child.join(seconds)
    hangs = child.is_alive()
    child.kill()
    child.join()
    assert not hangs, "hangs"
    return child.exitcode


def save_and_die(folder: Path, number: int) -> None:
    tensors = placed(Layout(), None)
    seen = kill_at_file_operation(number, folder=folder)
    save(folder, tensors, 2, keep=1)
    (folder.parent / "count").write_text(str(len(seen)))


def check_survivor(folder: Path) -> int:
    """After any death: the newest valid checkpoint is whole, and the next start saves as if nothing had been."""
    path = inspection.newest(folder)
    assert path is not None
    tensors = placed(Layout(), None)
    step = load(path, tensors)["step"]
    assert differing(tensors, generation=step) == []
    save(folder, tensors, step + 1, keep=1)
    assert sorted(os.listdir(folder)) == ["latest", f"step-{step + 1:08d}"]
    return step


def test_killed_at_every_file_operation_of_a_save(tmp_path: Path) -> None:
    """From cleaning and the first file to removing the old checkpoint; none of them loses both."""
    survivors = []
    for number in range(1, 100):
        folder = tmp_path / f"at-{number}"
        save(folder, placed(Layout(), None), 1)
        if in_child(save_and_die, folder, number) == 0:
            break
        survivors.append(check_survivor(folder))
    assert int((tmp_path / "count").read_text()) == len(survivors) >= 15
    assert survivors == sorted(survivors)
    assert set(survivors) == {1, 2}


def save_until_killed(folder: Path, rank: int, number: int) -> None:
    """Rank 0 notes each step whose save returned, beside the folder: the kill counts the operations in it."""
    with connect(Layout(data=2), timeout_seconds=20) as block:
        if block.rank == rank:
            kill_at_file_operation(number, folder=folder)
        tensors = placed(Layout(data=2), block)
        with Checkpointer(folder, keep=1, asynchronous=False) as checkpointer:
            for step in range(2, 9):
                checkpointer.save(step, fill(tensors, generation=step), {})
                if block.rank == 0 and checkpointer.failure is None:
                    folder.with_name("saved").write_text(str(step))


@pytest.mark.parametrize(
    ("rank", "number"),
    [
        (0, 18),
        (1, 4),
        *(pytest.param(0, number, marks=pytest.mark.full) for number in range(1, 60, 4)),
        *(pytest.param(1, number, marks=pytest.mark.full) for number in range(1, 14)),
    ],
)
def test_one_killed_rank_leaves_whole_checkpoints(tmp_path: Path, rank: int, number: int) -> None:
    """The other rank notices at once instead of waiting, and the next start cleans up after both."""
    folder = tmp_path / "checkpoints"
    save(folder, placed(Layout(), None), 1)
    (tmp_path / "saved").write_text("1")
    with pytest.raises(RanksFailed) as failure:
        run_ranks(save_until_killed, 2, folder, rank, number, timeout=100)
    assert f"rank {rank} failed:\ndied with exit code -9" in str(failure.value)
    assert "stood here" not in str(failure.value)
    saved = int((tmp_path / "saved").read_text())
    assert saved <= check_survivor(folder) <= saved + 1


def save_for_ever(folder: Path, layout: Layout) -> None:
    with connect(layout, timeout_seconds=20) as block:
        tensors = {f"part-{block.rank}-{i}": torch.empty(1 << 20) for i in range(4)}
        with Checkpointer(folder, keep=2, asynchronous=True) as checkpointer:
            for step in range(1, 10_000):
                for tensor in tensors.values():
                    tensor.fill_(step)
                checkpointer.save(step, tensors, {})


def lead_ranks(folder: Path, layout: Layout) -> None:
    os.setsid()  # a group of processes of their own, to be killed as one
    run_ranks(save_for_ever, layout.world_size, folder, layout)


@pytest.mark.parametrize("seed", [1, 2, *(pytest.param(n, marks=pytest.mark.full) for n in range(3, 40))])
def test_all_ranks_killed_in_the_middle_of_bytes(tmp_path: Path, seed: int) -> None:
    layout = Layout(data=1 + seed % 2)
    leader = get_context("fork").Process(target=lead_ranks, args=(tmp_path, layout))
    leader.start()
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "latest").exists():
            assert leader.is_alive()
            assert time.monotonic() < deadline, "nothing is saved"
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0.0, 0.3))
        assert leader.is_alive(), "it was not killed but ended"
    finally:
        with suppress(ProcessLookupError):  # it failed before it had a group of its own
            os.killpg(leader.pid, signal.SIGKILL)
        leader.kill()
        leader.join()
    path = inspection.newest(tmp_path)
    assert path is not None
    tensors = {f"part-{rank}-{i}": torch.zeros(1 << 20) for rank in range(layout.data) for i in range(4)}
    step = load(path, tensors)["step"]
    assert all((tensor == step).all() for tensor in tensors.values())
    clean(tmp_path)
    assert all(name == "latest" or name.startswith("step-") for name in os.listdir(tmp_path))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with checkpoints of steps 1 and 2."""
    save(tmp_path, placed(Layout(), None), 1, 2)
    return tmp_path


def test_every_flipped_byte_is_found_in_every_file(saved: Path) -> None:
    """All bytes of the manifest, which vouches for the rest, and a sample of every other file."""
    path = saved / "step-00000002"
    dice = random.Random(0)
    for name in sorted(os.listdir(path)):
        good = (path / name).read_bytes()
        everywhere = range(len(good)) if name == MANIFEST else dice.sample(range(len(good)), min(100, len(good)))
        for position in everywhere:
            flip(path / name, position, dice.randrange(8))
            faults = inspection.verify(path)
            assert len(faults) == 1, (name, position)
            assert f"{path}: {name} " in faults[0] or f"{path}: {name}: " in faults[0]
            (path / name).write_bytes(good)
    assert inspection.verify(path) == []


def test_the_changed_tensor_is_named(saved: Path) -> None:
    path = saved / "step-00000002"
    record = inspection.read_table(path, read_manifest(path))["optimizer.exp_avg.layers.3.row"]
    (chunk,) = record.chunks
    for position, words in (
        (chunk.start, "first in tensor optimizer.exp_avg.layers.3.row"),
        (chunk.start + chunk.bytes - 1, "first in tensor optimizer.exp_avg.layers.3.row"),
        (20, "in its header"),
    ):
        flip(path / chunk.file, position)
        assert words in inspection.verify(path)[0]
        flip(path / chunk.file, position)


def resume_past_a_flip(folder: Path) -> tuple[str, list]:
    events, listen = listener()
    with connect(Layout(data=2), timeout_seconds=60) as block:
        path = newest(folder, event=listen)
        tensors = placed(Layout(data=2), block)
        load(path, tensors)
        assert differing(tensors, generation=1) == []
        save(folder, tensors, 2)
    return path.name, events


def test_a_run_goes_on_from_the_checkpoint_before_the_flipped_one(saved: Path) -> None:
    shard = next((saved / "step-00000002").glob("*.safetensors"))
    flip(shard, -1)
    (first, events), (second, silence) = run_ranks(resume_past_a_flip, 2, saved)
    assert first == second == "step-00000001"
    assert silence == []
    ((kind, fields),) = events
    assert kind == "checkpoint_refused"
    assert shard.name in fields["faults"][0]
    assert fields["moved_to"] == str(saved / "step-00000002.refused")
    assert sorted(os.listdir(saved)) == ["latest", "step-00000001", "step-00000002", "step-00000002.refused"]
    assert inspection.verify(saved / "step-00000002") == []


def test_a_run_whose_checkpoints_are_all_broken_does_not_begin_anew(saved: Path) -> None:
    for folder in (saved / "step-00000001", saved / "step-00000002"):
        flip(next(folder.glob("*.safetensors")), -1)
    for _ in range(2):  # the second start finds them renamed already
        with pytest.raises(CheckpointError, match=r"step-00000001\.refused, step-00000002\.refused\); .*--fresh"):
            newest(saved)


# An enemy signs what he made: his manifest is valid, and what it says is still refused.


def change_table(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    table = json.loads((path / TENSORS).read_text())
    change(table["model.embedding"])
    (path / TENSORS).write_text(json.dumps(table))
    sign(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["chunks"][0].update(file="../../etc/passwd"), "not a file of the manifest"),
        (lambda t: t["chunks"][0].update(start=1 << 40), "beyond the end"),
        (lambda t: t["chunks"][0].update(offsets=[1, 0]), "a piece outside itself"),
        (lambda t: t["chunks"].append(t["chunks"][0]), "not covered once"),
        (lambda t: t["chunks"].clear(), "not covered once"),
        (lambda t: t.update(shape=[-1, -192]), "does not describe"),
        (lambda t: t.update(shape=[1 << 70]), "does not describe"),
        (lambda t: t.update(dtype="OBJECT"), "unknown dtype"),
        (lambda t: t.pop("chunks"), "does not describe"),
    ],
)
def test_a_table_that_lies_is_refused(saved: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    change_table(saved / "step-00000002", change)
    with pytest.raises(CheckpointError, match=words):
        load(saved / "step-00000002", placed(Layout(), None))


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", ".hidden", "", "manifest.json", "x" * 300])
def test_a_manifest_that_leaves_its_folder_is_refused(saved: Path, name: str) -> None:
    path = saved / "step-00000002"
    sign(path, **{name: FileRecord(1, "0" * 64)})
    assert "refused" in inspection.verify(path)[0]
    with pytest.raises(CheckpointError, match="not a file of this folder"):
        load(path, placed(Layout(), None))


@pytest.mark.parametrize("name", ["shard-00000-00000.safetensors", "facts.json", "tensors.json", "manifest.json"])
@pytest.mark.parametrize("what", ["link", "pipe", "folder"])
def test_only_plain_files_are_opened(saved: Path, name: str, what: str) -> None:
    file = saved / "step-00000002" / name
    real = file.rename(saved / "elsewhere")
    {"link": lambda: file.symlink_to(real), "pipe": lambda: os.mkfifo(file), "folder": file.mkdir}[what]()
    assert "refused" in inspection.verify(file.parent)[0]
    assert inspection.newest(saved) == saved / "step-00000001"
    with pytest.raises(CheckpointError, match="refused"):
        load(file.parent, placed(Layout(), None))


def test_a_linked_checkpoint_is_refused(saved: Path) -> None:
    (saved / "step-00000002").rename(saved / "elsewhere")
    (saved / "step-00000002").symlink_to(saved / "elsewhere")
    assert "is a link" in inspection.verify(saved / "step-00000002")[0]
    shutil.rmtree(saved / "step-00000001")
    (saved / "elsewhere").rename(saved / "step-00000005")
    assert "it was renamed" in inspection.verify(saved / "step-00000005")[0]


@pytest.mark.parametrize(
    "header",
    [
        (1 << 60).to_bytes(8, "little"),
        (1 << 30).to_bytes(8, "little"),
        (2).to_bytes(8, "little") + b"[]",
        (8).to_bytes(8, "little") + b"\xff" * 8,
        b"\x80\x04\x95",
        bytes(8),
    ],
)
def test_a_shard_with_a_hostile_header_is_refused(saved: Path, header: bytes) -> None:
    path = saved / "step-00000002"
    shard = next(path.glob("*.safetensors"))
    shard.write_bytes(header + shard.read_bytes()[len(header) :])
    sign(path)
    with pytest.raises(CheckpointError, match="is not the safetensors file"):
        load(path, placed(Layout(), None))


@pytest.mark.parametrize("content", ['{"a": 1, "a": 2}', "[" * 100_000, "[]", "\xff", "{", '{"a": ' + "9" * 5000 + "}"])
def test_json_that_is_none_is_refused(saved: Path, content: str) -> None:
    path = saved / "step-00000002"
    (path / "facts.json").write_bytes(content.encode("latin-1"))
    sign(path)
    with pytest.raises(CheckpointError, match=r"facts\.json is not"):
        load(path, placed(Layout(), None))


def test_a_pickle_is_refused_by_its_name(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(b"\x80\x04.")
    for path in (tmp_path / "model.pt", tmp_path / "old.pt", tmp_path, tmp_path / "dcp"):
        for read in (inspection.resolve, inspection.inspect, lambda path: load(path, {})):
            with pytest.raises(CheckpointError, match="pickle"):
                read(path)
        assert "pickle" in inspection.verify(path)[0]


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"")
    for name, words in (("nowhere", "does not exist"), ("hf", "Hugging Face folder"), (".", "no complete checkpoint")):
        with pytest.raises(CheckpointError, match=words):
            inspection.resolve(tmp_path / name)
    assert inspection.newest(tmp_path / "nowhere") is None
    assert inspection.listing(tmp_path) == []
