"""A finished model as a Hugging Face folder: of a run, of a checkpoint, or one that is there; and the model in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from torch import Tensor, nn

from cuboid.parallel.errors import RunFailed, UserError
from cuboid.trainer import inspection
from cuboid.trainer.adapter_folder import is_adapter_folder, settings_and_base
from cuboid.trainer.export import Exported, export_hf, probe, without_progress_bar
from cuboid.trainer.foreign import check_folder, reason
from cuboid.trainer.low_rank_format import is_low_rank, load_low_rank, read_low_rank_config
from cuboid.trainer.manifest import MANIFEST
from cuboid.trainer.model import draw_blueprint, local_folder
from cuboid.trainer.model_config import check_buildable
from cuboid.trainer.out_folder import disk_errors_of
from cuboid.trainer.publish import discard
from cuboid.trainer.recipe import Recipe, validated
from cuboid.trainer.recipe_quantize import QuantizeSettings
from cuboid.trainer.restore import read_facts

Config: TypeAlias = transformers.PretrainedConfig
Model: TypeAlias = transformers.PreTrainedModel
_SHOWN = 3


@dataclass(frozen=True)
class Finished:
    """A model's folder, and what is known of where it came from."""

    folder: Path
    exported: Exported | None = None
    """The checkpoint that the folder was made of."""
    recipe: Recipe | None = None
    """Of the run that made it."""


def is_model_folder(source: Path) -> bool:
    """Whether this is a Hugging Face folder, and neither a run nor a checkpoint."""
    return (source / "config.json").is_file() and not (source / MANIFEST).exists()


@contextmanager
def finished(source: Path, *, beside: Path) -> Iterator[Finished]:
    """The model of ``source``, a run's folder, a checkpoint, a Hugging Face folder or one of an adapter, as a Hugging
    Face folder; an adapter is merged in.

    Args:
        beside: where there is room for a passing folder; it is made of all but a Hugging Face folder, and removed at
            the end.

    Raises:
        UserError: there is no model.
    """
    if is_model_folder(source):
        yield Finished(source)
        return
    passing = beside.absolute().with_name(f".{beside.name}.model")
    try:
        if is_adapter_folder(source):
            _merge(source, passing)
            yield Finished(passing)
            return
        if read_facts(inspection.resolve(source))["recipe"].get("lora"):
            from cuboid.trainer.export_adapter import export_adapter

            exported = export_adapter(source, passing, merge=True, overwrite=True)
        else:
            exported = export_hf(source, passing, overwrite=True)
        recipe, _ = validated(read_facts(exported.checkpoint)["recipe"])
        yield Finished(passing, exported, recipe)
    finally:
        discard(passing)


def trained_rounding(source: Path) -> QuantizeSettings | None:
    """What the run of ``source`` was trained to bear; None where it is a folder, or another run."""
    if is_model_folder(source):
        return None
    recipe, _ = validated(read_facts(inspection.resolve(source))["recipe"])
    return recipe.quantize if recipe else None


def _merge(adapter: Path, out: Path) -> None:
    """The whole model of an adapter's folder; its tokenizer is the adapter's, or else the model's.

    Raises:
        UserError: its model is not there, or another one.
    """
    from cuboid.trainer.adapters import load_adapter, misfits

    settings, base = settings_and_base(adapter)
    try:
        folder = local_folder(base)
    except (OSError, ValueError) as error:  # the hub's, of an id that it does not have, or that is none
        raise UserError(f"{adapter}: its model {base} is not here: {reason(error)}") from error
    blueprint = draw_blueprint(read_config(folder))
    try:
        wrong = misfits(blueprint, settings)  # peft would leave out what it does not find
    except Exception as error:  # peft's, of targets that the model does not have, or sizes that none has
        wrong = [reason(error)]
    if wrong:
        raise UserError(f"{adapter} is no adapter of {base}: {'; '.join(wrong[:_SHOWN])}")
    model: Any = load_adapter(load_model(folder), adapter)
    tokenizer = load_tokenizer(adapter if (adapter / "tokenizer_config.json").is_file() else folder)
    with disk_errors_of(out), quietly():
        model.merge_and_unload().save_pretrained(out)
        tokenizer.save_pretrained(out)


def read_config(folder: Path) -> Config:
    """The folder's config; raises UserError where transformers does not know it."""
    if is_low_rank(folder):
        return read_low_rank_config(folder)
    check_folder(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_buildable(config)
        return config
    except Exception as error:  # each class of a config refuses its values in its own way
        raise UserError(f"{folder} is not a model's folder: {reason(error)}") from error


def load_model(folder: Path, **changes: Any) -> Model:
    """The folder's model in its own dtype, for inference; no code of the folder is run and no pickle is read.

    Raises:
        UserError: it cannot be loaded, or not every weight is in its files: transformers alone would draw it at random.
    """
    if is_low_rank(folder):
        return load_low_rank(folder)
    read_config(folder)
    try:
        with quietly():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto",
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **changes,
            )
    except Exception as error:  # config and weights can be wrong in as many ways as there are classes
        raise UserError(f"{folder} cannot be loaded: {reason(error)}") from error
    strange = {f"{name} is missing" for name in info["missing_keys"]}
    strange |= {f"{name} is too much" for name in info["unexpected_keys"]}
    strange |= {f"{mismatch[0]} has another shape" for mismatch in info["mismatched_keys"]}
    if strange:
        more = f" (and {len(strange) - _SHOWN} more)" if len(strange) > _SHOWN else ""
        raise UserError(f"{folder} does not hold its model: {'; '.join(sorted(strange)[:_SHOWN])}{more}")
    return model.eval()


def on_meta(config: Config) -> Model:
    """The config's model without values: its modules and shapes."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def linears(model: Model) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear layer but the head, by name."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield name, module


@contextmanager
def quietly() -> Iterator[None]:
    """Without the bars and warnings of the libraries that load and save: `load_model` tells what is wrong."""
    logging.disable(logging.WARNING)
    try:
        with without_progress_bar():
            yield
    finally:
        logging.disable(logging.NOTSET)


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; no code of the folder is run.

    Raises:
        UserError: there is none.
    """
    check_folder(folder)
    try:
        with quietly():
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as of a model
        raise UserError(f"{folder} has no tokenizer: {reason(error)}") from error


def refuse_compressed(folder: Path) -> None:
    """Raises UserError where the model was made smaller already: its weights are not those that it was trained with."""
    if is_low_rank(folder) or getattr(read_config(folder), "quantization_config", None) is not None:
        raise UserError(f"{folder} was made smaller already; give the run, or the folder that it was made of")


@torch.no_grad()
def logits(model: Model) -> Tensor:
    """[2, up to 64, V], of the tokens on which exports are compared."""
    return model(probe(model.config)).logits


def check_equal(found: Tensor, expected: Tensor, folder: Path) -> None:
    """Raises RunFailed where a folder that was written does not give the logits of the model that was measured."""
    if not torch.equal(found, expected):
        difference = (found - expected).abs().max().item()
        raise RunFailed(f"{folder} was not written: loaded again, its logits differ by {difference:.1e}")


def weight_bytes(folder: Path) -> int:
    """Size of the folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
