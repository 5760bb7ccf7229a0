"""Tensors over a block of ranks whose every bit follows from their names: what the checkpoint tests save and expect."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from cuboid.parallel.data import replicate
from cuboid.parallel.gradients import local
from cuboid.parallel.layout import Layout
from cuboid.parallel.mesh import Block
from cuboid.trainer.checkpoint import Checkpointer
from cuboid.trainer.weights import owned_slices

NUM_LAYERS = 6
SHAPES: dict[str, tuple[int, ...]] = {"embedding": (32, 6)}
for layer in range(NUM_LAYERS):
    SHAPES |= {
        f"layers.{layer}.column": (12, 6),  # divided by outputs
        f"layers.{layer}.row": (7, 12),  # divided by inputs; 7 rows do not divide by 2, 3 or 4 data ranks
        f"layers.{layer}.norm": (3,),  # fewer elements than 4 data ranks
    }
PARTS = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")


def value(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Random bits as a tensor, the same for a name everywhere; any bit lost or moved shows."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))
    return torch.randn(shape, generator=generator).to(dtype)


def placed(layout: Layout, block: Block | None, *, shard: bool = True) -> dict[str, Tensor]:
    """Zeros, placed as a run places them: stages, tensor parallelism, FSDP2; the embedding stands on both end stages.

    Names as in a run: parameters, and two moments beside each.
    """
    stage = block.coordinate.pipeline if block else 0
    module = nn.ParameterDict()
    for name, shape in SHAPES.items():
        ends = (0, layout.pipeline - 1)
        if stage in (ends if name == "embedding" else (int(name.split(".")[1]) * layout.pipeline // NUM_LAYERS,)):
            tensor: Tensor = torch.zeros(shape)
            if block and layout.tensor > 1:
                placement = Shard(1) if name.endswith("row") else Replicate() if name.endswith("norm") else Shard(0)
                tensor = distribute_tensor(tensor, block.mesh["tensor"], [placement], src_data_rank=None)
            module[name.replace(".", "_")] = nn.Parameter(tensor)
    if block and layout.data > 1:
        (fully_shard if shard else replicate)(module, mesh=block.mesh["data"])
    names = [name for name in SHAPES if name.replace(".", "_") in module]
    return {f"{part}.{name}": _like(module[name.replace(".", "_")]) for part in PARTS for name in names}


def fill(tensors: dict[str, Tensor], *, generation: int = 0) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        local(tensor).copy_(_expected(name, tensor, generation))
    return tensors


def differing(tensors: dict[str, Tensor], *, generation: int = 0) -> list[str]:
    """Names whose part on this rank is not, bit for bit, what `fill` gave."""
    return [
        name for name, tensor in tensors.items() if not torch.equal(local(tensor), _expected(name, tensor, generation))
    ]


def save(folder: Path, tensors: dict[str, Tensor], *steps: int, **settings: Any) -> list[tuple[str, dict[str, Any]]]:
    """Save generation n of the tensors as step n; the events."""
    events: list[tuple[str, dict[str, Any]]] = []
    options: dict[str, Any] = {"keep": 9, "asynchronous": False} | settings
    with Checkpointer(folder, event=lambda kind, **fields: events.append((kind, fields)), **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, fill(tensors, generation=step), {"run_id": "abc", "generation": step})
    return events


def _like(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return torch.zeros_like(parameter).detach()
    shard = torch.zeros_like(parameter.detach().to_local())
    arguments = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
    return DTensor.from_local(shard, parameter.device_mesh, parameter.placements, **arguments)


def _expected(name: str, tensor: Tensor, generation: int) -> Tensor:
    return value(f"{name}/{generation}", tuple(tensor.shape), tensor.dtype)[owned_slices(tensor)]
