"""A rank's tensors -> safetensors files: planned once for all ranks, copied to host memory, written and hashed behind.

Planning (which rank writes which box of which tensor, each box once) is torch.distributed.checkpoint's. Its storage is
not used: it copies every byte twice more, hashes nothing, and gathers all plans at each save.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor

from cuboid.parallel.gradients import local
from cuboid.trainer.manifest import FileRecord
from cuboid.trainer.publish import write_durably
from cuboid.trainer.tensor_table import ITEM_BYTES, Chunk, prefix_mark

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of dtypes (https://huggingface.co/docs/safetensors)."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FILE_BYTES = 256 << 20
_THREADS = 4


@dataclass(frozen=True)
class Piece:
    """One box of a named tensor that this rank writes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class FilePlan:
    """One file: its safetensors header, and the first byte in the file of each piece."""

    name: str
    header: bytes
    pieces: tuple[Piece, ...]
    starts: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.header) + sum(piece.bytes for piece in self.pieces)


@dataclass(frozen=True)
class Written:
    """What one rank wrote: its files' records, and where each piece lies, as (name, dtype, shape, chunk)."""

    files: dict[str, FileRecord]
    pieces: list[tuple[str, str, tuple[int, ...], Chunk]]


def signature(tensors: Mapping[str, Tensor]) -> list[tuple[Any, ...]]:
    """What a plan depends on: equal signatures on every rank mean an equal plan."""
    return [
        (name, tensor.dtype, tensor.shape, tensor.placements if isinstance(tensor, DTensor) else None)
        for name, tensor in tensors.items()
    ]


def plan_pieces(tensors: Mapping[str, Tensor], *, group: dist.ProcessGroup | None) -> list[Piece]:
    """Which boxes this rank writes; all ranks of ``group`` (None: the world, or this process alone) call it together.

    A box that several ranks hold (replicas, tied copies) is given to the one that has least to write so far.

    Raises:
        ValueError: on every rank, where the ranks' pieces of a tensor do not fill it, or overlap.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    alone = not dist.is_initialized()
    planner.set_up_planner(dict(tensors), is_coordinator=alone or dist.get_rank(group) == 0)
    mine = planner.create_local_plan()
    # beyond the end of an uneven division a rank holds an empty box
    mine = replace(
        mine, items=[item for item in mine.items if not _is_empty_rest(item)], planner_data=_holders(tensors)
    )
    if alone:
        return [_piece(item) for item in _divide(planner, [mine])[0].items]
    first = dist.get_rank(group) == 0
    plans: list[Any] | None = [None] * dist.get_world_size(group) if first else None
    dist.gather_object(mine, plans, dst=0, group=group)
    divided: list[Any] | None = None
    if plans is not None:
        try:
            divided = list(_divide(planner, plans))
        except Exception as error:  # told to all, or the others would wait for ever
            divided = [str(error)] * len(plans)
    received: list[Any] = [None]
    dist.scatter_object_list(received, divided, src=0, group=group)
    if isinstance(received[0], str):
        raise ValueError(f"the ranks' tensors cannot be saved together: {received[0]}")
    return [_piece(item) for item in received[0].items]


def lay_out(pieces: Sequence[Piece], *, rank: int) -> list[FilePlan]:
    """Divide a rank's pieces into files of about 256 MiB. Wide elements come first, so that each is aligned."""
    ordered = sorted(pieces, key=lambda piece: (-ITEM_BYTES[piece.dtype], piece.name))
    bundles: list[list[Piece]] = []
    free = 0
    for piece in ordered:
        if not bundles or piece.bytes > free:
            bundles.append([])
            free = _FILE_BYTES
        bundles[-1].append(piece)
        free -= piece.bytes
    return [_file_plan(f"shard-{rank:05d}-{number:05d}.safetensors", bundle) for number, bundle in enumerate(bundles)]


class Arena:
    """Host memory that holds a rank's files as they will be written; made once, filled at each save."""

    def __init__(self, files: Sequence[FilePlan]) -> None:
        self.files = tuple(files)
        aligned = [-(-file.size // 64) * 64 for file in self.files]
        pinned = torch.cuda.is_available()
        memory = torch.zeros(
            sum(aligned), dtype=torch.uint8, pin_memory=pinned
        )  # zeros: pages exist before a step waits
        self._images = [image[: file.size] for image, file in zip(memory.split(aligned), self.files, strict=True)]
        self._slots: dict[str, Tensor] = {}
        for file, image in zip(self.files, self._images, strict=True):
            image[: len(file.header)] = torch.frombuffer(bytearray(file.header), dtype=torch.uint8)
            for piece, start in zip(file.pieces, file.starts, strict=True):
                flat = image[start : start + piece.bytes].view(DTYPES[piece.dtype])
                self._slots[piece.name] = flat.view(piece.sizes)

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the planned pieces of ``tensors`` in; the tensors may change as soon as this returns."""
        for name, slot in self._slots.items():
            slot.copy_(local(tensors[name].detach()), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def write(self, folder: Path) -> Written:
        """Write, fsync and hash every file. Hashing and writing run beside each other, from the same memory.

        Raises:
            OSError: the disk refused.
        """
        views = [memoryview(image.numpy()) for image in self._images]
        jobs: list[tuple[Future[None], Future[tuple[FileRecord, list[Chunk]]]]] = []
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="checkpoint") as pool:
            for file, view in zip(self.files, views, strict=True):
                jobs.append((pool.submit(write_durably, folder / file.name, view), pool.submit(_digest, file, view)))
        files, pieces = {}, []
        for file, (writing, digesting) in zip(self.files, jobs, strict=True):
            writing.result()
            files[file.name], chunks = digesting.result()
            pieces += [(p.name, p.dtype, p.shape, chunk) for p, chunk in zip(file.pieces, chunks, strict=True)]
        return Written(files, pieces)


def _holders(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Which ranks hold the tensor together with this one; a plain tensor is held by this rank alone."""
    own = (dist.get_rank(),) if dist.is_initialized() else (0,)
    return {
        name: tuple(tensor.device_mesh.mesh.flatten().tolist()) if isinstance(tensor, DTensor) else own
        for name, tensor in tensors.items()
    }


def _divide(planner: DefaultSavePlanner, plans: Sequence[SavePlan]) -> list[SavePlan]:
    """Give every box to one rank. Copies that are cut differently (plain on one stage, divided on another) are reduced
    to one of them first, since DCP only knows equal boxes as equal."""
    boxes: dict[str, set[tuple[Any, ...]]] = {}
    wholes: dict[str, int] = {}
    for item in (item for plan in plans for item in plan.items):
        assert item.tensor_data is not None
        boxes.setdefault(item.index.fqn, set()).add(_box(item))
        wholes[item.index.fqn] = math.prod(item.tensor_data.size)
    mixed = {name for name, cut in boxes.items() if sum(math.prod(sizes) for _, sizes in cut) != wholes[name]}
    kept: dict[str, tuple[int, ...]] = {}
    reduced = []
    for plan in plans:
        for name in mixed & plan.planner_data.keys():
            kept.setdefault(name, plan.planner_data[name])
        items = [
            i for i in plan.items if i.index.fqn not in mixed or plan.planner_data[i.index.fqn] == kept[i.index.fqn]
        ]
        reduced.append(replace(plan, items=items, planner_data=None))
    return planner.create_global_plan(reduced)[0]


def _box(item: WriteItem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    assert item.tensor_data is not None, f"{item.index.fqn} is not a tensor"
    return tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes)


def _is_empty_rest(item: WriteItem) -> bool:
    assert item.tensor_data is not None, f"{item.index.fqn} is not a tensor"
    return math.prod(item.tensor_data.chunk.sizes) == 0 != math.prod(item.tensor_data.size)


def _piece(item: WriteItem) -> Piece:
    assert item.tensor_data is not None
    dtype = NAMES[item.tensor_data.properties.dtype]
    return Piece(item.index.fqn, dtype, tuple(item.tensor_data.size), *_box(item))


def _file_plan(name: str, pieces: Sequence[Piece]) -> FilePlan:
    """Header as torch's HuggingFaceStorageReader wants it, so that plain DCP reads the files too."""
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",
            "DCP_VERSION": "1.0",
            "DCP_SHARDING_INFO": json.dumps({piece.name: {"saved_offsets": piece.offsets} for piece in pieces}),
        }
    }
    starts, end = [], 0
    for piece in pieces:
        entries[piece.name] = {"dtype": piece.dtype, "shape": piece.sizes, "data_offsets": [end, end + piece.bytes]}
        starts.append(end)
        end += piece.bytes
    header = encode_header(entries)
    return FilePlan(name, header, tuple(pieces), tuple(len(header) + start for start in starts))


def encode_header(entries: Mapping[str, Any]) -> bytes:
    """A safetensors file's first bytes, padded so that the tensors behind it are aligned to 64."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text


def _digest(file: FilePlan, view: memoryview) -> tuple[FileRecord, list[Chunk]]:
    sha = hashlib.sha256(file.header)
    chunks = []
    for piece, start in zip(file.pieces, file.starts, strict=True):
        before = prefix_mark(sha)
        sha.update(view[start : start + piece.bytes])
        chunks.append(Chunk(piece.offsets, piece.sizes, file.name, start, piece.bytes, before, prefix_mark(sha)))
    return FileRecord(file.size, sha.hexdigest()), chunks
