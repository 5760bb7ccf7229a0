"""A model with some of the layers of a pretrained one: which layers, its config, their names. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cuboid.parallel.errors import FieldError
from cuboid.trainer.recipe_errors import shown

if TYPE_CHECKING:
    from cuboid.trainer.model_config import PretrainedConfig

BY_LAYER = ("layer_types", "no_rope_layers")
"""Keys of a config that hold a value for each layer."""


def kept_layers(layers: int | Sequence[int], available: int) -> tuple[int, ...]:
    """Which of ``available`` layers ``model.layers`` means. Of a count they are the first, the last, and others between
    them as far apart as can be (Shleifer and Rush 2020, "Pre-trained Summarization Distillation", shrink and
    fine-tune).

    Raises:
        FieldError: there are not so many, or they do not stand in the model's own order.
    """
    if isinstance(layers, int):
        if layers > available:
            raise FieldError("model.layers", layers, f"is more than the {available} there are", f"use {available}")
        return tuple(round(place * (available - 1) / max(layers - 1, 1)) for place in range(layers))
    kept = tuple(layers)
    if list(kept) != sorted(set(kept)) or kept[-1] >= available:
        constraint = f"is not a rising list of the model's layers, which are 0 to {available - 1}"
        raise FieldError("model.layers", shown(list(kept)), constraint, "name each once, in order; or give a count")
    return kept


def shallower(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """``config`` with these layers alone, each of the kind that it has been, in place."""
    for name in BY_LAYER:
        if values := getattr(config, name, None):
            setattr(config, name, [values[layer] for layer in kept])
    if hasattr(config, "mlp_only_layers"):  # which layers of a mixture have no experts, by place and by turns
        dense, turn = config.mlp_only_layers or [], config.decoder_sparse_step
        are_dense = [layer in dense or (layer + 1) % turn != 0 for layer in kept]
        config.mlp_only_layers = [place for place, is_dense in enumerate(are_dense) if is_dense]
        config.decoder_sparse_step = 1
    config.num_hidden_layers = len(kept)
    return config


def name_in_folder(name: str, kept: Sequence[int], *, layers: str) -> str:
    """What the whole model calls the parameter ``name`` of the shallower one; ``layers``: how layers' names begin."""
    if not name.startswith(layers):
        return name
    place, _, rest = name.removeprefix(layers).partition(".")
    return f"{layers}{kept[int(place)]}.{rest}"
