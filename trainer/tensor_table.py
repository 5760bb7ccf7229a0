"""tensors.json: every tensor of a checkpoint, its dtype and shape, and where each piece lies. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cuboid.trainer.manifest import FACTS, TENSORS, CheckpointError, Manifest, read_json

ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
"""Bytes of one element, by safetensors' names of dtypes."""


@dataclass(frozen=True)
class Chunk:
    """One box of a tensor: where it begins in the tensor and how large it is (in elements, one number a dim), and the
    file, first byte and number of bytes that hold it.

    ``before`` and ``after`` begin (16 hex digits) the SHA-256 of the file up to the box's first byte and
    up to its end; they cost nothing beside the file's own, and tell in which box of a changed file the change begins.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    bytes: int
    before: str
    after: str


@dataclass(frozen=True)
class TensorRecord:
    """One tensor: safetensors' name of its dtype, the shape of the whole, and its pieces, which cover it once."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def prefix_mark(sha256: Any) -> str:
    """What a chunk keeps of the running SHA-256 of its file."""
    return sha256.copy().hexdigest()[:16]


def encode_table(table: Mapping[str, TensorRecord]) -> bytes:
    return json.dumps({name: asdict(record) for name, record in sorted(table.items())}, separators=(",", ":")).encode()


def read_table(folder: Path, manifest: Manifest) -> dict[str, TensorRecord]:
    """The tensors of the checkpoint at ``folder``, whose files have the sizes that its manifest says, by name.

    Raises:
        CheckpointError: changed, or a piece lies outside its tensor, its file or the folder, or pieces do not fill a
            tensor.
    """
    table = {}
    described = sum(record.size for name, record in manifest.files.items() if name not in (TENSORS, FACTS))
    for name, entry in read_json(folder, TENSORS, manifest.files[TENSORS], beside=described).items():
        try:
            record = _record(entry)
            fault = _fault(record, manifest)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}: {TENSORS} does not describe tensor {name!r} properly") from error
        if fault:
            raise CheckpointError(f"{folder}: {TENSORS}: tensor {name!r} {fault}; refused")
        table[name] = record
    return table


def _record(entry: Mapping[str, Any]) -> TensorRecord:
    chunks = tuple(_chunk(chunk) for chunk in entry["chunks"])
    return TensorRecord(str(entry["dtype"]), _sizes(entry["shape"]), chunks)


def _chunk(entry: Mapping[str, Any]) -> Chunk:
    start, size = _sizes((entry["start"], entry["bytes"]))
    return Chunk(
        _sizes(entry["offsets"]),
        _sizes(entry["sizes"]),
        str(entry["file"]),
        start,
        size,
        str(entry["before"]),
        str(entry["after"]),
    )


def _sizes(values: Any) -> tuple[int, ...]:
    sizes = tuple(values)
    if not all(type(size) is int and 0 <= size < 1 << 62 for size in sizes):
        raise ValueError(f"{values} are not sizes")
    return sizes


def _fault(record: TensorRecord, manifest: Manifest) -> str:
    if record.dtype not in ITEM_BYTES:
        return f"has the unknown dtype {record.dtype!r}"
    for chunk in record.chunks:
        if chunk.file not in manifest.files:
            return f"lies in {chunk.file!r}, which is not a file of the manifest"
        if not len(chunk.offsets) == len(chunk.sizes) == len(record.shape) or any(
            offset + size > whole for offset, size, whole in zip(chunk.offsets, chunk.sizes, record.shape, strict=True)
        ):
            return "has a piece outside itself"
        if chunk.bytes != math.prod(chunk.sizes) * ITEM_BYTES[record.dtype]:
            return "has a piece of a wrong size"
        if chunk.start + chunk.bytes > manifest.files[chunk.file].size:
            return f"lies beyond the end of {chunk.file}"
    if sum(chunk.bytes for chunk in record.chunks) != record.bytes:
        return "is not covered once by its pieces"
    return ""
