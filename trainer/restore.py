"""Safetensors files of a checkpoint -> this rank's tensors, whatever placement they have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from cuboid.parallel.errors import UserError
from cuboid.trainer.foreign import check_tensors_file
from cuboid.trainer.manifest import FACTS, TENSORS, CheckpointError, Manifest, open_file, read_json, read_manifest
from cuboid.trainer.shards import DTYPES, NAMES
from cuboid.trainer.tensor_table import Chunk, TensorRecord


def read_facts(path: Path, manifest: Manifest | None = None) -> dict[str, Any]:
    """What `Checkpointer.save` was given beside the tensors.

    Raises:
        CheckpointError: there is no whole checkpoint at ``path``.
    """
    manifest = manifest or read_manifest(path)
    return read_json(path, FACTS, manifest.files[FACTS])


def faults_of(tensors: Mapping[str, Tensor], table: Mapping[str, TensorRecord]) -> list[str]:
    """Which of ``tensors`` the table cannot fill, in words."""
    faults = []
    for name, tensor in tensors.items():
        record, shape, dtype = table.get(name), list(tensor.shape), NAMES.get(tensor.dtype, str(tensor.dtype))
        if record is None:
            faults.append(f"{name} is missing")
        elif list(record.shape) != shape:
            faults.append(f"{name} has shape {list(record.shape)}, this run's has {shape}")
        elif record.dtype != dtype:
            faults.append(f"{name} is {record.dtype}, this run's is {dtype}")
    return faults


@torch.no_grad()
def read_tensors(path: Path, table: Mapping[str, TensorRecord], tensors: Mapping[str, Tensor]) -> None:
    """Copy what ``tensors`` hold on this rank out of the files. Which part of which file that is, DCP's planner says.

    Raises:
        CheckpointError: a file is not what the table says, or not safetensors at all.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), _metadata({name: table[name] for name in tensors}), is_coordinator=True)
    by_file: dict[str, list[tuple[Chunk, ReadItem]]] = {}
    for item in planner.create_local_plan().items:
        chunk = table[item.storage_index.fqn].chunks[item.storage_index.index or 0]
        by_file.setdefault(chunk.file, []).append((chunk, item))
    for name, items in sorted(by_file.items()):
        open_file(path, name).close()  # no link, no device
        try:
            check_tensors_file(path / name)
            with safe_open(path / name, framework="pt") as file:
                for chunk, item in sorted(items, key=lambda pair: pair[0].start):
                    tensor = item.storage_index.fqn
                    piece = file.get_slice(tensor)
                    if (piece.get_dtype(), tuple(piece.get_shape())) != (table[tensor].dtype, chunk.sizes):
                        raise SafetensorError(f"{tensor} has not the dtype and shape that {TENSORS} says")
                    box = zip(item.storage_offsets, item.lengths, strict=True)
                    planner.resolve_tensor(item).copy_(piece[tuple(slice(at, at + size) for at, size in box)])
        except (SafetensorError, UserError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: {name} is not the safetensors file that it should be ({error})") from error


def _metadata(table: Mapping[str, TensorRecord]) -> Metadata:
    """The table in DCP's words."""
    return Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(dtype=DTYPES[record.dtype]),
                torch.Size(record.shape),
                [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in record.chunks],
            )
            for name, record in table.items()
        }
    )
