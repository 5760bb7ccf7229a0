"""The recipe's `distill`: what a model learns of a teacher. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from cuboid.trainer.recipe_fields import Count, NotNegative, Places, Positive, PositiveShare, Settings, Text

if TYPE_CHECKING:
    from cuboid.trainer.model_config import PretrainedConfig


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
    attention: NotNegative = 0.0
    """Weight of a term that draws relations between tokens, by queries, by keys and by values, to the teacher's, added
    to the loss (Wang et al. 2021, "MiniLMv2", section 3); 0: none."""
    attention_layers: Places | None = None
    """The model's own layers whose relations are compared, counted from 0; null: the last alone."""
    relation_heads: Count | None = None
    """How many relations there are of a layer's queries, of its keys and of its values; null: its key-value heads."""
    cache: Text | None = None
    """Folder that `cuboid teach` has written: what is compared is read, and the teacher does not run; null: it runs."""

    @property
    def compares_layers(self) -> bool:
        """Whether the teacher's layers are compared with the model's own, and not its predictions alone."""
        return self.hidden > 0 or self.attention > 0

    def relations(self, student: PretrainedConfig) -> tuple[Sequence[int], int]:
        """The student's layers whose relations are compared, and their relation heads."""
        layers = self.attention_layers or (student.num_hidden_layers - 1,)
        own = getattr(student, "num_key_value_heads", None) or student.num_attention_heads
        return layers, self.relation_heads or own
