"""Weights -> shards: every rank fills what it owns, from a seed or straight from safetensors files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cuboid.parallel.errors import UserError, one_of
from cuboid.parallel.gradients import local
from cuboid.parallel.local import owned_slices
from cuboid.trainer.foreign import check_folder, check_tensors_file, read_json
from cuboid.trainer.hf_layout import Tile, tiles

_PROBES, _PROBE_BYTES = 64, 2**16
"""How many blocks of each file a fingerprint reads, and how large: a small file is read whole."""
_WEIGHTS = ("F64", "F32", "F16", "BF16")
"""Numbers that are weights as they stand; of fewer bits they are none without their scales."""
_BLOCK_BYTES = 2**20
"""A tensor is copied from its file in blocks of about this size: what a rank holds beside its shard."""

CopyInto = Callable[[str, tuple[slice, ...], Tensor], None]
"""Writes the part of a named full tensor that the slices cut out into a local tensor."""


@torch.no_grad()
def fill(parameters: Iterable[tuple[str, nn.Parameter]], copy_into: CopyInto) -> None:
    """Give every parameter's local shard its values. Names are global ones."""
    for name, parameter in parameters:
        copy_into(name, owned_slices(parameter), local(parameter))


def from_full(read: Callable[[str], Tensor]) -> CopyInto:
    """Cut shards out of full tensors that ``read`` makes one at a time."""

    def copy_into(name: str, part: tuple[slice, ...], target: Tensor) -> None:
        target.copy_(read(name)[part])

    return copy_into


def from_safetensors(
    folder: Path,
    *,
    shapes: Mapping[str, torch.Size],
    base: str,
    family: str,
    stored_names: Mapping[str, str],
    dense: bool = False,
) -> CopyInto:
    """Read shards straight from the safetensors files of a Hugging Face folder.

    Args:
        folder: holds ``model.safetensors``, or several files with ``model.safetensors.index.json``.
        shapes: what the model expects, by global name.
        base: prefix that a file of the base model alone leaves out (``model``).
        family: the config's model_type, by whose names experts are stored.
        stored_names: what files may call a parameter, where the model calls it otherwise.
        dense: the folder holds the dense model that every expert is a copy of.

    Raises:
        UserError: where a tensor is missing or of another shape, or the index points outside the folder.
    """
    files = _tensor_files(folder)
    places: dict[str, list[Tile]] = {}
    wrong: list[str] = []
    for name, shape in shapes.items():
        places[name] = []
        for tile in tiles(family, name, shape, dense=dense):
            names = (tile.key, tile.key.removeprefix(f"{base}."), stored_names.get(name))
            stored = next((key for key in names if key in files), None)
            if stored is None:
                wrong.append(f"{tile.key} is missing")
                continue
            places[name].append(replace(tile, key=stored))
    expected = {tile.key: tile.shape for stored in places.values() for tile in stored}
    for key, found in _stored_shapes(folder, {key: files[key] for key in expected}).items():
        if found != expected[key]:
            wrong.append(f"{key} has shape {found}, the config says {expected[key]}")
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise UserError(f"model.pretrained={folder}: {'; '.join(wrong[:5])}{more}")

    def copy_into(name: str, part: tuple[slice, ...], target: Tensor) -> None:
        for tile in places[name]:
            common = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(part, tile.box, strict=True)]
            if any(both.start >= both.stop for both in common):
                continue
            here = tuple(slice(c.start - p.start, c.stop - p.start) for c, p in zip(common, part, strict=True))
            there = tuple(slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, tile.box, strict=True))
            if tile.is_expert:
                _copy(files[tile.key], tile.key, there[1:], target[here][0])
            else:
                _copy(files[tile.key], tile.key, there, target[here])

    return copy_into


def from_file(path: Path, stored_name: Callable[[str], str]) -> CopyInto:
    """Read shards of one safetensors file, in which a tensor is called what ``stored_name`` makes of its name."""

    def copy_into(name: str, part: tuple[slice, ...], target: Tensor) -> None:
        _copy(path, stored_name(name), part, target)

    return copy_into


def shapes_in(path: Path) -> dict[str, list[int]]:
    """Name and shape of each tensor of one safetensors file; raises UserError where it is none."""
    check_tensors_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no readable safetensors: {error}") from None


def fingerprint(folder: Path) -> str:
    """SHA-256 over a folder's safetensors files: names, sizes, headers, and blocks of bytes spread evenly over each.

    Other weights of the same architecture differ in every block; hashing every byte of a large model would take longer
    than its start.
    """
    sha = hashlib.sha256()
    for path in sorted(set(_tensor_files(folder).values())):
        size = path.stat().st_size
        sha.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            sha.update(file.read(header))
            for index in range(_PROBES):
                file.seek(8 + header + (size - 8 - header) * index // _PROBES)
                sha.update(file.read(_PROBE_BYTES))
    return sha.hexdigest()


def _copy(path: Path, stored: str, part: tuple[slice, ...], target: Tensor) -> None:
    """One part of a file's tensor into ``target``, a view, some rows at a time."""
    row_bytes = max(1, prod(target.shape[1:]) * target.element_size())
    rows = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, max(1, target.shape[0]) if target.dim() else 1, rows):
        stop = min(start + rows, target.shape[0])
        block = slice(part[0].start + start, part[0].start + stop)
        with safe_open(path, framework="pt") as file:  # opened anew: a mapping's pages would stay with the rank
            target[start:stop].copy_(file.get_slice(stored)[(block, *part[1:])])


def _stored_shapes(folder: Path, files: Mapping[str, Path]) -> dict[str, list[int]]:
    """Shape of each tensor in its file; each file is opened once."""
    shapes: dict[str, list[int]] = {}
    for path in dict.fromkeys(files.values()):
        try:
            with safe_open(path, framework="pt") as file:
                found = {key: file.get_slice(key) for key in files if files[key] == path}
                kinds = {key: piece.get_dtype() for key, piece in found.items()}
                shapes |= {key: list(piece.get_shape()) for key, piece in found.items()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"model.pretrained={folder}: {path.name} is no readable safetensors: {error}") from None
        if other := next((key for key in kinds if kinds[key] not in _WEIGHTS), None):
            words = f"{other} in {path.name} is {kinds[other]}, and weights are {one_of(_WEIGHTS)}"
            raise UserError(f"model.pretrained={folder}: {words}")
    return shapes


def _tensor_files(folder: Path) -> dict[str, Path]:
    """File of each tensor name; an index may only name files of its own folder."""
    check_folder(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        beside = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        return {name: folder / file for name, file in read_json(index, beside=beside)["weight_map"].items()}
    if single.is_file():
        return dict.fromkeys(shapes_in(single), single)
    pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    hint = f"; {pickles[0].name} is a pickle, which is never read" if pickles else ""
    raise UserError(f"model.pretrained={folder} has no model.safetensors{hint}; save it with save_pretrained")
