"""A model's config with every mistake in words: no such folder, unknown model_type, a key the family does not have."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuboid.parallel.errors import FieldError, UserError, UserErrors, one_of
from cuboid.trainer.depth import kept_layers, shallower
from cuboid.trainer.foreign import check_folder, reason
from cuboid.trainer.plans import USE_PROVEN
from cuboid.trainer.recipe import ModelSettings, Recipe
from cuboid.trainer.recipe_errors import nearest, shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_HUB_SECONDS = 10
_MOST_LAYERS = 10_000
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read_checked_config(settings: ModelSettings) -> PretrainedConfig:
    """The transformers config of the recipe's model. Raises UserError where there is none; touches no weights."""
    if settings.config is not None:
        config = _from_values(settings.config)
    else:
        assert settings.pretrained is not None
        config = _from_pretrained(settings.pretrained)
    if not hasattr(config, "num_hidden_layers"):
        constraint = "holds no layers of its own: it joins several models, as of text and images"
        raise FieldError("model.model_type", config.model_type, constraint, "use the text model alone")
    check_buildable(config)
    if settings.layers is not None:
        return shallower(config, kept_layers(settings.layers, config.num_hidden_layers))
    return config


def check_buildable(config: PretrainedConfig) -> None:
    """Raises FieldError where a config counts layers that would be built for ever, also without any values, or names
    kernels that would be fetched and run."""
    for field in ("attn_implementation", "experts_implementation"):
        if "/" in str(kernels := getattr(config, f"_{field}", None)):
            raise FieldError(field, kernels, "is code of a hub, which is never run", "remove it from the config")
    layers = getattr(config, "num_hidden_layers", 1)
    if type(layers) is not int or not 1 <= layers <= _MOST_LAYERS:
        raise FieldError("num_hidden_layers", shown(layers), "is no model's", f"use 1 to {_MOST_LAYERS}")


def layers_in_folder(settings: ModelSettings) -> Sequence[int]:
    """Of each layer that is trained, its place among those of `model.pretrained`."""
    assert settings.pretrained is not None
    available = _from_pretrained(settings.pretrained).num_hidden_layers
    return range(available) if settings.layers is None else kept_layers(settings.layers, available)


_EXPERTS_OF = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
"""Families whose feed-forward is an expert of another's."""
_LOST = {"mixtral": ("attention_bias", "mlp_bias"), "qwen3_moe": ("use_sliding_window",)}
"""What the first may have and the second does not."""


def config_of(recipe: Recipe) -> PretrainedConfig:
    """The config that is trained: of the recipe's model, or of the experts that `moe.experts` makes of it."""
    config = read_checked_config(recipe.model)
    return config if recipe.moe is None or recipe.moe.experts is None else _upcycled(config, recipe)


def _upcycled(dense: PretrainedConfig, recipe: Recipe) -> PretrainedConfig:
    """The family whose experts compute what the dense feed-forward does, with the same sizes. The weights of a token's
    choices add up to 1, so that alike experts give what one of them gives (Komatsuzaki et al. 2022, "Sparse Upcycling",
    section 3)."""
    from transformers import CONFIG_MAPPING

    moe = recipe.moe
    assert moe is not None
    family = _EXPERTS_OF.get(dense.model_type)
    if recipe.model.pretrained is None:
        constraint = "has no weights to make experts of: the model is drawn from the seed"
        raise FieldError("moe.experts", moe.experts, constraint, "give model.pretrained, or a config with experts")
    if family is None:
        constraint = f"cannot make experts of {dense.model_type}"
        raise FieldError(
            "moe.experts", moe.experts, constraint, f"use a model of {one_of(sorted(_EXPERTS_OF))}, or null"
        )
    if moe.experts is not None and moe.top_k > moe.experts:
        constraint = f"is more than the moe.experts={moe.experts} there are"
        raise FieldError("moe.top_k", moe.top_k, constraint, f"use at most {moe.experts}")
    if lost := [name for name in _LOST[family] if getattr(dense, name, False)]:
        constraint = f"makes {family} of this {dense.model_type}, which has no {' and no '.join(lost)}"
        raise FieldError("moe.experts", moe.experts, constraint, "use null")
    kept = (known_keys(CONFIG_MAPPING[family]) | {"head_dim"}) - {"model_type", "layer_types"}
    values = {key: value for key, value in dense.to_dict().items() if key in kept}
    values |= {"num_experts_per_tok": moe.top_k}
    if family == "mixtral":
        values |= {"num_local_experts": moe.experts}
    else:
        size = {"num_experts": moe.experts, "moe_intermediate_size": values["intermediate_size"]}
        values |= size | {"norm_topk_prob": True}
    return CONFIG_MAPPING[family](**values)


def _from_values(values: dict[str, Any]) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig

    family = values["model_type"]
    if family not in CONFIG_MAPPING:
        guess = nearest(family, list(CONFIG_MAPPING))
        remedy = f"did you mean {guess}?" if guess else USE_PROVEN
        raise FieldError("model.config.model_type", family, "is not a family that transformers knows", remedy)
    if unknown := _unknown_keys(values, CONFIG_MAPPING[family]):
        raise UserErrors(unknown)
    arguments = {key: value for key, value in values.items() if key != "model_type"}
    try:
        with _quiet():
            return AutoConfig.for_model(family, **arguments)
    except Exception as error:  # transformers checks values in many ways, each with its own class
        constraint = f"cannot be made of these values: {reason(error)}"
        raise FieldError("model.config.model_type", family, constraint) from error


def known_keys(family: Any) -> set[str]:
    """What a config of this class may say; a folder's config often holds more, which nobody reads."""
    return {field.name for field in dataclasses.fields(family)} | set(family().to_dict()) | set(family.attribute_map)


def num_experts(config: PretrainedConfig) -> int:
    """Experts of a layer that has them; 0 for a dense model."""
    return getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of transformers, which would come once a rank; what is wrong is told by `check`."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _unknown_keys(values: dict[str, Any], family: Any) -> list[UserError]:
    """transformers keeps keys that it does not know and goes on, so that a typing error would be silent."""
    known = known_keys(family)
    errors: list[UserError] = []
    for key in sorted(values.keys() - known):
        guess = nearest(key, sorted(known))
        remedy = f"did you mean {guess}?" if guess else "remove it"
        errors.append(
            FieldError(f"model.config.{key}", shown(values[key]), f"is not a key of {family.__name__}", remedy)
        )
    return errors


def _from_pretrained(name: str) -> PretrainedConfig:
    from transformers import AutoConfig

    folder = Path(name).expanduser()
    if folder.exists():
        _check_folder(name, folder)
    else:
        _check_hub(name)
    try:
        return AutoConfig.from_pretrained(folder if folder.exists() else name, trust_remote_code=False)
    except Exception as error:  # no network, no such revision, an unknown family, a broken file
        raise FieldError("model.pretrained", name, f"has no config that can be read ({reason(error)})") from error


def _check_folder(name: str, folder: Path) -> None:
    if not folder.is_dir():
        raise FieldError("model.pretrained", name, "is a file", "give the folder with config.json and *.safetensors")
    if not (folder / "config.json").is_file():
        raise FieldError("model.pretrained", name, "has no config.json", "give a folder in Hugging Face's format")
    if not any(folder.glob("*.safetensors")):
        constraint = "has no *.safetensors; weights in a pickle (*.bin, *.pt) are never read"
        raise FieldError("model.pretrained", name, constraint, "save the model again with save_pretrained")
    try:
        check_folder(folder)
    except UserError as error:
        raise FieldError("model.pretrained", name, f"is not read: {error}") from error


def _check_hub(name: str) -> None:
    """One quick question to the hub, because transformers asks for half a minute where there is no network."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    missing = f"is no folder here ({Path.cwd()})"
    if not _HUB_ID.fullmatch(name):
        raise FieldError("model.pretrained", name, missing, "give an existing folder or a hub id")
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)
    except RepositoryNotFoundError as error:
        raise FieldError("model.pretrained", name, f"{missing} and no public model on the hub") from error
    except Exception as error:  # the transport's own classes: no route, a proxy, a time-out
        constraint = f"{missing}, and the hub cannot be asked ({reason(error)})"
        raise FieldError("model.pretrained", name, constraint, "make the folder, or connect to the network") from error
