"""What rounding of weights means, for one process: written out with torch alone.

`verify` judges `parallel/quantization.py` and torchao's tensors by it, and shares no line with either.
"""

from __future__ import annotations

from typing import Any

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
                weight = weight + (self._rounded(weight.detach().float()).to(weight.dtype) - weight).detach()
            return F.linear(x, weight, linear.bias)

        module: Any = linear if adapter is None else adapter
        module.forward = forward

    def _rounded(self, weight: Tensor) -> Tensor:
        together = self._settings.inputs_together
        if together is None:  # 255 steps between minus and plus the largest of a row
            scale = (weight.abs().amax(1, keepdim=True) / 127.5).clamp(min=_LEAST)
            return (weight * (1 / scale)).round().clamp(-128, 127) * scale
        # 15 steps between the least and the largest of a group, or zero, which is one of the 16 values
        groups = weight.unflatten(1, (-1, together))
        low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
        scale = ((high - low) / 15).clamp(min=_LEAST)
        zero = (-(low / scale).round()).clamp(0, 15)
        return ((((groups * (1 / scale)).round() + zero).clamp(0, 15) - zero) * scale).flatten(1)
