"""What rounding of weights means, for one process: written out with torch alone.

`verify` judges `parallel/quantization.py` and torchao's tensors by it, and shares no line with either.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cuboid.trainer.recipe_quantize import QuantizeSettings

_LEAST = 1e-30
"""Of a scale: where all is zero, zero is to stay."""


class PlainQuantization:
    """Changes a whole model in place, transformers' or peft's: linears but ``head`` compute with rounded weights."""

    def __init__(self, model: nn.Module, settings: QuantizeSettings, *, head: str) -> None:
        self._settings, self._is_on = settings, False
        modules = dict(model.named_modules())
        for name, module in modules.items():
            if isinstance(module, nn.Linear) and head not in name.split(".") and "lora_" not in name:
                owner = modules[name.rpartition(".")[0]]
                self._replace(module, owner if name.endswith("base_layer") else None)

    def begin(self, step: int) -> None:
        """Before the step of this number."""
        self._is_on = step >= self._settings.start_step

    def _replace(self, linear: nn.Linear, adapter: Any) -> None:
        def forward(x: Tensor, *args: Any) -> Tensor:
            weight = linear.weight
            if adapter is not None:
                product = adapter.lora_B["default"].weight @ adapter.lora_A["default"].weight
                weight = weight + adapter.scaling["default"] * product
            if self._is_on:
                # the value of one, the gradient of the other
                weight = self._rounded(weight.detach().float()).to(weight.dtype) + (weight - weight.detach())
                if self._settings.scheme == "8da4w":
                    x = _affine(x.detach().float(), steps=255).to(x.dtype) + (x - x.detach())
            return F.linear(x, weight, linear.bias)

        module: Any = linear if adapter is None else adapter
        module.forward = forward

    def _rounded(self, weight: Tensor) -> Tensor:
        scheme, together = self._settings.scheme, self._settings.inputs_together
        groups = weight.unflatten(1, (-1, together or weight.shape[1]))
        if scheme == "float8":  # whose largest number is 448
            scale = groups.abs().amax(-1, keepdim=True) / 448
            return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(1)
        if scheme == "int4":
            return _affine(groups, steps=15).flatten(1)
        return _symmetric(groups, steps=255 if scheme == "int8" else 15).flatten(1)


def _symmetric(x: Tensor, *, steps: int) -> Tensor:
    """``steps`` even ones from minus to plus the largest magnitude of the last dimension; half a step off, so that zero
    is a value."""
    scale = (x.abs().amax(-1, keepdim=True) / (steps / 2)).clamp(min=_LEAST)
    return (x * (1 / scale)).round().clamp(-(steps + 1) // 2, steps // 2) * scale


def _affine(x: Tensor, *, steps: int) -> Tensor:
    """``steps`` even ones from the least to the largest of the last dimension, or zero, which is a value."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / steps).clamp(min=_LEAST)
    zero = (-(low / scale).round()).clamp(0, steps)
    return (((x * (1 / scale)).round() + zero).clamp(0, steps) - zero) * scale
