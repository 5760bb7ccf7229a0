"""The recipe's `preference`: how a model learns which of two answers is preferred. Imports no torch."""

from __future__ import annotations

from typing import Literal

from cuboid.trainer.recipe_fields import BelowHalf, Positive, Settings, Text

ADAPTER = "adapter"
"""The reference that is the model without its adapters."""


class PreferenceSettings(Settings):
    """Preference tuning on pairs of answers (data.kind: preference), against a reference model that is not trained
    (Rafailov et al. 2023, "Direct Preference Optimization")."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: that of DPO; ipo: a squared distance from a margin of 1 / (2 beta), an answer's tokens averaged."""
    beta: Positive = 0.1
    """How strongly the model is held to the reference."""
    label_smoothing: BelowHalf = 0.0
    """sigmoid: share of pairs that may be the wrong way round."""
    reference: Text | None = None
    """null: the model as it begins, in a second copy; adapter: the model without its adapters (lora), in no copy; or a
    local folder or hub id with safetensors and the same vocabulary."""
