"""What pruning means, for one process: written out with a sort and a mask beside each weight.

`verify` judges `parallel/pruning.py` and `parallel/structures.py` by it, and shares no line with them but the course of
the share, and how many heads, channels or layers that is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cuboid.trainer.prune import is_due, ratio_before
from cuboid.trainer.recipe import PruneSettings
from cuboid.trainer.structures import Structures


class PlainPruning(ABC):
    """``weights``, by name, are those that are pruned."""

    def __init__(self, weights: Mapping[str, nn.Parameter], settings: PruneSettings) -> None:
        self._weights, self._settings = weights, settings
        self._masks: dict[str, Tensor] = {}

    @torch.no_grad()
    def begin(self, step: int, run: Callable[[], Any]) -> None:
        """Before the step of this number; ``run`` computes the model on its batch."""
        if is_due(self._settings, step):
            self._masks |= dict(self.masks(ratio_before(self._settings, step), run))
            self.end()

    @abstractmethod
    def masks(self, ratio: float, run: Callable[[], Any]) -> Iterator[tuple[str, Tensor]]:
        """Of what is pruned at this ratio: 1 where a weight stays, 0 where it goes."""

    def mask_gradients(self) -> None:
        for name, mask in self._masks.items():
            gradient = self._weights[name].grad
            assert gradient is not None
            gradient.mul_(mask)

    @torch.no_grad()
    def end(self) -> None:
        """After the optimizer's update."""
        for name, mask in self._masks.items():
            self._weights[name].mul_(mask)


class PlainWeights(PlainPruning):
    """Single weights."""

    def masks(self, ratio: float, run: Callable[[], Any]) -> Iterator[tuple[str, Tensor]]:
        if self._settings.method == "2:4":
            for name, weight in self._weights.items():
                smallest = weight.abs().unflatten(1, (-1, 4)).topk(2, largest=False, sorted=False).indices
                fours = torch.ones_like(weight).unflatten(1, (-1, 4)).scatter(-1, smallest, 0)
                yield name, fours.flatten(1)
            return
        every = torch.cat([weight.abs().flatten() for weight in self._weights.values()])
        gone = int(ratio * len(every))
        threshold = every.sort().values[gone - 1] if gone else -1.0
        for name, weight in self._weights.items():
            yield name, (weight.abs() > threshold).float()


class PlainStructures(PlainPruning):
    """Heads or channels, of each layer as many, or layers.

    Args:
        weights: all that are trained, by name.
        layers: of the model that computes, by name.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        settings: PruneSettings,
        structures: Structures,
        layers: Mapping[str, nn.Module],
    ) -> None:
        super().__init__(weights, settings)
        self._structures, self._layers = structures, layers
        self._gone: set[str] = set()
        """Layers."""

    def masks(self, ratio: float, run: Callable[[], Any]) -> Iterator[tuple[str, Tensor]]:
        count = self._structures.count(ratio)
        if self._settings.method == "layers":
            influences = {name: -1.0 if name in self._gone else value for name, value in self._influences(run).items()}
            self._gone = set(sorted(influences, key=lambda name: influences[name])[:count])
            writers = [f"{name}.{part}." for name in self._gone for part in ("self_attn.o_proj", "mlp.down_proj")]
            for name, weight in self._weights.items():
                if name.startswith(tuple(writers)):
                    yield name, torch.zeros_like(weight)
            return
        block = "self_attn" if self._settings.method == "heads" else "mlp"
        for layer in self._layers:
            names = [name for name in self._weights if name.startswith(f"{layer}.{block}.") and _is_divided(name)]
            yield from self._smallest({name: self._weights[name] for name in names}, count)

    def _smallest(self, weights: Mapping[str, Tensor], count: int) -> Iterator[tuple[str, Tensor]]:
        """Masks of a layer's weights, of which each head (or channel) has a row of every one."""
        rows = {name: (weight.t() if _reads(name) else weight) for name, weight in weights.items()}
        units = self._structures.units
        together = torch.cat([part.reshape(units, -1) for part in rows.values()], dim=1)
        stays = torch.ones(units)
        stays[together.double().square().sum(1).float().sort(stable=True).indices[:count]] = 0
        for name, part in rows.items():
            mask = stays.repeat_interleave(len(part) // units).view(-1, *[1] * (part.dim() - 1)).expand_as(part)
            yield name, mask.t() if _reads(name) else mask

    def _influences(self, run: Callable[[], Any]) -> dict[str, float]:
        """1 - the mean cosine of each layer's input and output; with a vector of zeros, as of a padding, it is 0."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda _, args, output: seen.update({name: (args[0].double(), output.double())})

        hooks = [layer.register_forward_hook(keep(name)) for name, layer in self._layers.items()]
        run()
        for hook in hooks:
            hook.remove()
        lengths = {name: (x.norm(dim=-1) * y.norm(dim=-1)).clamp(min=1e-8) for name, (x, y) in seen.items()}
        return {name: 1.0 - ((x * y).sum(-1) / lengths[name]).mean().item() for name, (x, y) in seen.items()}


def _reads(name: str) -> bool:
    """Whether heads or channels are this weight's columns."""
    return name.endswith(("o_proj.weight", "down_proj.weight"))


def _is_divided(name: str) -> bool:
    """Norms within heads, and what is added to the residual stream, belong to no head and no channel."""
    return "norm" not in name and (_reads(name) or not name.endswith(("o_proj.bias", "down_proj.bias")))
