"""A family's parts and tensor plan: what transformers' configs carry, and as data what they leave out.

A new family needs a line here at most, and often none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cuboid.trainer.model_config import PretrainedConfig

PROVEN = (
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
"""Families that the project's tests prove on every mesh: docs/families.md."""
USE_PROVEN = f"use a family that is proven: {', '.join(PROVEN)}"
_PART_THAT_TAKES = {
    ("input_ids",): "embedding",
    ("inputs_embeds",): "dropout",
    ("hidden_states", "attention_mask"): "layers",
    ("hidden_states",): "norm",
}
"""What a part is, by its inputs in transformers' plans for pipelines."""
_MOST = {"embedding": "embed_tokens", "layers": "layers", "norm": "norm"}
_PARTS: Mapping[str, Mapping[str, str]] = {
    "gpt2": {"embedding": "wte", "positions": "wpe", "dropout": "drop", "layers": "h", "norm": "ln_f"},
}
_NORMS_OVER_ALL_HEADS = {
    "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
}
_TENSOR: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        "h.*.attn.c_attn": "colwise_gather_output",  # queries, keys and values side by side
        "h.*.attn.c_proj": "rowwise_split_input",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    },
    "olmo2": _NORMS_OVER_ALL_HEADS,
    "olmoe": _NORMS_OVER_ALL_HEADS,
}
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""Within a layer, what makes queries, keys and values; some families make all three in one matrix."""
_STORED: Mapping[str, Mapping[str, str]] = {"gpt_neox": {"lm_head.weight": "embed_out.weight"}}


def part_names(config: PretrainedConfig) -> Mapping[str, str]:
    """What the base model calls its embedding, layers and norm, and where it has them its learned positions and the
    dropout behind the embedding; Llama's names where nobody says."""
    if config.model_type in _PARTS:
        return _PARTS[config.model_type]
    theirs = config.base_model_pp_plan or {}
    return _MOST | {_PART_THAT_TAKES.get(tuple(inputs), name): name for name, (inputs, _) in theirs.items()}


def tensor_styles(config: PretrainedConfig) -> Mapping[str, str]:
    """transformers' word for what each module does under tensor parallelism, by its name in the base model with ``*``
    for the layer's index; empty where nobody says."""
    return {**(config.base_model_tp_plan or {}), **_TENSOR.get(config.model_type, {})}


def stored_names(config: PretrainedConfig) -> Mapping[str, str]:
    """What files call a parameter that the model calls otherwise."""
    return _STORED.get(config.model_type, {})
