"""Meshes, models and options that are compared with one process."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from cuboid.trainer.model_config import known_keys
from cuboid.trainer.recipe import Recipe

TOKENS, VOCABULARY, GLOBAL_BATCH, STEPS = 12, 96, 16, 3
CLIP, LEARNING_RATE, EPS = 0.25, 1e-2, 1e-3
"""Every step clips. A gradient's elements are about as large as eps: with a small one AdamW would be free of scale, and
clipping too much or too little would leave no trace in the updates."""

NO_SPECIAL_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "large": {"model_type": "llama", "hidden_size": 64, "vocab_size": 16384},
    "blocks": {"model_type": "llama", "attention_bias": True, "hidden_size": 128, "intermediate_size": 256},
    "smollm2": {"model_type": "llama", "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 4},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 4,
        "query_pre_attn_scalar": 4,
        "sliding_window": 5,
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 1.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 4,
        "query_pre_attn_scalar": 4,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    },
    "phi3": {
        "model_type": "phi3",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        "pad_token_id": None,
    },
    "smollm3": {"model_type": "smollm3", "pad_token_id": None},
    "olmo2": {"model_type": "olmo2"},
    "gpt_neox": {"model_type": "gpt_neox"},
    "gpt2": {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
    "mixtral_blocks": {"model_type": "mixtral", "num_local_experts": 4, "hidden_size": 128},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
    },
    "olmoe": {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2} | NO_SPECIAL_TOKENS,
    "gpt_oss": {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}
    | NO_SPECIAL_TOKENS
    | {"sliding_window": 5},
}
WITH_EXPERTS = ("mixtral", "mixtral_blocks", "qwen3_moe", "olmoe", "gpt_oss")
BALANCE = {"aux_loss": 0.3, "z_loss": 0.1, "bias_update": 0.02}
"""Large, so that a wrong gradient of theirs shows."""

HIDDEN_WEIGHT = 0.6
RELATIONS: dict[str, dict[str, Any]] = {
    "last": {"attention": 0.8},
    "some": {"attention": 0.8, "attention_layers": [0, 2, 3], "relation_heads": 8},
}
TEACHING = {"temperature": 2.0, "weight": 0.7}

PREFERENCE: dict[str, dict[str, Any]] = {
    "sigmoid": {"beta": 0.3, "label_smoothing": 0.2},
    "ipo": {"loss": "ipo", "beta": 0.4},
}

PRUNING: dict[str, dict[str, Any]] = {
    "magnitude": {"ratio": 0.7, "end_step": STEPS},
    "2:4": {"begin_step": 2},
    "heads": {"ratio": 0.75, "end_step": STEPS},
    "channels": {"ratio": 0.5, "end_step": STEPS, "multiple": 4},
    # after the step whose gradients are compared: what computes for a layer that is gone has none
    "layers": {"ratio": 0.5, "begin_step": 2, "end_step": STEPS},
}

QUANTIZE: dict[str, dict[str, Any]] = {
    "int8": {"scheme": "int8"},
    "int4": {"scheme": "int4", "group_size": 8},
    "8da4w": {"scheme": "8da4w", "group_size": 8},
    "float8": {"scheme": "float8"},
    "int4-later": {"scheme": "int4", "group_size": 8, "start_step": 2},
}

FROZEN: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "leading": ("model.embed_tokens.*", "model.layers.[012].*"),
    "middle": ("model.layers.[1234].*",),
    "trailing": ("model.layers.[345].*", "model.norm.*", "lm_head.*"),
    "norms": ("*norm*",),
    "embedding": ("model.embed_tokens.*",),
}
"""Which parameters are not trained. A tied head goes with the embedding; `test_frozen` says which stages are whole."""

LORA: dict[str, dict[str, Any] | None] = {
    "none": None,
    "all": {"rank": 4, "alpha": 8.0},
    "some": {"targets": ["q_proj", "v_proj", "down_proj"], "rank": 3, "alpha": 6.0, "rslora": True},
    "biases": {"rank": 2, "alpha": 4.0, "bias": "all"},
    "dora": {"rank": 4, "alpha": 16.0, "dora": True, "bias": "lora_only"},
    "head": {"targets": ["q_proj", "lm_head"], "rank": 4, "alpha": 16.0, "dora": True},
    "experts": {"rank": 3, "alpha": 6.0, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "down": {"targets": ["v_proj"], "rank": 4, "alpha": 8.0, "target_parameters": ["experts.down_proj"]},
    "whole": {"rank": 4, "alpha": 8.0, "modules_to_save": ["embed_tokens", "norm", "lm_head"]},
    "nf4": {"rank": 4, "alpha": 8.0, "base": "nf4", "bias": "lora_only"},
    "nf4-some": {"targets": ["q_proj", "down_proj"], "rank": 4, "alpha": 8.0, "base": "nf4"},
    "nf4-whole": {"rank": 2, "alpha": 4.0, "base": "nf4", "modules_to_save": ["up_proj", "embed_tokens", "lm_head"]},
}
"""Adapters; their matrices get values away from zero, so that each has a gradient."""


@dataclass(frozen=True)
class Case:
    """A mesh with everything that may change its numbers."""

    pipeline: int = 1
    data: int = 1
    tensor: int = 1
    schedule: str = "1f1b"
    family: str = "llama"
    tied: bool = False
    shard: bool = True
    sequence: bool = True
    activation_checkpointing: str = "none"
    microbatches: int = 4
    layers: int = 6
    frozen: str = "nothing"
    expert: int = 1
    capacity_factor: float | None = None
    teacher: str | None = None
    """A folder."""
    top_k: int | None = None
    """Of the teacher's likeliest tokens."""
    hidden: str | None = None
    """How hidden states are compared with the teacher's."""
    relations: str | None = None
    """Of `RELATIONS`, compared with the teacher's."""
    prune: str | None = None
    """A method."""
    quantize: str | None = None
    """Of `QUANTIZE`."""
    lora: str = "none"
    preference: str | None = None
    """A loss."""
    reference: str | None = None
    """Of preference tuning; a folder is a model of its own."""

    def __str__(self) -> str:
        words = [f"{self.pipeline}x{self.data}x{self.tensor}", self.schedule, self.family, f"m{self.microbatches}"]
        words += [f"e{self.expert}"] * (self.expert > 1) + ["dropping"] * (self.capacity_factor is not None)
        words += ["tied"] * self.tied + ["replicated"] * (not self.shard) + ["tokens-whole"] * (not self.sequence)
        words += [self.prune] if self.prune else []
        words += [self.quantize] if self.quantize else []
        words += ["taught"] * (self.teacher is not None) + [f"top{self.top_k}"] * (self.top_k is not None)
        words += [self.hidden] if self.hidden else []
        words += [f"{self.relations}-related"] if self.relations else []
        words += [f"{self.preference}-against-{Path(self.reference or 'start').name}"] if self.preference else []
        words += ["recomputed"] * (self.activation_checkpointing == "full")
        words += [f"lora-{self.lora}"] * (self.lora != "none")
        return "-".join(words + [f"{self.frozen}-frozen"] * (self.frozen != "nothing"))

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.tensor

    def recipe(self) -> Recipe:
        parallel = asdict(self)
        config = model_config(parallel.pop("family"), parallel.pop("tied"), parallel.pop("layers"))
        parallel.pop("frozen")
        parallel.pop("capacity_factor")
        teacher, method = parallel.pop("teacher"), parallel.pop("prune")
        pairs, reference = parallel.pop("preference"), parallel.pop("reference")
        parallel.pop("lora")
        quantize, top_k, hidden = parallel.pop("quantize"), parallel.pop("top_k"), parallel.pop("hidden")
        compared = {"hidden": HIDDEN_WEIGHT, "hidden_loss": hidden} if hidden else {}
        compared |= RELATIONS.get(parallel.pop("relations"), {})
        moe = BALANCE | {"capacity_factor": self.capacity_factor} if self.family in WITH_EXPERTS else None
        if moe and self.preference:
            moe["bias_update"] = 0.0
        return Recipe.model_validate(
            {
                "name": "parity",
                "model": {"config": config},
                "data": {"kind": "text", "path": "package:stdlib", "sequence_length": TOKENS},
                "parallel": parallel,
                "moe": moe,
                "distill": teacher and {"teacher": teacher, "top_k": top_k, **TEACHING, **compared},
                "prune": method and {"method": method, **PRUNING[method]},
                "quantize": quantize and QUANTIZE[quantize],
                "preference": pairs and {"reference": reference, **PREFERENCE[pairs]},
                "lora": LORA[self.lora],
                "optimizer": {
                    "learning_rate": LEARNING_RATE,
                    "eps": EPS,
                    "clip_grad_norm": CLIP,
                    "schedule": "constant",
                },
                "train": {"steps": STEPS, "global_batch": GLOBAL_BATCH},
            }
        )


TAUGHT = ("teacher", "top_k", "hidden", "relations")
OF_ONE_PROCESS = (
    *("family", "tied", "layers", "frozen", "capacity_factor"),
    *(*TAUGHT, "prune", "quantize", "lora", "preference", "reference"),
)
"""What of a case changes the numbers that are wanted of every mesh."""


@dataclass(frozen=True)
class ZeroCase(Case):
    """A mesh on which DeepSpeed runs data parallelism."""

    engine: str = "deepspeed"
    zero_stage: int = 1
    offload: str | None = None
    offload_path: str | None = None

    def __str__(self) -> str:
        return f"zero{self.zero_stage}-{super().__str__()}" + f"-{self.offload}" * bool(self.offload)


def model_config(family: str, tied: bool, layers: int = 6) -> dict[str, Any]:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
    }
    known = known_keys(CONFIG_MAPPING[FAMILIES[family]["model_type"]])
    return {key: value for key, value in sizes.items() if key in known} | FAMILIES[family]
