"""Saved on one mesh, loaded on another, bit for bit; asynchronous, kept, and going on where a disk does not."""

import ctypes
import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from threading import Event, Timer

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from stores import PARTS, SHAPES, Events, differing, fill, listener, placed, save, value
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import load as plain_dcp_load
from torch.distributed.tensor import DTensor, Shard

from cuboid.parallel.errors import UserError
from cuboid.parallel.layout import Layout
from cuboid.parallel.mesh import connect
from cuboid.trainer import inspection
from cuboid.trainer.checkpoint import Checkpointer, load, newest
from cuboid.trainer.manifest import MANIFEST, PARTIAL, CheckpointError, read_manifest
from cuboid.trainer.tensor_table import read_table

CUBE = Layout(pipeline=2, data=2, tensor=2)
NUM_BYTES = 4 * len(PARTS) * sum(torch.Size(shape).numel() for shape in SHAPES.values())


def save_on(layout: Layout, folder: Path, steps: tuple[int, ...], shard: bool = True) -> list:
    with connect(layout, timeout_seconds=60) as block:
        return save(folder, placed(layout, block, shard=shard), *steps)


def load_on(layout: Layout, folder: Path, step: int, shard: bool = True) -> tuple[list[str], dict]:
    with connect(layout, timeout_seconds=60) as block:
        tensors = placed(layout, block, shard=shard)
        path = newest(folder)
        assert path == folder / f"step-{step:08d}"
        facts = load(path, tensors)
        return differing(tensors, generation=step), facts


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2, saved by 8 ranks."""
    folder = tmp_path_factory.mktemp("cube")
    run_ranks(save_on, 8, CUBE, folder, (1, 2))
    return folder


def test_one_process_loads_what_a_cube_saved(cube: Path) -> None:
    tensors = placed(Layout(), None)
    facts = load(cube / "step-00000002", tensors)
    assert differing(tensors, generation=2) == []
    assert facts == {"step": 2, "run_id": "abc", "generation": 2}


@pytest.mark.parametrize(
    ("layout", "shard"),
    [
        (Layout(data=4), True),
        (Layout(pipeline=2, tensor=2), True),
        (Layout(pipeline=3, data=2), False),
        pytest.param(CUBE, True, marks=pytest.mark.full),
        pytest.param(Layout(pipeline=2, data=3), True, marks=pytest.mark.full),
        pytest.param(Layout(data=2, tensor=3), False, marks=pytest.mark.full),
        pytest.param(Layout(tensor=4), True, marks=pytest.mark.full),
        pytest.param(Layout(pipeline=6), True, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_any_mesh_loads_what_a_cube_saved(cube: Path, layout: Layout, shard: bool) -> None:
    for different, facts in run_ranks(load_on, layout.world_size, layout, cube, 2, shard):
        assert different == []
        assert facts["step"] == 2


@pytest.mark.parametrize(
    ("layout", "shard"),
    [
        (Layout(), True),
        (Layout(pipeline=2, data=2), False),
        pytest.param(Layout(pipeline=3), True, marks=pytest.mark.full),
        pytest.param(Layout(data=4, tensor=2), True, marks=pytest.mark.full),
        pytest.param(Layout(data=2, tensor=2), False, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_replicas_and_tied_copies_are_written_once(tmp_path: Path, layout: Layout, shard: bool) -> None:
    """Also the embedding, which stands on the first and on the last stage."""
    run_ranks(save_on, layout.world_size, layout, tmp_path, (1,), shard)
    path = tmp_path / "step-00000001"
    table = read_table(path, read_manifest(path))
    assert table.keys() == {f"{part}.{name}" for part in PARTS for name in SHAPES}
    assert sum(chunk.bytes for record in table.values() for chunk in record.chunks) == NUM_BYTES
    tensors = placed(Layout(), None)
    load(path, tensors)
    assert differing(tensors, generation=1) == []


def test_torch_itself_reads_the_shards(cube: Path) -> None:
    """The files are those of torch's HuggingFaceStorageReader, whatever becomes of cuboid."""
    tensors = placed(Layout(), None)
    plain_dcp_load(tensors, storage_reader=HuggingFaceStorageReader(str(cube / "step-00000002")), no_dist=True)
    assert differing(tensors, generation=2) == []


def save_mixed(folder: Path) -> None:
    """A tied copy that is whole on one stage and divided on the other."""
    layout = Layout(pipeline=2, tensor=2)
    with connect(layout) as block:
        whole = value("tied", (8, 2))
        if block.coordinate.pipeline == 1:
            rows = whole.chunk(2)[block.coordinate.tensor].clone()
            whole = DTensor.from_local(rows, block.mesh["tensor"], [Shard(0)], run_check=False)
        save_as = {"tied": whole}
        with Checkpointer(folder, keep=1, asynchronous=False) as checkpointer:
            checkpointer.save(1, save_as, {})
        target = {"tied": torch.zeros_like(whole)}
        load(folder / "step-00000001", target)
        mine = target["tied"]
        assert torch.equal(*(t.to_local() if isinstance(t, DTensor) else t for t in (mine, whole)))


def test_copies_that_are_cut_differently_are_one_tensor(tmp_path: Path) -> None:
    run_ranks(save_mixed, 4, tmp_path)


def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "count": torch.tensor([2**62, -1]),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "half": value("half", (3, 3), torch.bfloat16),
        "eighth": value("eighth", (5,)).to(torch.float8_e4m3fn),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    with Checkpointer(tmp_path, keep=1, asynchronous=False) as checkpointer:
        checkpointer.save(1, tensors, {})
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load(tmp_path / "step-00000001", found)
    for name, tensor in tensors.items():
        assert torch.equal(
            found[name].contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)
        ), name


def save_behind(folder: Path) -> Events:
    """Asynchronously, while the tensors change at once after each call."""
    events, listen = listener()
    layout = Layout(data=2)
    with connect(layout) as block:
        tensors = placed(layout, block)
        with Checkpointer(folder, keep=2, asynchronous=True, event=listen) as checkpointer:
            checkpointer.prepare(tensors)
            for step in range(1, 5):
                checkpointer.save(step, fill(tensors, generation=step), {})
                fill(tensors, generation=99)
        assert checkpointer.failure is None
        assert checkpointer.newest == folder / "step-00000004"
    return events


def test_a_save_holds_the_tensors_as_they_were(tmp_path: Path) -> None:
    """And `keep` leaves the newest two."""
    events = run_ranks(save_behind, 2, tmp_path)[0]
    assert [fields["step"] for kind, fields in events if kind == "checkpoint"] == [1, 2, 3, 4]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000003", "step-00000004"]
    assert (tmp_path / "latest").read_text() == "step-00000004\n"
    for step in (3, 4):
        tensors = placed(Layout(), None)
        load(tmp_path / f"step-{step:08d}", tensors)
        assert differing(tensors, generation=step) == []
    assert [row["step"] for row in inspection.listing(tmp_path)] == [4, 3]
    assert inspection.resolve(tmp_path / "latest") == tmp_path / "step-00000004"


def test_a_save_returns_at_once_and_the_next_one_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is held up: nothing is written yet when the first save returns; the second says that it waited."""
    gate, write = Event(), Checkpointer._write

    def held_up(checkpointer: Checkpointer, partial: Path) -> object:
        assert gate.wait(30)
        return write(checkpointer, partial)

    monkeypatch.setattr(Checkpointer, "_write", held_up)
    (events, listen), tensors = listener(), placed(Layout(), None)
    with Checkpointer(tmp_path, keep=2, asynchronous=True, event=listen) as checkpointer:
        checkpointer.save(1, fill(tensors, generation=1), {})
        assert os.listdir(tmp_path) == []
        assert events == []
        Timer(0.3, gate.set).start()
        checkpointer.save(2, fill(tensors, generation=2), {})
    assert [(kind, fields["step"]) for kind, fields in events] == [
        ("checkpoint", 1),
        ("checkpoint_waited", 2),
        ("checkpoint", 2),
    ]
    assert 0.25 < events[1][1]["seconds"] < 30
    for step in (1, 2):
        load(tmp_path / f"step-{step:08d}", tensors)
        assert differing(tensors, generation=step) == []


def test_only_whole_checkpoints_count_for_keep(tmp_path: Path) -> None:
    tensors = placed(Layout(), None)
    save(tmp_path, tensors, 1, 2, 3)
    (tmp_path / "step-00000003" / "tensors.json").unlink()
    save(tmp_path, tensors, 4, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000002", "step-00000003", "step-00000004"]
    assert [bool(row["fault"]) for row in inspection.listing(tmp_path)] == [False, True, False]


def test_a_step_that_is_done_again_replaces_the_old_one(tmp_path: Path) -> None:
    tensors = placed(Layout(), None)
    save(tmp_path, tensors, 1, 2)
    (tmp_path / "step-00000002" / "facts.json").write_text("{}")
    save(tmp_path, tensors, 2)
    assert inspection.verify(tmp_path / "step-00000002") == []
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001", "step-00000002"]


# A disk that refuses: the training goes on, the last good checkpoint stays, the next save tries again.


def save_against_a_limit(folder: Path) -> tuple[Events, list]:
    """Rank 1 may only write small files while step 2 is saved."""
    events, listen = listener()
    layout = Layout(data=2)
    with connect(layout, timeout_seconds=60) as block:
        tensors = placed(layout, block)
        failures = []
        with Checkpointer(folder, keep=3, asynchronous=True, event=listen) as checkpointer:
            for step in (1, 2, 3):
                if block.rank == 1:
                    soft = 1024 if step == 2 else resource.RLIM_INFINITY
                    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))
                checkpointer.save(step, fill(tensors, generation=step), {})
                checkpointer.wait()
                failures.append(checkpointer.failure and str(checkpointer.failure))
                dist.barrier()
                if step == 2:
                    assert sorted(os.listdir(folder)) == ["latest", "step-00000001"]
                dist.barrier()
        return events, failures


def test_one_rank_that_cannot_write_stops_nobody(tmp_path: Path) -> None:
    (events, *_), *others = zip(*run_ranks(save_against_a_limit, 2, tmp_path), strict=True)
    assert [kind for kind, _ in events] == ["checkpoint", "checkpoint_failed", "checkpoint"]
    failed = events[1][1]
    assert (failed["step"], failed["rank"]) == (2, 1)
    assert "File too large" in failed["cause"]
    assert failed["newest"] == str(tmp_path / "step-00000001")
    for failures in others[0]:
        assert failures == [None, "rank 1: shard-00001-00000.safetensors: File too large", None]
    assert inspection.newest(tmp_path) == tmp_path / "step-00000003"


_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER


def mount_small_disk(folder: Path) -> str:
    """A file system of 1 MiB that only this process and its children see, and that ends with them; or why not.

    Without the right to mount, a user namespace gives it.
    """
    if sys.platform != "linux":
        return "no mount namespaces"
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_MOUNTS):
        if libc.unshare(_NEW_USER | _NEW_MOUNTS):
            return f"no mount namespace: {os.strerror(ctypes.get_errno())}"
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    for arguments in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]):
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            return done.stderr.strip()
    return ""


def save_until_full_and_read_only(folder: Path) -> Events:
    events, listen = listener()
    with connect(Layout(data=2), timeout_seconds=60) as block:
        tensors = {f"part-{block.rank}": torch.ones(48 << 10)}  # 192 KiB a rank
        with Checkpointer(folder, keep=1, asynchronous=False, event=listen) as checkpointer:
            checkpointer.save(1, tensors, {})
            if block.rank == 0:
                (folder / "ballast").write_bytes(b"0" * (350 << 10))
            checkpointer.save(2, tensors, {})
            if block.rank == 0:
                (folder / "ballast").unlink()
            for step, mode in ((3, "ro"), (4, "rw")):  # what a kernel does to a disk with errors, and a repair
                dist.barrier()
                if block.rank == 0:
                    subprocess.run(["mount", "-o", f"remount,{mode}", str(folder)], check=True)
                dist.barrier()
                checkpointer.save(step, tensors, {})
    return events


def save_on_a_small_disk(folder: Path) -> tuple[str, Events]:
    refusal = mount_small_disk(folder)
    return refusal, [] if refusal else run_ranks(save_until_full_and_read_only, 2, folder)[0]


def test_no_space_and_a_read_only_disk_are_told_and_survived(tmp_path: Path) -> None:
    ((refusal, events),) = run_ranks(save_on_a_small_disk, 1, tmp_path)
    if refusal:
        assert os.environ.get("CI") != "true", f"must run here, and cannot: {refusal}"
        pytest.skip(f"needs a small disk: {refusal}")
    assert [kind for kind, _ in events] == ["checkpoint", "checkpoint_failed", "checkpoint_failed", "checkpoint"]
    for (_, failed), cause in zip(events[1:3], ("No space left", "Read-only file system"), strict=True):
        assert cause in failed["cause"]
        assert failed["newest"] == str(tmp_path / "step-00000001")


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Checkpointer(tmp_path / "file" / "checkpoints", keep=1, asynchronous=False)


# What does not fit is refused in words, on every rank.


def load_wrong(folder: Path) -> str:
    layout = Layout(pipeline=2)
    with connect(layout) as block:
        tensors = placed(layout, block)
        if block.rank == 1:
            tensors["model.new"] = torch.zeros(1)
            tensors["model.layers.5.norm"] = torch.zeros(4)
            tensors["model.layers.5.row"] = tensors["model.layers.5.row"].double()
        else:
            del tensors["model.layers.0.norm"]
        with pytest.raises(CheckpointError) as refusal:
            load(folder / "step-00000002", tensors)
        return str(refusal.value)


def test_tensors_that_do_not_fit_are_named_on_every_rank(cube: Path) -> None:
    first, second = run_ranks(load_wrong, 2, cube)
    assert first == second
    for words in (
        "model.new is missing",
        "model.layers.5.norm has shape [3], this run's has [4]",
        "model.layers.5.row is F32, this run's is F64",
        "model.layers.0.norm stands in the checkpoint and not in this run",
    ):
        assert words in first


def test_inspect_tells_what_is_inside(cube: Path) -> None:
    found = inspection.inspect(cube)
    assert found["step"] == 2
    assert found["facts"]["run_id"] == "abc"
    assert found["tensors"]["model.embedding"] == {"dtype": "F32", "shape": [32, 6]}
    files = [file for file in (cube / "step-00000002").iterdir() if file.name != MANIFEST]
    assert found["bytes"] == sum(file.stat().st_size for file in files)
    assert found["files"] == {
        file.name: {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in files
    }
    assert not list(cube.glob(f"{PARTIAL}*"))
    json.dumps({key: found[key] for key in ("facts", "files", "tensors")})
