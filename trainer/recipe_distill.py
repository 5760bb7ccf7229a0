"""The recipe's `distill`: what a model learns of a teacher. Imports no torch."""

from __future__ import annotations

from cuboid.trainer.recipe_fields import Positive, PositiveShare, Settings, Text


class DistillSettings(Settings):
    """A teacher whose predictions the model learns beside the labels (Hinton et al., 2015)."""

    teacher: Text
    """A local folder or a hub id with safetensors: a model with the same vocabulary, on the same mesh, not trained."""
    temperature: Positive = 1.0
    """Divides both models' logits before they are compared; above 1 the teacher's less likely tokens count more."""
    weight: PositiveShare = 0.5
    """Share of the teacher in the loss; the rest is the labels'."""
