"""Layers -> stages: which layers stand where, and a model cut down to one stage with its parameter names kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Watch = Callable[..., Tensor]
"""``watch(index, layer, compute, rows [B], predicted [B, T], mask) -> hidden_states [B, T_local, D]``, around each
layer: what ``compute()`` gives."""
Masks = Mapping[str, Tensor | None]
"""Attention mask [B, 1, T, T] for each kind of layer; None lets the attention kernel be plainly causal."""


@dataclass(frozen=True)
class Anatomy:
    """What the parts of a causal language model are called; ``layer_kinds`` names the mask that each layer takes."""

    layer_kinds: tuple[str, ...]
    base: str = "model"
    embedding: str = "embed_tokens"
    positions: str | None = None
    """Learned positions, added to the embedding."""
    dropout: str | None = None
    """Behind the embedding."""
    layers: str = "layers"
    norm: str = "norm"
    rotary: str | None = "rotary_emb"
    rotary_by_kind: bool = False
    """Whether each kind of layer turns by angles of its own."""
    head: str = "lm_head"
    logit_cap: float | None = None
    """Logits stay between minus this and this: cap tanh(logits / cap) (Gemma 2, arXiv 2408.00118, section 2)."""
    tied: bool = False
    experts: str = ""
    """Within a layer: the fused experts, and what chooses among them; empty where no layer has experts."""
    router: str = ""

    @property
    def embedding_weight(self) -> str:
        return f"{self.base}.{self.embedding}.weight"

    @property
    def head_weight(self) -> str:
        return f"{self.head}.weight"

    def has_experts(self, layer: nn.Module) -> bool:
        """Some layers of a model with experts may be without."""
        return bool(self.experts) and self.experts in dict(layer.named_modules())

    def global_name(self, name: str) -> str:
        """The one name under which a parameter is stored: a tied head is the embedding."""
        return self.embedding_weight if self.tied and name == self.head_weight else name


@dataclass(frozen=True)
class Costs:
    """What each part of a model costs in one microbatch, forward and backward, in one unit (such as FLOPs)."""

    layers: Sequence[float]
    embedding: float = 0.0
    """Computed by the first stage beside its layers."""
    head: float = 0.0
    """With the final norm and the loss; computed by the last stage beside its layers."""

    def of(self, split: Sequence[range]) -> list[float]:
        """The cost of each stage."""
        costs = [sum(self.layers[layer] for layer in layers) for layers in split]
        costs[0] += self.embedding
        costs[-1] += self.head
        return costs


def split_layers(costs: Costs, num_stages: int) -> list[range]:
    """Consecutive layers for each stage, at least one, so that the costliest stage costs as little as can be; among
    such splits the most even one (least sum of squares), and then the one with more layers in front."""
    count = len(costs.layers)
    assert 1 <= num_stages <= count, f"{count} layers cannot fill {num_stages} stages"
    limit, _ = _least(costs, num_stages, max)
    _, ends = _least(costs, num_stages, lambda total, cost: total + cost * cost if cost <= limit else math.inf)
    return [range(start, stop) for start, stop in pairwise((0, *ends))]


def _least(costs: Costs, num_stages: int, add: Callable[[float, float], float]) -> tuple[float, list[int]]:
    """The least that ``add`` makes of all stages' costs, one after the other from 0.0, and where those stages end."""
    count = len(costs.layers)
    # best[stop]: of the first `stop` layers; ends are negated, so that of two equal splits the smaller tuple is the one
    # with more layers in front
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(num_stages):
        is_last = stage == num_stages - 1
        beside = (costs.embedding if stage == 0 else 0.0) + (costs.head if is_last else 0.0)
        best = {
            stop: min(
                (add(total, beside + sum(costs.layers[start:stop])), (*ends, -stop))
                for start, (total, ends) in best.items()
                if start < stop
            )
            for stop in ([count] if is_last else range(stage + 1, count - (num_stages - stage - 1) + 1))
        }
    total, ends = best[count]
    return total, [-end for end in ends]


class Stage(nn.Module):
    """A consecutive part of a causal language model; every parameter keeps its name in the whole model.

    Layers live in a `ModuleDict` keyed by their global index, so that ``model.layers.7.mlp.up_proj.weight`` is called
    that on every mesh. The first stage takes token ids [B, T], later ones hidden states [B, T_local, D]; the last one
    returns logits [B, T, V_local]. T_local and V_local are smaller than T and V under tensor parallelism.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[int], *, anatomy: Anatomy, masks: Callable[[Tensor], Masks]
    ) -> None:
        super().__init__()
        base = model.get_submodule(anatomy.base)
        part = nn.Module()
        self.is_first = 0 in layers
        self.is_last = len(anatomy.layer_kinds) - 1 in layers
        here = [anatomy.rotary]
        if self.is_first:
            here += [anatomy.embedding, anatomy.positions, anatomy.dropout]
        if self.is_last:
            here += [anatomy.norm]
        for name in filter(None, here):
            part.add_module(name, base.get_submodule(name))
        all_layers = base.get_submodule(anatomy.layers)
        part.add_module(anatomy.layers, nn.ModuleDict({str(i): all_layers.get_submodule(str(i)) for i in layers}))
        self.add_module(anatomy.base, part)
        if self.is_last:
            self.add_module(anatomy.head, model.get_submodule(anatomy.head))
        self.anatomy, self.masks = anatomy, masks
        self.watch: Watch | None = None
        """See `layer_terms`; called in steps that number their ``rows``."""
        self.with_experts = {index for index, layer in self.layers.items() if anatomy.has_experts(layer)}

    def tie(self) -> None:
        """Make a tied head the embedding again where both stand here: `to_empty` gives each memory of its own."""
        if self.anatomy.tied and self.is_first and self.is_last:
            embedding = self.get_submodule(f"{self.anatomy.base}.{self.anatomy.embedding}")
            self.get_submodule(self.anatomy.head).weight = embedding.weight

    @property
    def layers(self) -> nn.ModuleDict:
        """This stage's transformer layers by global index."""
        layers = self.get_submodule(f"{self.anatomy.base}.{self.anatomy.layers}")
        assert isinstance(layers, nn.ModuleDict)
        return layers

    def forward(
        self,
        x: Tensor,
        *,
        position_ids: Tensor,
        sequence_share: Tensor | None = None,
        rows: Tensor | None = None,
        predicted: Tensor | None = None,
    ) -> Tensor:
        """``sequence_share`` [B] is for layers with experts, ``rows`` [B] and ``predicted`` [B, T] for `watch`."""
        part, names = self.get_submodule(self.anatomy.base), self.anatomy
        hidden = self._embed(x, position_ids) if self.is_first else x
        masks, rotary = self.masks(position_ids), self._rotary(hidden, position_ids)
        for index, layer in self.layers.items():
            kind = names.layer_kinds[int(index)]
            told = {"sequence_share": sequence_share} if index in self.with_experts else {}
            told |= {"attention_mask": masks[kind], "position_ids": position_ids}
            compute = partial(layer, hidden, **rotary[kind], **told)
            if self.watch is None or rows is None:
                hidden = compute()
            else:
                hidden = self.watch(int(index), layer, compute, rows=rows, predicted=predicted, mask=masks[kind])
        if not self.is_last:
            return hidden
        logits = self.get_submodule(names.head)(part.get_submodule(names.norm)(hidden))
        return logits if names.logit_cap is None else torch.tanh(logits / names.logit_cap) * names.logit_cap

    def _embed(self, ids: Tensor, position_ids: Tensor) -> Tensor:
        part, names = self.get_submodule(self.anatomy.base), self.anatomy
        hidden = part.get_submodule(names.embedding)(ids)
        if names.positions is not None:
            hidden = hidden + part.get_submodule(names.positions)(position_ids)
        return hidden if names.dropout is None else part.get_submodule(names.dropout)(hidden)

    def _rotary(self, hidden: Tensor, position_ids: Tensor) -> Mapping[str, Mapping[str, Any]]:
        """What each kind of layer takes of rotary positions; computed by every stage, which is cheaper than sending."""
        names = self.anatomy
        kinds = {names.layer_kinds[int(index)] for index in self.layers}
        if names.rotary is None:
            return {kind: {} for kind in kinds}
        rotary = self.get_submodule(f"{names.base}.{names.rotary}")
        if names.rotary_by_kind:
            return {kind: {"position_embeddings": rotary(hidden, position_ids, layer_type=kind)} for kind in kinds}
        shared = {"position_embeddings": rotary(hidden, position_ids=position_ids)}
        return dict.fromkeys(kinds, shared)


def cut_stage(model: nn.Module, layers: Sequence[int], *, anatomy: Anatomy, masks: Callable[[Tensor], Masks]) -> Stage:
    """The part of ``model`` with these consecutive layers; with the first comes the embedding, with the last the head.

    A tied head that stands alone on its stage gets a parameter of its own; `gradients.TiedWeights` keeps the copies
    equal. On one stage the tie stays one parameter.
    """
    part = Stage(model, layers, anatomy=anatomy, masks=masks)
    if anatomy.tied and part.is_last and not part.is_first:
        shared = part.get_parameter(anatomy.head_weight)
        copy = nn.Parameter(torch.empty_like(shared), requires_grad=shared.requires_grad)
        part.get_submodule(anatomy.head).register_parameter("weight", copy)
    return part


def apply_activation_checkpointing(stage: Stage) -> None:
    """Keep only each layer's input and compute the layer again in backward (Chen et al. 2016, section 4).

    `forward` is wrapped, not the module: parameter names stay, and hooks that gather sharded parameters run outside,
    once.
    """
    for layer in stage.layers.values():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
