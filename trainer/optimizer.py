"""AdamW on the shards that this rank holds, and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cuboid.parallel.gradients import local
from cuboid.parallel.local import Place
from cuboid.trainer.recipe import OptimizerSettings

MOMENTS = ("exp_avg", "exp_avg_sq")
"""torch's names of AdamW's two moments, kept for every parameter."""
_EMBEDDINGS = ("embed", "wte", "wpe")
"""Words by which models call their embeddings; the last two are GPT-2's, of tokens and of positions."""


class ShardedAdamW:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), fused, over plain views of each parameter's local shard.

    AdamW is elementwise, so a shard's update needs nothing from other ranks; working on plain tensors avoids the
    dispatch of distributed ones. Norms, biases and embeddings (also a tied head, which is one) are not decayed.

    Args:
        parameters: global name -> parameter, plain or DTensor. A name may stand for a tied copy. Frozen ones are left
            as they are and have no state; a rank may hold no others.
    """

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]], settings: OptimizerSettings) -> None:
        self.parameters = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
        # detached views share the shard's memory: an update of the view is the update of the parameter
        self._views = [local(parameter.detach()).requires_grad_() for _, parameter in self.parameters]
        names = [name for name, _ in self.parameters]
        self._adamw = make_adamw(list(zip(names, self._views, strict=True)), settings)
        make_moments(self._adamw, self._views)
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Say how many updates were made: the bias correction depends on it."""
        set_step(self._adamw, self._views, step)

    def step(self, learning_rate: float) -> None:
        """Update every parameter from its ``.grad`` and drop the gradients."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        for (_, parameter), view in zip(self.parameters, self._views, strict=True):
            view.grad = None if parameter.grad is None else local(parameter.grad)
        self._adamw.step()
        for (_, parameter), view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view.grad = None

    def state(self) -> dict[str, Tensor]:
        """``<slot>.<parameter name>`` -> tensor placed like its parameter, sharing memory with the optimizer's own."""
        return {
            f"{slot}.{name}": Place.of(parameter).put(moment) if isinstance(parameter, DTensor) else moment
            for (name, parameter), view in zip(self.parameters, self._views, strict=True)
            for slot, moment in ((slot, self._adamw.state[view][slot]) for slot in MOMENTS)
        }


def make_adamw(named: Sequence[tuple[str, Tensor]], settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over tensors by the name and with the dimensions of their parameters, which say what is decayed."""
    groups = [
        {
            "params": [tensor for name, tensor in named if is_decayed(name, tensor) is wanted],
            "weight_decay": settings.weight_decay if wanted else 0.0,
        }
        for wanted in (True, False)
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]] or groups,  # none where all of a stage is frozen
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def make_moments(adamw: torch.optim.AdamW, tensors: Iterable[Tensor]) -> None:
    """Both moments as zeros, before the first step, so that a checkpoint can be loaded into them."""
    for tensor in tensors:
        adamw.state[tensor] = {slot: torch.zeros_like(tensor, requires_grad=False) for slot in MOMENTS}


def set_step(adamw: torch.optim.AdamW, tensors: Iterable[Tensor], step: int) -> None:
    """Say how many updates were made of ``tensors``: the bias correction depends on it."""
    for tensor in tensors:
        adamw.state[tensor]["step"] = torch.tensor(float(step), device=tensor.device)


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Matrices are decayed; norms and biases (one dimension) and embeddings are not."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    return parameter.dim() > 1 and not any(word in module for word in _EMBEDDINGS)


def learning_rate(step: int, *, steps: int, settings: OptimizerSettings) -> float:
    """Rate of update ``step`` (from 1): linear warmup, then a course that ends at ``min_ratio`` of the peak.

    A function of the step alone, so that a resumed run needs no scheduler state. Cosine: Loshchilov and Hutter 2017,
    "SGDR", equation 5.
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if settings.schedule == "constant":
        return peak
    shape = 1.0 - progress if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (settings.min_ratio + (1.0 - settings.min_ratio) * shape)
