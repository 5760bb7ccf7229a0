"""The recipe's `distill`: what a model learns of a teacher. Imports no torch."""

from __future__ import annotations

from typing import Literal

from cuboid.trainer.recipe_fields import Count, NotNegative, Positive, PositiveShare, Settings, Text


class DistillSettings(Settings):
    """A teacher whose predictions the model learns beside the labels (Hinton et al., 2015)."""

    teacher: Text
    """A local folder or a hub id with safetensors: a model with the same vocabulary, on the same mesh, not trained."""
    temperature: Positive = 1.0
    """Divides both models' logits before they are compared; above 1 the teacher's less likely tokens count more."""
    weight: PositiveShare = 0.5
    """Share of the teacher in the loss; the rest is the labels'."""
    top_k: Count | None = None
    """Compare so many of the teacher's likeliest tokens, and all others as one; null: every token."""
    hidden: NotNegative = 0.0
    """Weight of a term that draws each layer's hidden states to the teacher's, added to the loss; 0: none."""
    hidden_loss: Literal["mse", "cosine"] = "mse"
    """mse: mean of squared differences; cosine: one less the cosine of the angle between them."""
    cache: Text | None = None
    """Folder that `cuboid teach` has written: what is compared is read, and the teacher does not run; null: it runs."""
