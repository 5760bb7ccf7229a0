"""A folder whose model has products of two narrow linear layers in place of some wide ones; how it is written and read.

No class of transformers has such layers, and no folder of its own format can ask for them without code of its own. So
this format is cuboid's, and transformers refuses it by the name of its model_type in place of loading it wrongly:

    config.json         model_type cuboid_low_rank; the architecture's own config; rank and error of each product
    model.safetensors   <layer>.narrow.weight [r, I] and <layer>.wide.weight [O, r] in place of <layer>.weight [O, I]

Shapes: O outputs, I inputs, r rank.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cuboid.parallel.errors import UserError
from cuboid.trainer.foreign import check_folder, read_json

LOW_RANK = "cuboid_low_rank"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class Product(nn.Module):
    """A linear layer as a narrow one, to ``rank`` features, and a wide one from them, which has the bias."""

    def __init__(self, linear: nn.Linear, rank: int, error: float) -> None:
        kind = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        super().__init__()
        self.narrow = nn.Linear(linear.in_features, rank, bias=False, **kind)
        self.wide = nn.Linear(rank, linear.out_features, bias=linear.bias is not None, **kind)
        self.rank, self.error = rank, error
        """Of the product: the Frobenius norm of what it leaves out, by that of the weight."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.wide(self.narrow(hidden))


def products(model: nn.Module) -> dict[str, Product]:
    """The products of a model, by the name of the layer that each stands for."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Product)}


def is_low_rank(folder: Path) -> bool:
    """Whether the folder is of this format."""
    return _described(folder).get("model_type") == LOW_RANK


def write_low_rank(model: transformers.PreTrainedModel, folder: Path) -> None:
    """Weights, config and generation config of a model with products. A tied head is stored once."""
    layers = {name: {"rank": product.rank, "error": product.error} for name, product in products(model).items()}
    config = {"model_type": LOW_RANK, "layers": layers, "model": model.config.to_dict()}
    (folder / _CONFIG).write_text(json.dumps(config, indent=2))
    model.generation_config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in _tensors(model).items()}, folder / _WEIGHTS)


def read_low_rank_config(folder: Path) -> transformers.PretrainedConfig:
    """The architecture's own config.

    Raises:
        UserError: transformers does not know the architecture.
    """
    try:
        values = dict(_described(folder)["model"])
        return transformers.CONFIG_MAPPING[values.pop("model_type")].from_dict(values)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / _CONFIG} does not describe a model that transformers knows: {error}") from error


def load_low_rank(folder: Path) -> transformers.PreTrainedModel:
    """The folder's model, for inference.

    Raises:
        UserError: the files are not what the config says.
    """
    check_folder(folder)
    config = read_low_rank_config(folder)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype, trust_remote_code=False)
    try:
        for name, layer in _described(folder)["layers"].items():
            model.set_submodule(name, Product(model.get_submodule(name), layer["rank"], layer["error"]))
        stored, tensors = load_file(folder / _WEIGHTS), _tensors(model)
        if strange := sorted(stored.keys() ^ tensors.keys()):
            raise ValueError(f"{strange[0]} is missing or too much")
        for name, tensor in tensors.items():
            if tensor.shape != stored[name].shape:
                raise ValueError(f"{name} has shape {list(stored[name].shape)}, not {list(tensor.shape)}")
            tensor.copy_(stored[name])
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (AttributeError, KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise UserError(f"{folder} does not hold its model: {error}") from error
    return model.eval()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _described(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / _CONFIG)
    except UserError:  # told by whoever reads it as a model of transformers
        return {}
