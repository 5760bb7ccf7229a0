"""A checkpoint -> a folder that `AutoModelForCausalLM.from_pretrained` loads, checked by loading it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from cuboid.parallel.errors import RunFailed, UserError
from cuboid.trainer import inspection
from cuboid.trainer.compact import Compact, compact
from cuboid.trainer.hf_layout import Tile, tiles
from cuboid.trainer.manifest import MANIFEST, CheckpointError, read_manifest, steps
from cuboid.trainer.out_folder import disk_errors_of, new_folder
from cuboid.trainer.recipe import PruneSettings
from cuboid.trainer.restore import faults_of, read_facts, read_tensors
from cuboid.trainer.shards import DTYPES, encode_header
from cuboid.trainer.tensor_table import ITEM_BYTES, TensorRecord, read_table
from cuboid.trainer.tokenizer import save_tokenizer

SHARD_BYTES = 5 * 10**9
TOLERANCE = 1e-5
CUT_TOLERANCE = 1e-4
"""Of the largest logit, where pruned parts are left out: sums of fewer numbers, the others zero, round otherwise."""
_MODEL = "model."
_BALANCE = "balance."
_NOT_TAKEN = ("auto_map", "quantization_config", "attn_implementation", "experts_implementation", "_name_or_path")
"""What a config may not bring along: keys that let transformers fetch code or that name a place of this machine."""


@dataclass(frozen=True)
class Exported:
    """What was exported: the checkpoint taken, newer ones that are broken (their faults), how far the logits of the
    reloaded folder are from those of the checkpoint's own weights, and what the format has no place for."""

    checkpoint: Path
    refused: tuple[str, ...]
    difference: float
    left_out: tuple[str, ...]
    sizes: tuple[int, int] | None = None
    """Bytes of the weights with and without what was pruned as a whole; None where nothing was."""


def export_hf(source: Path, out: Path, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES) -> Exported:
    """Write the model of a checkpoint, or of a run's newest valid one, to ``out`` in Hugging Face's format.

    One tensor is in memory at a time while it is written; the check afterwards holds the model, twice one after the
    other. ``out`` appears when all is written and checked.

    Raises:
        UserError: there is no valid checkpoint, or ``out`` may not be written.
        RunFailed: the folder does not give the checkpoint's logits.
    """
    checkpoint, refused = valid_checkpoint(Path(source))
    with new_folder(Path(out), source=checkpoint, overwrite=overwrite) as folder:
        weights, facts = open_weights(checkpoint)
        if facts["recipe"].get("lora"):
            raise UserError(f"{checkpoint} holds an adapter alone; use --to adapter, or --to merged for a whole model")
        config = trained_config(facts, weights)
        stored, smaller = _without_pruned(weights, config, facts["recipe"])
        with disk_errors_of(out):
            write_words(folder, smaller, facts)
            _write_weights(folder, stored, family=config.model_type, shard_bytes=shard_bytes)
        difference = _difference(folder, weights, config, is_whole=stored is weights)
        sizes = None if stored is weights else (_bytes(weights), _bytes(stored))
    return Exported(checkpoint, tuple(refused), difference, weights.left_out, sizes)


@dataclass(frozen=True)
class Weights:
    """The model's tensors in a checkpoint, by their names in the architecture."""

    path: Path
    records: Mapping[str, TensorRecord]
    left_out: tuple[str, ...]
    """Tensors of the checkpoint that the model computes with and its architecture does not know."""

    def faults(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """In what the checkpoint's tensors are not these, in words."""
        extra = [f"{name} is too much" for name in sorted(self.records.keys() - tensors.keys())]
        return extra + faults_of(tensors, self.records)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Read the whole of each of ``tensors`` in place."""
        table = {_MODEL + name: self.records[name] for name in tensors}
        read_tensors(self.path, table, {_MODEL + name: tensor for name, tensor in tensors.items()})


def open_weights(path: Path) -> tuple[Weights, dict[str, Any]]:
    """The model's tensors and the facts of a checkpoint; raises CheckpointError where it has none."""
    manifest = read_manifest(path)
    table, facts = read_table(path, manifest), read_facts(path, manifest)
    records = {name.removeprefix(_MODEL): record for name, record in table.items() if name.startswith(_MODEL)}
    if not records or not all(isinstance(facts.get(key), dict) for key in ("model_config", "recipe")):
        raise CheckpointError(
            f"{path} cannot be exported: it has no model, or no recipe and config of one in its facts"
        )
    return Weights(path, records, tuple(name for name in table if name.startswith(_BALANCE))), facts


def valid_checkpoint(source: Path) -> tuple[Path, list[str]]:
    """A run's newest checkpoint whose every byte is right, or the given one; and the faults of newer ones."""
    refused: list[str] = []
    for folder in (source, source / "checkpoints"):
        if steps(folder) and not (folder / MANIFEST).exists():
            path = inspection.newest(folder, refused=lambda _, faults: refused.extend(faults))
            if path is None:
                raise CheckpointError("\n".join(refused))
            return path, refused
    path = inspection.resolve(source)
    if faults := inspection.verify(path):
        raise CheckpointError("\n".join(faults))
    return path, []


def trained_config(facts: Mapping[str, Any], weights: Weights) -> transformers.PretrainedConfig:
    """The architecture that was trained, in the dtype that most of it was saved in."""
    values = {key: value for key, value in facts["model_config"].items() if key not in _NOT_TAKEN}
    family = values.pop("model_type", None)
    try:
        config = transformers.CONFIG_MAPPING[family].from_dict({**values, "use_cache": True})
        bytes_of: Counter[str] = Counter()
        for record in weights.records.values():
            bytes_of[record.dtype] += record.bytes
        config.dtype = DTYPES[bytes_of.most_common(1)[0][0]]
        with torch.device("meta"):
            config.architectures = [
                type(transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)).__name__
            ]
    except Exception as error:  # an unknown family, or values that its class refuses, each in its own way
        raise CheckpointError(f"{weights.path}: its model_config is not one of {family}: {error}") from error
    return config


def write_words(folder: Path, config: transformers.PretrainedConfig, facts: Mapping[str, Any]) -> None:
    """config.json, generation_config.json and the tokenizer, with the chat template that the run was trained by."""
    config.save_pretrained(folder)
    pretrained = facts["recipe"]["model"]["pretrained"]
    generation = transformers.GenerationConfig.from_model_config(config)
    if pretrained is not None:
        with suppress(OSError):  # a base model has none
            generation = transformers.GenerationConfig.from_pretrained(pretrained, local_files_only=True)
    generation.save_pretrained(folder)
    write_tokenizer(folder, config, facts)


def write_tokenizer(folder: Path, config: transformers.PretrainedConfig, facts: Mapping[str, Any]) -> None:
    """With the chat template that the run was trained by, where its recipe named one."""
    save_tokenizer(
        facts["recipe"]["data"]["tokenizer"],
        folder,
        pretrained=facts["recipe"]["model"]["pretrained"],
        max_tokens=getattr(config, "max_position_embeddings", None),
        chat_template=facts.get("data", {}).get("chat_template"),
    )


def _without_pruned(
    weights: Weights, config: transformers.PretrainedConfig, recipe: Mapping[str, Any]
) -> tuple[Weights | Compact, transformers.PretrainedConfig]:
    """What is stored: the model itself, or it without the heads, channels or layers that are pruned."""
    settings = recipe.get("prune") and PruneSettings.model_validate(recipe["prune"])
    return compact(weights, config, settings) if settings and settings.is_structured else (weights, config)


def _bytes(weights: Weights | Compact) -> int:
    return sum(record.bytes for record in weights.records.values())


def _write_weights(folder: Path, weights: Weights | Compact, *, family: str, shard_bytes: int) -> None:
    """``model.safetensors``, or numbered ones of at most ``shard_bytes`` (or one tensor) with their index."""
    bundles: list[list[_Stored]] = []
    free = 0
    # wide elements first, so that each is aligned
    for name, record in sorted(weights.records.items(), key=lambda item: (-ITEM_BYTES[item[1].dtype], item[0])):
        for tile in tiles(family, name, record.shape):
            stored = _Stored(name, tile, record.dtype)
            if not bundles or stored.bytes > free:
                bundles.append([])
                free = shard_bytes
            bundles[-1].append(stored)
            free -= stored.bytes
    count = len(bundles)
    places: dict[str, str] = {}
    for number, bundle in enumerate(bundles, start=1):
        file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        _write_file(folder / file, weights, bundle)
        places |= dict.fromkeys((stored.tile.key for stored in bundle), file)
    if count > 1:
        index = {"metadata": {"total_size": _bytes(weights)}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


@dataclass(frozen=True)
class _Stored:
    """A tensor of the exported files: a part of the checkpoint's tensor ``name``."""

    name: str
    tile: Tile
    dtype: str

    @property
    def bytes(self) -> int:
        return prod(self.tile.shape) * ITEM_BYTES[self.dtype]


def _write_file(path: Path, weights: Weights | Compact, bundle: Sequence[_Stored]) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for stored in bundle:
        offsets = [end, end + stored.bytes]
        entries[stored.tile.key] = {"dtype": stored.dtype, "shape": stored.tile.shape, "data_offsets": offsets}
        end += stored.bytes
    with open(path, "xb") as file:
        file.write(encode_header(entries))
        for name, parts in groupby(bundle, key=lambda stored: stored.name):
            tensor = torch.empty(weights.records[name].shape, dtype=DTYPES[weights.records[name].dtype])
            weights.fill({name: tensor})
            for stored in parts:
                file.write(tensor[stored.tile.box].contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def probe(config: transformers.PretrainedConfig) -> Tensor:
    """Token ids [2, T] on which two models are compared."""
    tokens = min(64, getattr(config, "max_position_embeddings", 64))
    return torch.randint(0, config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _difference(folder: Path, weights: Weights, config: transformers.PretrainedConfig, *, is_whole: bool) -> float:
    """Largest difference between the logits of the loaded folder and of the architecture filled from the checkpoint.

    Raises:
        RunFailed: it is over what rounding gives, or the architecture and the checkpoint do not have the same tensors.
    """
    ids = probe(config)
    direct = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype, trust_remote_code=False).eval()
    parameters = {name: parameter.data for name, parameter in direct.named_parameters()}
    if faults := weights.faults(parameters):
        raise RunFailed(f"{weights.path} cannot be exported as {type(direct).__name__}: {'; '.join(faults[:5])}")
    weights.fill(parameters)
    expected = direct(ids).logits
    del direct, parameters
    with without_progress_bar():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=config.dtype, local_files_only=True, trust_remote_code=False
        )
    difference = (loaded.eval()(ids).logits - expected).abs().max().item()
    limit = TOLERANCE if is_whole else CUT_TOLERANCE * expected.abs().max().item()
    if not difference <= limit:
        words = f"its logits differ by {difference:.1e}, more than {limit:.0e}"
        raise RunFailed(f"{weights.path} was not exported: loaded again, {words}")
    return difference


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Weights are loaded in a second or two; transformers' bar would outlive the command's own words."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
