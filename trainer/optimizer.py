"""AdamW on the shards that this rank holds, and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cuboid.parallel.gradients import local
from cuboid.trainer.recipe import OptimizerSettings

_SLOTS = ("exp_avg", "exp_avg_sq")
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
        decayed = [is_decayed(name, parameter) for name, parameter in self.parameters]
        groups = [
            {
                "params": [view for view, decay in zip(self._views, decayed, strict=True) if decay is wanted],
                "weight_decay": settings.weight_decay if wanted else 0.0,
            }
            for wanted in (True, False)
        ]
        self._adamw = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        for view in self._views:
            # made now, so that a checkpoint can be loaded before the first step
            self._adamw.state[view] = {slot: torch.zeros_like(view, requires_grad=False) for slot in _SLOTS}
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Say how many updates were made: the bias correction depends on it."""
        for view in self._views:
            self._adamw.state[view]["step"] = torch.tensor(float(step), device=view.device)

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
            f"{slot}.{name}": _placed_like(parameter, self._adamw.state[view][slot])
            for (name, parameter), view in zip(self.parameters, self._views, strict=True)
            for slot in _SLOTS
        }


def _placed_like(parameter: Tensor, shard: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return shard
    return DTensor.from_local(
        shard,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


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
