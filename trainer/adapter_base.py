"""The frozen matrices beside adapters as a run holds them: in 4 bits, or without what the adapter begins as.

Whatever the mesh, each rank makes its part of the same numbers from the files' own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cuboid.parallel.nf4 import BLOCK, frozen_linears, packed, unpacked
from cuboid.trainer.model import Blueprint
from cuboid.trainer.recipe_lora import LoraSettings
from cuboid.trainer.weights import CopyInto


class Base:
    """The frozen rest of a model with adapters, by the model's own names.

    Args:
        blueprint: of the model with adapters.
        weights: the model's own values.
    """

    def __init__(self, blueprint: Blueprint, settings: LoraSettings, weights: CopyInto) -> None:
        self._model, self._settings, self._weights = blueprint.model, settings, weights
        layers = f"{blueprint.anatomy.base}.{blueprint.anatomy.layers}"
        self._in_4_bits = {
            f"{layers}.{name.removesuffix('.base_layer')}.weight"
            for name in (frozen_linears(blueprint.model.get_submodule(layers)) if settings.base == "nf4" else ())
        }
        self._without_factors = {
            f"{name}.weight"
            for name, module in (blueprint.model.named_modules() if settings.takes_out else ())
            if hasattr(module, "lora_A")
        }
        self._taken_out = lru_cache(maxsize=1)(self._take_out)  # matrix, A and B are asked for one after another

    def copy_into(self, name: str, part: tuple[slice, ...], target: Tensor) -> None:
        """A part of ``name``: of its numbers, or of its blocks [F, D / 64, 34] where ``target`` holds bytes. Numbers of
        a matrix in 4 bits are those that its blocks stand for, and a part of them is one of whole blocks."""
        if name not in self._in_4_bits:
            self._copy(name, part, target)
            return
        rows, columns, *_ = part
        as_blocks = target.dtype is torch.uint8
        if as_blocks:
            columns = slice(columns.start * BLOCK, columns.stop * BLOCK)
        numbers = torch.empty(rows.stop - rows.start, columns.stop - columns.start)
        self._copy(name, (rows, columns), numbers)
        blocks = packed(numbers)
        target.copy_(blocks if as_blocks else unpacked(blocks))

    def factors(self, owner: str) -> tuple[Tensor, Tensor]:
        """A [r, D] and B [F, r], which were taken out of the matrix of the linear ``owner``."""
        lora_A, lora_B, _ = self._taken_out(owner)
        return lora_A, lora_B

    def _copy(self, name: str, part: tuple[slice, ...], target: Tensor) -> None:
        if name in self._without_factors:
            target.copy_(self._taken_out(name.removesuffix(".weight"))[2][part])
        else:
            self._weights(name, part, target)

    def _take_out(self, owner: str) -> tuple[Tensor, Tensor, Tensor]:
        """A, B, and W - scaling B A in the shape of W. Holds the whole of W, in float64, for as long."""
        layer: Any = self._model.get_submodule(owner)
        ((adapter, rank),) = layer.r.items()
        sizes = (layer.out_features, layer.in_features)
        weight = torch.empty(sizes[::-1] if layer.fan_in_fan_out else sizes)
        self._weights(f"{owner}.weight", tuple(slice(0, size) for size in weight.shape), weight)
        weight_FD = (weight.T if layer.fan_in_fan_out else weight).double()
        scaling = layer.scaling[adapter]
        lora_A, lora_B = (
            pissa_factors(weight_FD, rank, scaling)
            if self._settings.init == "pissa"
            else olora_factors(weight_FD, rank)
        )
        rest = (weight_FD - scaling * lora_B @ lora_A).float()
        return lora_A.float(), lora_B.float(), rest.T if layer.fan_in_fan_out else rest


def pissa_factors(weight_FD: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A [r, D] and B [F, r] so that scaling B A has the largest singular values of W and their vectors (Meng et al.
    2024, "PiSSA", arXiv 2404.02948, equations 2 and 3)."""
    left, singular, right = torch.linalg.svd(weight_FD, full_matrices=False)
    root = (singular[:rank] / scaling).sqrt()
    return _signed(root.unsqueeze(1) * right[:rank], left[:, :rank] * root)


def olora_factors(weight_FD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A = R[:r] and B = Q[:, :r] of W = Q R (Büyükakyüz 2024, "OLoRA", arXiv 2406.01775)."""
    Q, R = torch.linalg.qr(weight_FD)
    return _signed(R[:rank], Q[:, :rank])


def _signed(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of A with its largest element positive, and the column of B turned with it. A decomposition leaves this
    open, and ranks on two kinds of machine have to agree; in float64 the rest is the same after rounding."""
    signs = lora_A.gather(1, lora_A.abs().argmax(1, keepdim=True)).sign()
    return lora_A * signs, lora_B * signs.T
