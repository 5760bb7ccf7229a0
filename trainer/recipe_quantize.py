"""The recipe's `quantize`: rounding that a model learns to bear while it is trained. Imports no torch."""

from __future__ import annotations

from typing import Literal

from cuboid.trainer.recipe_fields import Count, Settings

GROUP_SIZE = 32


class QuantizeSettings(Settings):
    """Quantization-aware training: the layers' linears compute with weights rounded as an export will round them, and
    gradients pass the rounding unchanged. Rounded by torchao (the extra cuboid[quantize])."""

    scheme: Literal["int8", "int4", "8da4w", "float8"]
    """int8: one scale a row, symmetric; int4: one scale and zero point a group of inputs; 8da4w: 4 bits with one scale
    a group, and what a layer reads in 8 bits, one scale and zero point a token; float8: e4m3, one scale a row."""
    group_size: Count | None = None
    """int4, 8da4w: neighbouring inputs that share a scale; null: 32."""
    start_step: Count = 1
    """First step that computes with rounded weights; 1: all do."""

    @property
    def inputs_together(self) -> int | None:
        """How many inputs share a scale; None: all of a row."""
        return None if self.scheme in ("int8", "float8") else self.group_size or GROUP_SIZE
