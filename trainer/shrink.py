"""A recipe's model made small enough to be tried at once: the same family and options, few narrow layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from math import gcd, lcm
from typing import TYPE_CHECKING, Any

from cuboid.trainer.check_mesh import virtual_stages
from cuboid.trainer.depth import BY_LAYER
from cuboid.trainer.model_config import known_keys
from cuboid.trainer.recipe import ModelSettings, PruneSettings, Recipe
from cuboid.trainer.recipe_quantize import QuantizeSettings

if TYPE_CHECKING:
    from cuboid.trainer.model_config import PretrainedConfig

_HEAD = 8
_TOKENS = 16
LEAST_SIZE = 2 * _HEAD
"""Rows and columns that each shrunk matrix has at least."""


def shrink_config(
    config: PretrainedConfig, *, tensor: int, layers: int, expert: int = 1, top_k: int | None = 2, block: int = 1
) -> PretrainedConfig:
    """The same family with ``layers`` small layers, of all kinds in turn, that divide by ``tensor``, and few experts
    that divide by ``expert``, of which each token chooses ``top_k``, or None: all. A tensor rank's features divide by
    ``block``."""
    small = copy.deepcopy(config)
    kinds = layer_kinds(config)
    kv_heads = getattr(config, "num_key_value_heads", None)
    share = 1 if kv_heads is None else min(config.num_attention_heads // kv_heads, 2)
    heads = share * lcm(2, tensor)
    experts, head = lcm(4, expert), lcm(_HEAD, block)
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads // share,
        "head_dim": head,
        "hidden_size": heads * head,
        "intermediate_size": lcm(6 * lcm(_HEAD, tensor), block * tensor),
        "moe_intermediate_size": 2 * _HEAD,
        "num_experts": experts,
        "num_local_experts": experts,
        "num_experts_per_tok": top_k or experts,
        "vocab_size": 8 * lcm(_HEAD, tensor),
        "sliding_window": 5,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    for name, value in sizes.items():
        if getattr(config, name, None) is not None:
            setattr(small, name, value)
    small.num_hidden_layers = layers
    for name in kinds[0]:
        setattr(small, name, [kinds[layer % len(kinds)][name] for layer in range(layers)])
    rope = getattr(small, "rope_parameters", None) or {}
    for name in {"short_factor", "long_factor"} & rope.keys():  # of longrope: one for each pair of features that turns
        rope[name] = rope[name][: int(head * rope.get("partial_rotary_factor", 1.0)) // 2]
    return small


def layer_kinds(config: PretrainedConfig) -> list[Mapping[str, Any]]:
    """What the config says of single layers, once for each kind; one empty mapping where all are alike."""
    said = {name: values for name in BY_LAYER if (values := getattr(config, name, None))}
    kinds: list[Mapping[str, Any]] = []
    for layer in range(config.num_hidden_layers):
        kind = {name: values[layer] for name, values in said.items()}
        if kind not in kinds:
            kinds.append(kind)
    return kinds


def shrink_recipe(recipe: Recipe, config: PretrainedConfig) -> Recipe:
    """The recipe with such a model, drawn from the seed, and short sequences; mesh, schedule, microbatches and all that
    is turned on stay."""
    from cuboid.parallel.nf4 import BLOCK

    parallel = recipe.parallel
    stages, kinds = parallel.pipeline * virtual_stages(recipe), len(layer_kinds(config))
    layers = config.num_hidden_layers if parallel.layers else min(config.num_hidden_layers, max(stages + 1, 2 * kinds))
    small = shrink_config(
        config,
        tensor=parallel.tensor,
        layers=max(layers, stages),
        expert=parallel.expert,
        # near a tie, rounding in bfloat16 decides which expert a token chooses, and no two orders of sums round alike
        top_k=2 if recipe.precision.compute == "float32" else None,
        block=BLOCK if recipe.lora is not None and recipe.lora.base == "nf4" else 1,
    )
    known = known_keys(type(config)) - set(_NOT_VALUES)
    values = {key: value for key, value in small.to_diff_dict().items() if key in known}
    plan = recipe.batch_plan
    return recipe.model_copy(
        update={
            # the config has the experts that would have been made
            "moe": recipe.moe and recipe.moe.model_copy(update={"experts": None}),
            # what would be pruned later is pruned before the steps that are compared
            "prune": recipe.prune and _at_once(recipe.prune),
            "quantize": recipe.quantize and _shrink_quantize(recipe.quantize, small, parallel.tensor),
            "model": ModelSettings(
                config={**values, "model_type": config.model_type}, attention=recipe.model.attention
            ),
            # DeepSpeed keeps parts of less than 1 MiB in memory: nothing of a small model would come to lie on a disk
            "parallel": parallel.model_copy(update={"offload": "cpu", "offload_path": None})
            if parallel.offload == "nvme"
            else parallel,
            "data": recipe.data.model_copy(
                update={"sequence_length": min(recipe.data.sequence_length, lcm(_TOKENS, parallel.tensor))}
            ),
            "train": recipe.train.model_copy(
                update={"global_batch": plan.data * plan.microbatches * min(plan.microbatch_size, 2)}
            ),
        }
    )


def _at_once(settings: PruneSettings) -> PruneSettings:
    update: dict[str, Any] = {"begin_step": 1, "end_step": None}
    if settings.is_structured:  # of few heads, channels and layers half may always go
        update |= {"ratio": max(settings.ratio, 0.5), "multiple": 1 if settings.method == "channels" else None}
    return settings.model_copy(update=update)


def _shrink_quantize(settings: QuantizeSettings, small: PretrainedConfig, tensor: int) -> QuantizeSettings:
    """Rounded from the first step on, in groups that the small layers' inputs divide into on each tensor rank."""
    together = settings.inputs_together
    smaller = together and gcd(together, _HEAD, small.intermediate_size // tensor)
    return settings.model_copy(update={"group_size": smaller, "start_step": 1})


_NOT_VALUES = ("architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "auto_map")
"""Of a config: what is said beside the model's own values."""
