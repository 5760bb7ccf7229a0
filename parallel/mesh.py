"""The fact: process groups and the `DeviceMesh` of a `Layout`. The only file that initialises them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cuboid.parallel.layout import AXES, Coordinate, Layout


@dataclass(frozen=True)
class Block:
    """This rank's place in the live block of ranks.

    ``mesh`` has the dimensions ``("pipeline", "data", "tensor")``, also where their size is 1, so that every axis file
    takes ``mesh["tensor"]`` and asks no questions.
    """

    layout: Layout
    mesh: DeviceMesh
    device: torch.device

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def coordinate(self) -> Coordinate:
        return self.layout.coordinate(self.rank)


def local_device() -> torch.device:
    """The GPU that the launcher gave to this rank (``LOCAL_RANK``), or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def connect(layout: Layout, *, timeout_seconds: float = 300, device: torch.device | None = None) -> Iterator[Block]:
    """Join the block described by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and leave it at the end.

    Every process group has the same time-out: a rank that waits longer raises instead of hanging for ever. On GPU the
    world also carries a gloo backend, which small CPU messages (metrics, checkpoint planning) travel on.
    """
    device = device or local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    try:
        assert dist.get_world_size() == layout.world_size, (
            f"{dist.get_world_size()} ranks were started for a layout of {layout.world_size}"
        )
        sizes = tuple(getattr(layout, axis) for axis in AXES)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
        yield Block(layout, mesh, device)
    finally:
        dist.destroy_process_group()
