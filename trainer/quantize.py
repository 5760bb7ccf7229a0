"""The torchao door: weights of linear layers rounded to 8 or 4 bits, after training or while it goes on.

To the nearest of evenly spaced values (Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient
inference", section 2): in 8 bits symmetric with a scale a row, in 4 bits with a scale and a zero point a group; 4 bits
also by `gptq`, which asks a calibration set. Or of the values of float8 (Micikevicius et al. 2022, "FP8 Formats for
Deep Learning", e4m3), with a scale a row. What layers read is rounded too in 8da4w, with scales found while they
compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any, Literal, Self

import torch
import transformers
from torch import Tensor, nn

from cuboid.parallel.errors import FieldError, UserError, one_of
from cuboid.parallel.layout import divisors
from cuboid.parallel.quantization import Rounding
from cuboid.trainer.calibration import Calibration, visit_linears
from cuboid.trainer.data import Batch
from cuboid.trainer.gptq import gptq
from cuboid.trainer.model_folder import Config, Model, linears, load_model, on_meta, quietly
from cuboid.trainer.recipe_quantize import GROUP_SIZE, QuantizeSettings

_SMALLEST_GROUP = 8


@dataclass(frozen=True)
class Quantization:
    """What is rounded, and how coarsely."""

    bits: Literal[8, 4]
    floating: bool = False
    """8 bits as numbers of float8 and not as whole ones."""
    inputs: bool = False
    """What layers read too, in 8 bits, a scale and a zero point a token; the weights then are symmetric."""
    group_size: int = GROUP_SIZE
    """Input features that share a scale, in 4 bits; in 8 bits a whole row does."""
    head: bool = False
    """The head too; the embedding always stays, which torchao does not round here."""
    calibration: Calibration | None = None
    """For `gptq`, in 4 bits, of all but the head; None: to nearest."""

    @classmethod
    def of(cls, settings: QuantizeSettings) -> Self:
        """What a recipe trains for."""
        return cls.named(settings.scheme, group_size=settings.inputs_together or GROUP_SIZE)

    @classmethod
    def named(cls, scheme: str, *, group_size: int, head: bool = False) -> Self:
        """By what recipes and exports call it."""
        bits: Literal[8, 4] = 8 if scheme in ("int8", "float8") else 4
        return cls(bits, floating=scheme == "float8", inputs=scheme == "8da4w", group_size=group_size, head=head)

    def rounding(self) -> Rounding:
        """What training computes with: torchao's own tensors, as `apply` makes them, and their values."""
        from torchao.quantization import quantize_

        config = self._config()

        def rounded(weight: torch.Tensor) -> torch.Tensor:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)
            quantize_(layer, config)
            return layer.weight.dequantize()

        return Rounding(rounded, by_row=self.bits == 8, inputs=_inputs_rounded if self.inputs else None)

    def check(self, config: Config) -> None:
        """Raises FieldError where a matrix cannot be divided into groups, or what is asked for is not there."""
        with quietly():
            self._config()  # a missing torchao is told before anything is computed
        if self.head and getattr(config, "tie_word_embeddings", False):
            # left as it is in silence by transformers, or drawn at random where its untie_embedding_weights is set
            constraint = "cannot round this model's head, which is the embedding's own tensor"
            raise FieldError("--head", "true", constraint, "leave the option out")
        sizes = _input_sizes(config)
        if not sizes:
            raise UserError(f"{config.model_type} keeps its matrices in other modules than linear layers; use --to hf")
        if self.bits == 4 and any(size % self.group_size for size in sizes):
            fits = [size for size in divisors(gcd(*sizes)) if size >= _SMALLEST_GROUP]
            constraint = f"does not divide the linear layers' in_features, {one_of(sorted(sizes))}"
            raise FieldError("--group-size", self.group_size, constraint, f"use {one_of(fits)}" if fits else "")

    def apply(self, folder: Path, calibration: Batch | None) -> Model:
        """The model of ``folder``, rounded while it is read, and where there is a calibration set once more by it."""
        settings = transformers.TorchAoConfig(self._config(), include_input_output_embeddings=self.head)
        rounded = load_model(folder, quantization_config=settings)
        if calibration is None:
            return rounded

        def replace(name: str, linear: nn.Linear, hessian_II: Tensor) -> None:
            weight = _four_bits(linear.weight, hessian_II, self.group_size)
            rounded.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
            linear.weight.copy_(weight.dequantize())

        visit_linears(load_model(folder), calibration, replace)
        return rounded

    def save(self, model: Model, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, folder: Path) -> Model:
        return load_model(folder)

    def words(self, model: Model) -> Sequence[str]:
        rounded = {name for name, weight in model.named_parameters() if _is_rounded(weight)}
        share = sum(weight.numel() for name, weight in model.named_parameters() if name in rounded)
        part = share / sum(weight.numel() for weight in model.parameters())
        scale = f"group of {self.group_size} inputs" if self.bits == 4 else "row"
        way = "by GPTQ" if self.calibration else "to nearest"
        kind = str(model.dtype).removeprefix("torch.")
        name = "float8" if self.floating else f"int{self.bits}"
        done = f"{len(rounded)} matrices, {part:.0%} of the numbers, {way}, one scale a {scale}"
        lines = [f"{name}: {done}; rest {kind}"]
        if self.bits == 4:
            lines.append("each of these numbers takes a byte on disk and in memory: on CPUs torchao keeps int4 as int8")
        if self.inputs:
            lines.append("what they read is rounded to int8 while they compute, one scale a token")
        return lines

    def _config(self) -> Any:
        from torchao.quantization import (
            Float8WeightOnlyConfig,
            Int8DynamicActivationIntxWeightConfig,
            Int8WeightOnlyConfig,
            IntxWeightOnlyConfig,
            MappingType,
            PerGroup,
        )

        if self.bits == 8:
            kind = Float8WeightOnlyConfig if self.floating else Int8WeightOnlyConfig
            # else torchao sets the precision of every matrix product of the process
            return kind(set_inductor_config=False)
        # Int4WeightOnlyConfig packs two to a byte, for kernels of GPUs: no CPU multiplies with its tensors
        four_bits = torch.int4  # type: ignore[attr-defined]  # torch's stubs leave it out
        if self.inputs:
            groups = PerGroup(self.group_size)
            return Int8DynamicActivationIntxWeightConfig(weight_dtype=four_bits, weight_granularity=groups)
        return IntxWeightOnlyConfig(
            weight_dtype=four_bits, granularity=PerGroup(self.group_size), mapping_type=MappingType.ASYMMETRIC
        )


def _inputs_rounded(x_BTD: torch.Tensor) -> torch.Tensor:
    """What a linear of 8da4w computes with in place of its inputs, as torchao's tensors have it."""
    from torchao.quantization import MappingType, choose_qparams_affine, dequantize_affine, quantize_affine

    block = [1] * (x_BTD.dim() - 1) + [x_BTD.shape[-1]]
    bounds = {"quant_min": -128, "quant_max": 127}
    scale, zero = choose_qparams_affine(
        x_BTD, MappingType.ASYMMETRIC, block, torch.int8, **bounds, zero_point_dtype=torch.int8
    )
    whole = quantize_affine(x_BTD, block, scale, zero, torch.int8, **bounds)
    return dequantize_affine(whole, block, scale, zero, torch.int8, **bounds, output_dtype=x_BTD.dtype)


def _input_sizes(config: Config) -> set[int]:
    """in_features of the model's linear layers; the head, whose are those of the layers, does not count as one."""
    return {linear.in_features for _, linear in linears(on_meta(config))}


def _four_bits(weight: Tensor, hessian_II: Tensor, group_size: int) -> Any:
    """The weight by `gptq`, in the form and on the grid that `IntxWeightOnlyConfig` gives."""
    from torchao.quantization import IntxUnpackedToInt8Tensor, MappingType

    four_bits = torch.int4  # type: ignore[attr-defined]  # torch's stubs leave it out

    def grid(part_OG: Tensor) -> tuple[Tensor, Tensor]:
        block = (1, part_OG.shape[1])
        nearest = IntxUnpackedToInt8Tensor.from_hp(
            part_OG.to(weight.dtype), block, four_bits, mapping_type=MappingType.ASYMMETRIC
        )
        return nearest.scale, nearest.zero_point

    found = gptq(weight, hessian_II, group_size=group_size, levels=(-8, 7), grid=grid)
    return IntxUnpackedToInt8Tensor(
        qdata=found.codes_OI,
        scale=found.scales_OK,
        zero_point=found.zeros_OK,
        target_dtype=four_bits,
        block_size=(1, group_size),
        dtype=weight.dtype,
        activation_quantization=None,
    )


def _is_rounded(weight: torch.Tensor) -> bool:
    from torchao.utils import TorchAOBaseTensor

    return isinstance(weight, TorchAOBaseTensor)
