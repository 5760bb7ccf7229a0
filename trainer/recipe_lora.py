"""The recipe's `lora`: which weights of a frozen model are trained, and through what. Imports no torch."""

from __future__ import annotations

from typing import Literal

from cuboid.trainer.recipe_fields import Count, Momentum, Names, Positive, Settings, Text


class LoraSettings(Settings):
    """Low-rank adapters: the model is frozen, and beside a matrix W stands alpha / rank x B A, which is trained
    (Hu et al. 2022, "LoRA", section 4.1). Computed by peft (the extra cuboid[lora])."""

    targets: Literal["all-linear"] | Names = "all-linear"
    """Matrices that get an adapter, by the ends of their names, such as [q_proj, v_proj], or a head that is not tied;
    all-linear: those of every layer."""
    rank: Count = 16
    """Rows of A and columns of B."""
    alpha: Positive = 32.0
    """The adapter's output is multiplied by alpha / rank."""
    dropout: Momentum = 0.0
    """Share of an adapter's inputs that is dropped in training."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Biases of the model that are trained too: those of the targets, or all."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) (Kalajdzievski 2023, "rsLoRA")."""
    dora: bool = False
    """Train the length of each row of W apart from its direction (Liu et al. 2024, "DoRA", section 4.1)."""
    modules_to_save: Names = ()
    """Modules that are trained whole, by the ends of their names, such as [embed_tokens, lm_head]."""
    target_parameters: Names | None = None
    """Fused experts that get an adapter each, by the ends of their parameters' names, such as [experts.gate_up_proj,
    experts.down_proj]; beside targets, which may be [] then."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    """First values of A and B, by peft's names. default and gaussian draw A, and B is zero; orthogonal draws both so
    that B A is zero; pissa (Meng et al. 2024, arXiv 2404.02948) takes W's largest singular values out of W, olora
    (arXiv 2406.01775) a part of its QR decomposition: W is frozen without them."""
    base: Literal["nf4"] | None = None
    """How the frozen linears of layers are held: nf4, in 4 bits (Dettmers et al. 2023, "QLoRA"), or null, as
    precision.parameters says."""
    adapter: Text | None = None
    """Folder of a peft adapter to go on from; it then says targets, rank and the rest, which stay away here."""

    @property
    def takes_out(self) -> bool:
        """Whether the adapter begins as a part of W that W is frozen without."""
        return self.init in ("pissa", "olora")

    @property
    def only_merged(self) -> bool:
        """Whether W was rounded after a part was taken out of it, so that no adapter beside the model's own W is equal
        to the one that was trained."""
        return self.takes_out and self.base is not None
