"""Checkpoints: planning, write rate against a plain write + fsync of the same bytes, how long a step is blocked.

python benchmarks/checkpoint.py --folder /a/disk --ranks 8 --megabytes 1024 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
from torch.distributed.tensor import DTensor, Replicate, Shard

from cuboid.parallel.layout import Layout
from cuboid.parallel.mesh import connect
from cuboid.trainer import inspection
from cuboid.trainer.checkpoint import Checkpointer, load
from cuboid.trainer.publish import discard
from cuboid.trainer.shards import lay_out, plan_pieces

NUM_PARAMETERS = 100
LAYOUTS = {1: Layout(), 2: Layout(data=2), 4: Layout(data=2, tensor=2), 8: Layout(pipeline=2, data=2, tensor=2)}


def make_tensors(layout: Layout, mesh: Any, megabytes: int) -> dict[str, Tensor]:
    """Parameters and two moments of each: 300 names over the block, a tenth of them replicated norms of 4 KiB."""
    stage, width = mesh["pipeline"].get_local_rank(), 1024
    matrices = NUM_PARAMETERS * 9 // 10
    rows = megabytes * 2**20 // (3 * matrices * width * 4) // 8 * 8
    tensors: dict[str, Tensor] = {}
    for index in range(NUM_PARAMETERS):
        if index * layout.pipeline // NUM_PARAMETERS != stage:
            continue
        norm = index % 10 == 0
        for prefix in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
            placements = [Shard(0), Replicate() if norm else Shard(1)]
            shape = (width // layout.data,) if norm else (rows // layout.data, width // layout.tensor)
            local = torch.rand(shape)
            block = mesh["data", "tensor"]
            tensors[f"{prefix}.layers.{index}.weight"] = DTensor.from_local(local, block, placements, run_check=False)
    return tensors


def plain_write(folder: Path, view: memoryview) -> float:
    """Seconds that all ranks together need to write and fsync their bytes, one file each."""
    started = time.monotonic()
    descriptor = os.open(folder / f"plain-{dist.get_rank()}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    while view:
        view = view[os.write(descriptor, view[: 8 << 20]) :]
    os.fsync(descriptor)
    os.close(descriptor)
    dist.barrier()
    return time.monotonic() - started


def dcp_save(folder: Path, tensors: dict[str, Tensor]) -> float:
    """Seconds of torch.distributed.checkpoint's own safetensors writer: no SHA-256, no manifest, no rename."""
    started = time.monotonic()
    save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder / "dcp-step-1"), save_distributed=True))
    return time.monotonic() - started


class Turns:
    """One way to write, of which each turn is told by the Checkpointer's own event."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], *, asynchronous: bool) -> None:
        self.events: list[dict[str, Any]] = []
        self.checkpointer = Checkpointer(folder, keep=1, asynchronous=asynchronous, event=self._listen)
        self.tensors, self.step = tensors, 0

    def _listen(self, kind: str, **fields: Any) -> None:
        if kind == "checkpoint":
            self.events.append(fields)

    def turn(self) -> None:
        self.step += 1
        self.checkpointer.save(self.step, self.tensors, {})
        self.checkpointer.wait()
        assert self.checkpointer.failure is None, self.checkpointer.failure


def settle(folder: Path) -> None:
    """Remove what the last turn wrote and let the disk finish, so that every turn begins alike."""
    dist.barrier()
    if dist.get_rank() == 0:
        for path in [*folder.glob("*/step-*"), *folder.glob("plain-*"), *folder.glob("dcp-*")]:
            discard(path)
        os.sync()
        time.sleep(2)  # also a virtual disk with an allowance of bytes
    dist.barrier()


def timed_plan(tensors: Mapping[str, Tensor]) -> tuple[float, int]:
    dist.barrier()
    started = time.monotonic()
    files = lay_out(plan_pieces(tensors, group=None), rank=dist.get_rank())
    return time.monotonic() - started, sum(file.size for file in files)


def timed_load(path: Path, tensors: Mapping[str, Tensor]) -> tuple[float, float]:
    dist.barrier()
    started = time.monotonic()
    faults = inspection.verify(path, share=slice(dist.get_rank(), None, dist.get_world_size()))
    dist.barrier()
    verified = time.monotonic()
    load(path, tensors)
    dist.barrier()
    assert not faults, faults
    return verified - started, time.monotonic() - verified


def measure(layout: Layout, folder: Path, megabytes: int, rounds: int) -> dict[str, Any]:
    with connect(layout) as block:
        tensors = make_tensors(layout, block.mesh, megabytes)
        plans = [timed_plan(tensors) for _ in range(3)]
        bytes_here = plans[0][1]
        view = memoryview(torch.rand(bytes_here // 4 + 1).numpy()).cast("B")[:bytes_here]
        plain: list[float] = []
        dcp: list[float] = []
        sync = Turns(folder / "sync", tensors, asynchronous=False)
        behind = Turns(folder / "behind", tensors, asynchronous=True)
        behind.checkpointer.prepare(tensors)
        turns: list[Callable[[], None]] = [
            lambda: plain.append(plain_write(folder, view)),
            sync.turn,
            behind.turn,
            lambda: dcp.append(dcp_save(folder, tensors)),
        ]
        for number in range(rounds + 1):
            random.Random(number).shuffle(turns)
            for turn in turns:
                settle(folder)
                turn()
        behind.turn()
        verify_seconds, load_seconds = timed_load(behind.checkpointer.newest, tensors)
        total = torch.tensor(bytes_here)
        dist.all_reduce(total)
        return {
            "ranks": layout.world_size,
            "gigabytes": int(total) / 1e9,
            "plan_ms": [round(seconds * 1000, 1) for seconds, _ in plans],
            "verify_seconds": verify_seconds,
            "load_seconds": load_seconds,
            "plain_seconds": plain[1:],  # the first round warms up
            "dcp_seconds": dcp[1:],
            "sync_seconds": [event["seconds"] for event in sync.events[1:]],
            "behind_seconds": [event["seconds"] for event in behind.events[1 : rounds + 1]],
            "blocked_seconds": [event["blocked_seconds"] for event in behind.events[1 : rounds + 1]],
            "first_blocked_seconds": [event["blocked_seconds"] for event in behind.events[:1]],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder on the disk to measure")
    parser.add_argument("--ranks", type=int, choices=sorted(LAYOUTS), default=8)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    folder = chosen.folder / "cuboid-benchmark"
    try:
        folder.mkdir(parents=True)
        work = (LAYOUTS[chosen.ranks], folder, chosen.megabytes, chosen.rounds)
        result = run_ranks(measure, chosen.ranks, *work, timeout=550)[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for key in [key for key in result if isinstance(result[key], list) and key != "plan_ms"]:
        result[key] = {"median": statistics.median(result[key]), "all": [round(v, 3) for v in result[key]]}
    plain, sync, blocked, dcp = (result[f"{key}_seconds"]["median"] for key in ("plain", "sync", "blocked", "dcp"))
    result |= {"rate_of_plain": plain / sync, "dcp_rate_of_plain": plain / dcp, "blocked_of_sync": blocked / sync}
    result["machine"] = f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
