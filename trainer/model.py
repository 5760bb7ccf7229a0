"""The transformers door: a model's shape on `meta`, its parts and tensor plan as data, its weights into shards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from cuboid.parallel.errors import FieldError, UserError
from cuboid.parallel.expert import choice
from cuboid.parallel.quantization import linears
from cuboid.parallel.stages import Anatomy, Costs, Masks
from cuboid.parallel.tensor import Plan, Role, adapted, pattern
from cuboid.trainer.foreign import reason
from cuboid.trainer.plans import USE_PROVEN, part_names, tensor_styles

_ROLES = {
    "colwise": Role.COLUMN,
    "rowwise": Role.ROW,
    "colwise_gather_output": Role.COLUMN_GATHERED,
    "rowwise_split_input": Role.ROW_CUT,
    "replicated_with_grad_allreduce": Role.HEADS,
}
"""What transformers' plans call the roles; a style that is not here is refused by name."""


_FLOPS_FOR_A_TOUCH = 100.0
"""What each element of an embedding costs in a microbatch: its dense gradient is cleared and added up, which moves
memory; in the time of one element a core or a GPU multiplies about this often."""


@dataclass(frozen=True)
class Blueprint:
    """A causal language model before any rank owns a weight of it."""

    config: transformers.PretrainedConfig
    model: transformers.PreTrainedModel
    """On `meta`: shapes and modules, no memory."""
    anatomy: Anatomy
    compute: torch.dtype = torch.float32
    """Of activations."""

    @property
    def drops_hidden_states(self) -> bool:
        """Whether layers have dropout beside that within attention."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.model.modules())

    def masks(self, position_ids: Tensor) -> Masks:
        """Attention mask of each kind of layer for positions [B, T]; where they start again, a new document begins."""
        shape = torch.empty(*position_ids.shape, 0, dtype=self.compute, device=position_ids.device)
        return {
            kind: _MASKS[kind](
                config=self.config,
                inputs_embeds=shape,
                attention_mask=None,
                past_key_values=None,
                position_ids=position_ids,
            )
            for kind in set(self.anatomy.layer_kinds)
        }


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What `precision` calls them."""
_BLIND_TO_POSITIONS = ("gpt_oss",)
"""Families whose masks transformers makes without looking where positions start again."""
_MASKS: Mapping[str, Callable[..., Any]] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


def draw_blueprint(
    config: transformers.PretrainedConfig, *, attention: str = "auto", compute: str = "float32"
) -> Blueprint:
    """Build the model's shape on `meta` and find its parts.

    Raises `FieldError` for a config of which no model can be built, and for a family whose parts or attention are not
    of the known shape.
    """
    config.use_cache = False
    kwargs = {} if attention == "auto" else {"attn_implementation": attention}
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False, **kwargs
            )
    except Exception as error:  # sizes that do not fit one another, which each family meets in its own way
        constraint = f"cannot be built from its config: {reason(error)}"
        raise FieldError("model.model_type", config.model_type, constraint, "mend the config") from error
    return Blueprint(config, model.train(), find_parts(model), DTYPES[compute])


def whole_model(blueprint: Blueprint) -> transformers.PreTrainedModel:
    """The model as transformers computes it, in this process's memory, with values that are still to be set."""
    attention = blueprint.model.config._attn_implementation
    model = transformers.AutoModelForCausalLM.from_config(
        blueprint.config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
    )
    return model.train()


def whole_masks(blueprint: Blueprint, position_ids: Tensor) -> Masks | None:
    """What the whole model takes as its attention mask so that documents are kept apart; None: it sees to it itself."""
    return blueprint.masks(position_ids) if blueprint.config.model_type in _BLIND_TO_POSITIONS else None


def find_parts(model: transformers.PreTrainedModel) -> Anatomy:
    """Check that the model has the parts that a stage computes, and nothing beside them."""
    config, base = model.config, getattr(model, model.base_model_prefix, nn.Module())
    kind = "sliding_attention" if getattr(config, "sliding_window", None) is not None else "full_attention"
    kinds = getattr(config, "layer_types", None) or [kind] * config.num_hidden_layers
    named, children = part_names(config), dict(base.named_children())
    rotary = next((name for name, child in children.items() if "RotaryEmbedding" in type(child).__name__), None)
    anatomy = Anatomy(
        tuple(kinds),
        base=model.base_model_prefix,
        embedding=named["embedding"],
        positions=named.get("positions"),
        dropout=named.get("dropout"),
        layers=named["layers"],
        norm=named["norm"],
        rotary=rotary,
        rotary_by_kind=hasattr(children.get(rotary), "layer_types"),
        logit_cap=getattr(config, "final_logit_softcapping", None),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
    )
    known = {*named.values(), *filter(None, [rotary])}
    strange = (children.keys() ^ known) | {name for name, _ in model.named_children()} ^ {anatomy.base, anatomy.head}
    unknown_kinds = set(kinds) - set(_MASKS)
    experts, router, beside = _find_experts(base.get_submodule(anatomy.layers)) if not strange else ("", "", [])
    strange |= set(beside)
    if strange or unknown_kinds:
        raise FieldError(
            "model.model_type",
            config.model_type,
            f"has parts that cannot be cut into stages yet: {', '.join([*sorted(strange), *sorted(unknown_kinds)])}",
            USE_PROVEN,
        )
    return replace(anatomy, experts=experts, router=router)


def _find_experts(layers: nn.Module) -> tuple[str, str, list[str]]:
    """Names within a layer of the fused experts and of their router, and of the parts beside these two; each empty
    where there is none."""
    for layer in layers.children():
        for name, module in layer.named_modules():
            parts = dict(module.named_children())
            if "experts" in parts:
                router = next((part for part in ("gate", "router") if part in parts), "")
                fused = bool(parts["experts"]._parameters)
                strange = parts.keys() - {"experts", router} if fused and router else {"experts"}
                return f"{name}.experts", f"{name}.{router}", [f"{name}.{part}" for part in sorted(strange)]
    return "", "", []


def tensor_plan(blueprint: Blueprint) -> Plan:
    """The config's own plan in our words, with what it leaves out: embedding, head and the residual stream's norms.

    Raises:
        FieldError: where a module with parameters would have no role. Left out, it would train wrongly in silence.
    """
    anatomy, config = blueprint.anatomy, blueprint.config
    theirs = tensor_styles(config)
    if not theirs:
        constraint = f"has no plan: transformers' {config.model_type} does not say how its layers are divided"
        raise FieldError("parallel.tensor", "2 or more", constraint, "use parallel.tensor=1")
    plan: dict[str, Role] = {
        f"{anatomy.base}.{anatomy.embedding}": Role.EMBEDDING,
        f"{anatomy.base}.{anatomy.norm}": Role.TOKENS,
        anatomy.head: Role.HEAD,
    }
    if anatomy.positions is not None:
        plan[f"{anatomy.base}.{anatomy.positions}"] = Role.POSITIONS
    layer = f"{anatomy.base}.{anatomy.layers}.*"
    if anatomy.experts:  # on this rank's tokens, as the norms are
        plan |= {f"{layer}.{anatomy.experts}": Role.EXPERTS, f"{layer}.{anatomy.router}": Role.TOKENS}
    without: dict[str, str] = {}
    for name, module in blueprint.model.named_modules():
        key = pattern(adapted(name))
        if not module._parameters or key in plan:
            continue
        style = theirs.get(key.removeprefix(f"{anatomy.base}."))
        if style in _ROLES:
            plan[key] = _ROLES[style]
        elif style is None and key.rpartition(".")[0] == layer and "norm" in type(module).__name__.lower():
            plan[key] = Role.TOKENS
        else:
            without[key] = style or "not in its plan"
    unmatched = {f"{anatomy.base}.{key}" for key in theirs} - plan.keys() - without.keys()
    if anatomy.experts:  # what it says of the experts is another way, and layers without experts there may be none
        block = anatomy.experts.rpartition(".")[0]
        unmatched = {key for key in unmatched if not key.startswith(f"{layer}.{block}.")}
    if without or unmatched:
        named = [f"{key} ({style})" for key, style in sorted(without.items())] + sorted(unmatched)
        constraint = f"cannot divide modules of {config.model_type} yet: {', '.join(named)}"
        raise FieldError("parallel.tensor", "2 or more", constraint, "use parallel.tensor=1")
    return plan


def estimate_costs(blueprint: Blueprint, *, sequences: int, sequence_length: int) -> Costs:
    """FLOPs of each part in one microbatch, forward and backward: 6 for each token and weight of a matrix product (2
    forward, 4 backward: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1), 4 where the weight
    is frozen and has no gradient (experts with adapters still have one, and cost more than told), and the two products
    of causal attention, of which half is masked."""
    anatomy, config = blueprint.anatomy, blueprint.config
    tokens = sequences * sequence_length

    def products(module: nn.Module) -> float:
        matrices = [parameter for parameter in module.parameters() if parameter.dim() > 1]
        return tokens * sum((6.0 if matrix.requires_grad else 4.0) * matrix.numel() for matrix in matrices)

    def idle(layer: nn.Module) -> float:
        """What the experts that a token does not choose would cost."""
        if not anatomy.has_experts(layer):
            return 0.0
        experts, chosen = choice(layer.get_submodule(anatomy.router))
        return products(layer.get_submodule(anatomy.experts)) * (1 - chosen / experts)

    base = blueprint.model.get_submodule(anatomy.base)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    seen = dict.fromkeys(_MASKS, sequence_length)
    if window := getattr(config, "sliding_window", None):
        seen["sliding_attention"] = min(window, sequence_length)
    layers = [
        products(layer) - idle(layer) + 6.0 * tokens * seen[kind] * width
        for layer, kind in zip(base.get_submodule(anatomy.layers).children(), anatomy.layer_kinds, strict=True)
    ]
    touched = [p.numel() for p in base.get_submodule(anatomy.embedding).parameters() if p.requires_grad]
    return Costs(
        layers, embedding=_FLOPS_FOR_A_TOUCH * sum(touched), head=products(blueprint.model.get_submodule(anatomy.head))
    )


def expert_counts(blueprint: Blueprint) -> list[int]:
    """How many experts each layer of the model has that has any."""
    anatomy = blueprint.anatomy
    layers = blueprint.model.get_submodule(anatomy.base).get_submodule(anatomy.layers).children()
    return [choice(layer.get_submodule(anatomy.router))[0] for layer in layers if anatomy.has_experts(layer)]


def seeded_tensors(blueprint: Blueprint, *, seed: int) -> Callable[[str], Tensor]:
    """Initial weights by global name, the same on every mesh: ``read(name)`` gives the full tensor on the CPU.

    Each module is initialised alone by the family's own rule (`_init_weights`) for it and then for the block that it
    stands in, from a generator that is seeded by the run's seed and the module's name; so neither the order nor the
    rank that asks matters.
    """

    def read(name: str) -> Tensor:
        owner, _, parameter = name.rpartition(".")
        parent, _, child = owner.rpartition(".")
        module = _twin(blueprint.model.get_submodule(owner), device="cpu")
        block = _twin(blueprint.model.get_submodule(parent), device="meta")
        block._modules = {key: _twin(sibling, device="meta") for key, sibling in block.named_children()}
        block._modules[child] = module
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, owner))
            blueprint.model._init_weights(module)
            blueprint.model._init_weights(block)  # GPT-2 starts lower in what writes into the residual stream
        return module.get_parameter(parameter).detach()

    return read


def initialise_buffers(blueprint: Blueprint, stage: nn.Module) -> None:
    """Compute the buffers that no file holds (rotary frequencies, an embedding's scale), in place, after `to_empty`.

    Raises:
        UserError: files hold a buffer, or the family's own rule (`_init_weights`) leaves it out.
    """
    for name, module in stage.named_modules():
        buffers = list(module.buffers(recurse=False))
        for buffer in buffers:
            buffer.fill_(torch.nan)
        if buffers:
            blueprint.model._init_weights(_twin(module, device="meta"))  # the parameters' values come from elsewhere
        if module._buffers.keys() - module._non_persistent_buffers_set or any(b.isnan().any() for b in buffers):
            raise UserError(f"{name} ({type(module).__name__}) has buffers that cannot be rebuilt yet")


def _twin(module: nn.Module, *, device: str) -> nn.Module:
    """The module with its own buffers and children and with new parameters, still without values."""
    twin = object.__new__(type(module))  # `copy` would call the constructor of a layer that FSDP manages
    twin.__dict__.update(module.__dict__)
    twin._parameters = {
        key: None if value is None else nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device=device))
        for key, value in module._parameters.items()
    }
    return twin


def seed_of(seed: int, name: str) -> int:
    """The seed of the module ``name``: what it draws depends on no other."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


def parameter_shapes(blueprint: Blueprint) -> dict[str, torch.Size]:
    """Of every parameter of the whole model, by global name."""
    named = blueprint.model.named_parameters()
    return {blueprint.anatomy.global_name(name): parameter.shape for name, parameter in named}


def prunable(blueprint: Blueprint, modules: Sequence[str] | None) -> dict[str, torch.Size]:
    """Global name and shape of each weight that may be pruned: of the layers' linear modules, or of those that are
    called so. Everything with two dimensions in a layer is a linear's weight."""
    layers = f"{blueprint.anatomy.base}.{blueprint.anatomy.layers}."
    return {
        name: parameter.shape
        for name, parameter in blueprint.model.named_parameters()
        if name.startswith(layers) and parameter.dim() == 2 and (modules is None or name.split(".")[-2] in modules)
    }


def local_inputs(blueprint: Blueprint, tensor: int) -> dict[str, int]:
    """By the last names of the linears that `quantize` rounds, such as down_proj: how many inputs a tensor rank has."""
    plan = tensor_plan(blueprint) if tensor > 1 else {}
    cut = (Role.ROW, Role.ROW_CUT)
    return {
        name.rpartition(".")[2]: linear.in_features // (tensor if plan.get(pattern(name)) in cut else 1)
        for name, linear in linears(blueprint.model, head=blueprint.anatomy.head)
    }


def local_folder(pretrained: str) -> Path:
    """The folder with a pretrained model's safetensors and config, downloaded from the hub where it is not local."""
    folder = Path(pretrained).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(pretrained, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]))
