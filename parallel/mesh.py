"""The fact: process groups and the `DeviceMesh` of a `Layout`. The only file that initialises them."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from cuboid.parallel.layout import AXES, Coordinate, Layout
from cuboid.parallel.whereabouts import Whereabouts

_MEETING_SECONDS = 45.0
"""How long the ranks may take to find one another; what is wrong with an address shows sooner than in a collective."""


class NotMet(Exception):
    """A rank is not where the others look for it; in words."""


_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Block:
    """This rank's place in the live block of ranks.

    ``mesh`` has the dimensions ``("pipeline", "data", "tensor")``, also where their size is 1, so that every axis file
    takes ``mesh["tensor"]`` and asks no questions. Where parameters are sharded in groups (`Layout.replicas`), data is
    two dimensions, ``"replica"`` and ``"shard"``.
    """

    layout: Layout
    mesh: DeviceMesh
    data_group: dist.ProcessGroup
    """The ranks of this rank's data axis, also where that is two dimensions."""
    device: torch.device
    timeout: timedelta
    """How long a rank waits in a collective before it fails; every group that is made gets it."""
    whereabouts: Whereabouts
    """Where this rank tells what it does."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def coordinate(self) -> Coordinate:
        return self.layout.coordinate(self.rank)

    @property
    def data_mesh(self) -> DeviceMesh:
        """The data axis: one dimension, or ``("replica", "shard")``."""
        return self.mesh["replica", "shard"] if self.layout.replicas > 1 else self.mesh["data"]


def local_device() -> torch.device:
    """The GPU that the launcher gave to this rank (``LOCAL_RANK``), or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def connect(
    layout: Layout,
    *,
    timeout_seconds: float = 300,
    device: torch.device | None = None,
    whereabouts: Whereabouts | None = None,
) -> Iterator[Block]:
    """Join the block described by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and leave it at the end.

    Every process group has the same time-out: a rank that waits longer raises instead of hanging for ever. On GPU the
    world also carries a gloo backend, which small CPU messages (metrics, checkpoint planning) travel on.

    Raises:
        NotMet: within 45 seconds.
    """
    device = device or local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _meet(rank, ranks, seconds=min(_MEETING_SECONDS, timeout_seconds))
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    try:
        assert dist.get_world_size() == layout.world_size, (
            f"{dist.get_world_size()} ranks were started for a layout of {layout.world_size}"
        )
        mesh, data_group = _make_mesh(layout, device, timeout)
        yield Block(layout, mesh, data_group, device, timeout, whereabouts or Whereabouts())
    finally:
        dist.destroy_process_group()


@contextmanager
def imagine(layout: Layout, *, rank: int) -> Iterator[Block]:
    """The block as this rank would see it, in a process that stands alone: exchanges end at once and move nothing. Good
    for shapes on `meta`, whatever the number of ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    timeout = timedelta(seconds=60)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size, timeout=timeout)
    try:
        mesh, data_group = _make_mesh(layout, torch.device("cpu"), timeout)
        yield Block(layout, mesh, data_group, torch.device("meta"), timeout, Whereabouts())
    finally:
        dist.destroy_process_group()


def _meet(rank: int, ranks: int, *, seconds: float) -> dist.Store:
    """The table at rank 0 through which the ranks find one another's addresses, once all have come to it.

    Where all are on one machine it listens on the loopback address alone: torch's own listens to the network, and
    whoever reaches it takes part.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=seconds)
    own = host == _LOOPBACK and rank == 0
    listener = socket.create_server((host, port), backlog=1024).detach() if own else None
    try:
        return dist.TCPStore(
            host, port, ranks, is_master=rank == 0, timeout=limit, multi_tenant=True, master_listen_fd=listener
        )
    except dist.DistError as error:
        joined = re.search(r"(\d+)/\d+ clients", str(error))
        if joined:
            words = f"only {joined[1]} of {ranks} ranks came to {host}:{port} within {seconds:.0f} s"
        elif rank:
            words = f"nobody answers at {host}:{port}, where rank 0 should be, for {seconds:.0f} s"
        else:  # a port that is taken, in torch's own words
            raise
        raise NotMet(words) from None


def _make_mesh(layout: Layout, device: torch.device, timeout: timedelta) -> tuple[DeviceMesh, dist.ProcessGroup]:
    """The mesh of the layout and the group of the data axis. The groups are made here, since those of
    `init_device_mesh` wait for half an hour."""
    ranks = torch.arange(layout.world_size).view(tuple(getattr(layout, axis) for axis in AXES))
    pipeline, data, tensor = _groups(ranks, range(len(AXES)), timeout)
    names: tuple[str, ...] = AXES
    if layout.replicas == 1:
        made = [pipeline, data, tensor]
    else:
        ranks = ranks.view(layout.pipeline, layout.replicas, -1, layout.tensor)
        made, names = [pipeline, *_groups(ranks, (1, 2), timeout), tensor], ("pipeline", "replica", "shard", "tensor")
    return DeviceMesh.from_group(made, device.type, mesh=ranks, mesh_dim_names=names), data


def expert_mesh(block: Block) -> DeviceMesh:
    """The same ranks as ``("pipeline", "expert_replica", "expert")``: data and tensor together, tensor fastest, fall
    into groups of neighbours that share the experts. To be called by all ranks."""
    layout = block.layout
    ranks = torch.arange(layout.world_size).view(layout.pipeline, -1, layout.expert)
    groups = [block.mesh["pipeline"].get_group(), *_groups(ranks, (1, 2), block.timeout)]
    names = ("pipeline", "expert_replica", "expert")
    return DeviceMesh.from_group(groups, block.device.type, mesh=ranks, mesh_dim_names=names)


def _groups(ranks: torch.Tensor, dims: Iterable[int], timeout: timedelta) -> list[dist.ProcessGroup]:
    """This rank's group along each of the dimensions of ``ranks``."""
    lines = [ranks.movedim(dim, -1).reshape(-1, ranks.shape[dim]).tolist() for dim in dims]
    return [dist.new_subgroups_by_enumeration(each, timeout=timeout)[0] for each in lines]
