"""Mixture-of-experts layers over the block of ranks: routing, dispatch to the experts' ranks, balance and measures.

The experts of a layer are divided over the ranks of the expert axis, which folds data and tensor together: each rank
sends its own tokens to the ranks that hold their experts, and gets the results back (Lepikhin et al. 2020, "GShard",
section 3.2). What an expert computes stays the family's own module.

Shapes: B sequences and t tokens of this rank, N = B t, k experts for each token, E experts in all, e of this rank,
M copies of tokens that arrive here, D model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from cuboid.parallel.collectives import exchange
from cuboid.parallel.expert_adapters import divide_experts, local_experts, without_adapters
from cuboid.parallel.loss import Attach
from cuboid.parallel.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Balance:
    """What keeps the experts evenly busy; all of it the same on every mesh."""

    aux_loss: float = 0.0
    """Weight of the auxiliary loss: E times the sum over experts of (share of a sequence's tokens that chose it) x
    (mean probability of it): Fedus et al. 2021, "Switch Transformers", equation 4. Of k choices it is k where even."""
    z_loss: float = 0.0
    """Weight of the squared log-sum-exp of the router's logits: Zoph et al. 2022, "ST-MoE", equation 5."""
    bias_update: float = 0.0
    """Step of a bias on each expert that joins in the choice alone: up after a step with less than an even load, else
    down (Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", algorithm 1)."""
    capacity_factor: float | None = None
    """An expert takes at most this many times its even share of a sequence's choices, the first ones; null: all."""


@dataclass(frozen=True)
class Measures:
    """How a step's tokens were routed, one row for each expert layer of the model."""

    layers: list[int]
    """Which layers these are."""
    load: Tensor
    """[layers, E]: choices of each expert, those that were dropped included."""
    dropped: Tensor
    """[layers]: choices beyond an expert's capacity."""
    entropy: Tensor
    """[layers]: mean over tokens of the entropy of the router's probabilities, in nats."""
    aux_loss: Tensor
    """[layers]: mean over predicted tokens, before its weight."""
    z_loss: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Measures:
        """From `ExpertLayer.row` of every layer, summed over the ranks: [layers, E + `_SUMS`]."""
        layers = (rows[:, -3] > 0).nonzero().flatten()  # those without experts have counted no token
        load, (dropped, entropy, tokens, aux_loss, z_loss) = rows[layers, :-_SUMS], rows[layers, -_SUMS:].unbind(1)
        return cls(layers.tolist(), load, dropped, entropy / tokens, aux_loss, z_loss)

    def record(self) -> dict[str, Any]:
        """As plain numbers for the metrics: means over the layers, but for the busiest expert of all. Empty where
        nothing was predicted."""
        if not self.layers:
            return {}
        choices = self.load.sum(1, keepdim=True)
        relative = self.load * self.load.shape[1] / choices
        return {
            "expert_load": relative.mean(0).tolist(),
            "expert_load_max": relative.max().item(),
            "expert_dropped": (self.dropped / choices.squeeze(1)).mean().item(),
            "router_entropy": self.entropy.mean().item(),
            "router_aux_loss": self.aux_loss.mean().item(),
            "router_z_loss": self.z_loss.mean().item(),
        }


_SUMS = 5
"""What a row of an expert layer holds beside the load of each expert."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What all expert layers of this rank have in common."""

    balance: Balance
    normalised: bool
    """Whether the weights of a token's k choices add up to 1."""
    num_layers: int
    """Expert layers of the whole model, over which the losses are means."""
    tensor_group: ProcessGroup
    """The ranks among which a sequence's tokens are divided."""


class ExpertLayer:
    """What stands around the router and the experts of one layer on this rank.

    Args:
        layer: the transformer layer; its forward then takes ``sequence_share`` too.
        index: of the layer in the model.
        experts: the family's module ``(x [N, D], index [N, k], weights [N, k]) -> [N, D]``, whose parameters have the
            experts as their first dimension.
        router: the family's module, whose forward gives the logits [N, E] first.
        mesh: the ranks among which the experts are divided (one-dimensional).
    """

    def __init__(
        self,
        layer: nn.Module,
        index: int,
        *,
        experts: nn.Module,
        router: nn.Module,
        mesh: DeviceMesh,
        routing: Routing,
    ) -> None:
        self.index = index
        self.num_experts, self.top_k = choice(router)
        self.row = torch.zeros(self.num_experts + _SUMS, dtype=torch.float64)
        """Counts and sums of the step so far: what `Measures` is made of."""
        self.bias = torch.zeros(self.num_experts, device=mesh.device_type)
        """Of `Balance.bias_update`; the same on every rank that holds this layer."""
        self._routing, self._balance = routing, routing.balance
        self._expert_group, self._tensor_group = mesh.get_group(), routing.tensor_group
        self._share: Tensor | None = None
        self._logits: Tensor | None = None
        self._compute = partial(_on_local_parameters, experts, without_adapters(experts).forward)
        layer.forward = partial(self._layer, layer.forward)
        router.forward = partial(self._route, router.forward)
        experts.forward = self._experts

    def _layer(self, inner: Any, x: Tensor, *, sequence_share: Tensor | None = None, **kwargs: Any) -> Any:
        """``sequence_share`` [B]: each sequence's share of the step's predicted tokens; None: nothing is learned."""
        self._share = sequence_share
        return inner(x, **kwargs)

    def _route(self, inner: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, E], weights [N, k] and the chosen experts [N, k] of each token."""
        self._logits = logits = inner(x)[0]
        probabilities = logits.float().softmax(-1)
        chosen = (probabilities + self.bias).topk(self.top_k, dim=-1).indices
        weights = probabilities.gather(-1, chosen)
        if self._routing.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(logits.dtype), chosen

    def _experts(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        logits, share = self._logits, self._share
        self._logits = self._share = None  # or a microbatch would stay in memory
        kept = None
        if share is not None and self._balance.capacity_factor is not None:
            kept = self._within_capacity(chosen, len(share))
            weights = weights * kept
        if share is not None and torch.is_grad_enabled():
            assert logits is not None, "the experts were called without their router"
            loss, row = self._losses(logits.float(), chosen, share, kept)
            weights = Attach.apply(weights, loss, partial(self._record, row))
        return self._dispatch(x, chosen, weights, kept)

    def _dispatch(self, x: Tensor, chosen: Tensor, weights: Tensor, kept: Tensor | None) -> Tensor:
        """Each token's copies to the ranks of its experts, and the weighted sum [N, D] of what comes back."""
        group, k = self._expert_group, chosen.shape[1]
        if group.size() == 1 and kept is None:
            return self._compute(x, chosen, weights)  # what follows would sort and copy once more for nothing
        expert = chosen.flatten() if kept is None else chosen.masked_fill(~kept, self.num_experts).flatten()
        counts = torch.bincount(expert, minlength=self.num_experts + 1)[: self.num_experts].view(group.size(), -1)
        arriving = counts
        if group.size() > 1:
            arriving = torch.empty_like(counts)
            dist.all_to_all_single(arriving, counts, group=group)
        send, receive = counts.sum(1).tolist(), arriving.sum(1).tolist()
        order = expert.argsort(stable=True)[: sum(send)]
        arrived = exchange(x[order // k], send, receive, group)
        own = torch.arange(counts.shape[1], device=x.device).repeat(group.size())
        own = own.repeat_interleave(arriving.flatten()).unsqueeze(1)
        computed = self._compute(arrived, own, torch.ones_like(own, dtype=x.dtype))
        back = exchange(computed, receive, send, group)
        # each copy to its own place, then a sum in a fixed order: rows added up at one place do not repeat on a GPU
        places = x.new_zeros(chosen.numel(), x.shape[1]).index_copy(0, order, back).view(-1, k, x.shape[1])
        return (places * weights.unsqueeze(-1)).sum(1)

    def _within_capacity(self, chosen: Tensor, sequences: int) -> Tensor:
        """[N, k]: whether a choice is among the first of its expert in its sequence, over all tensor ranks."""
        ranks, by_sequence = self._tensor_group.size(), chosen.view(sequences, -1)
        factor = self._balance.capacity_factor
        assert factor is not None
        capacity = math.ceil(factor * by_sequence.shape[1] * ranks / self.num_experts)
        hits = nn.functional.one_hot(by_sequence, self.num_experts)  # [B, t k, E]
        before = hits.cumsum(1) - hits
        if ranks > 1:
            totals = [torch.empty_like(hits[:, 0]) for _ in range(ranks)]
            dist.all_gather(totals, hits.sum(1), group=self._tensor_group)
            before = before + sum(totals[: self._tensor_group.rank()], torch.zeros_like(totals[0])).unsqueeze(1)
        return (before.gather(2, by_sequence.unsqueeze(2)) < capacity).view_as(chosen)

    def _losses(self, logits: Tensor, chosen: Tensor, share: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """This rank's part of the losses, and its `row`. The parts of all ranks add up to the mean over layers and
        predicted tokens of what each sequence has by itself, so that neither microbatches nor ranks change it. A
        sequence that predicts nothing, as those that fill up a batch, is not counted."""
        sequences, tokens = len(share), len(logits) // len(share) * self._tensor_group.size()
        probabilities = logits.softmax(-1)
        with torch.no_grad():
            load = nn.functional.one_hot(chosen, self.num_experts).sum(1).view(sequences, -1, self.num_experts).sum(1)
            frequency = load.to(logits.dtype)
            if self._tensor_group.size() > 1:
                dist.all_reduce(frequency, group=self._tensor_group)
        # linear in the probabilities: the sum over the ranks of a sequence needs no exchange of gradients
        mean = probabilities.view(sequences, -1, self.num_experts).sum(1) / tokens
        aux_loss = (self.num_experts / tokens * (frequency * mean).sum(-1) * share).sum()
        z_loss = (logits.logsumexp(-1).square().view(sequences, -1).sum(-1) / tokens * share).sum()
        loss = (self._balance.aux_loss * aux_loss + self._balance.z_loss * z_loss) / self._routing.num_layers
        counted = (share > 0).float()
        entropies = -(probabilities * probabilities.clamp(min=1e-30).log()).sum(-1)
        dropped = torch.zeros_like(entropies) if kept is None else (~kept).sum(-1)
        by_sequence = torch.stack([dropped, entropies, torch.ones_like(entropies)]).view(3, sequences, -1).sum(-1)
        row = torch.cat([counted @ load.float(), by_sequence @ counted, torch.stack([aux_loss, z_loss])])
        return loss, row.detach()

    def _record(self, row: Tensor) -> None:
        self.row = self.row.to(row.device) + row


class Experts:
    """The experts of this rank: divides them, and hands out the step's measures.

    Args:
        mesh: of ``mesh.expert_mesh``.
        num_layers: of the whole model, with experts and without.
        num_experts: of a layer.
    """

    def __init__(self, mesh: DeviceMesh, routing: Routing, *, num_layers: int, num_experts: int) -> None:
        self.mesh = mesh
        self._routing, self._num_layers, self._num_experts = routing, num_layers, num_experts
        self._layers: list[ExpertLayer] = []

    def divide(self, stage: Stage) -> None:
        """Divide the experts of ``stage`` over the expert axis in place."""
        mesh = self.mesh["expert"]
        for index, layer, experts, router in expert_modules(stage):
            if mesh.size() > 1:
                divide_experts(experts, mesh)
            self._layers.append(
                ExpertLayer(layer, index, experts=experts, router=router, mesh=mesh, routing=self._routing)
            )

    def take(self) -> Tensor:
        """This rank's part of the step's measures, flat and on the CPU, to be summed over all ranks; counting begins
        anew."""
        rows = torch.zeros(self._num_layers, self._num_experts + _SUMS, dtype=torch.float64)
        for layer in self._layers:
            rows[layer.index] = layer.row.cpu()
            layer.row = torch.zeros_like(layer.row)
        return rows.flatten()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of this rank's layers beside their parameters, where there is anything."""
        return {
            f"balance.{layer.index}.bias": layer.bias for layer in self._layers if self._routing.balance.bias_update
        }

    def rebalance(self, measures: Measures) -> None:
        """After a step: the biases follow its loads."""
        loads = dict(zip(measures.layers, measures.load, strict=True))
        for layer in self._layers:
            if layer.index in loads:
                load = loads[layer.index]
                layer.bias += self._routing.balance.bias_update * (load.mean() - load).sign().to(layer.bias)

    def measures(self, sums: Tensor) -> Measures:
        """From what `take` gave, summed."""
        return Measures.of(sums.view(self._num_layers, -1))


def _on_local_parameters(module: nn.Module, inner: Any, *args: Tensor) -> Tensor:
    with local_experts(module):
        return inner(*args)


def choice(router: nn.Module) -> tuple[int, int]:
    """(experts, how many of them a token chooses)."""
    top_k = router.top_k
    assert isinstance(top_k, int), f"{type(router).__name__} does not say how many experts a token chooses"
    return router.get_parameter("weight").shape[0], top_k


def expert_modules(stage: Stage) -> Iterator[tuple[int, nn.Module, nn.Module, nn.Module]]:
    """(index, layer, experts, router) of each layer of the stage that has experts."""
    for index, layer in stage.layers.items():
        if stage.anatomy.has_experts(layer):
            names = stage.anatomy
            yield int(index), layer, layer.get_submodule(names.experts), layer.get_submodule(names.router)
