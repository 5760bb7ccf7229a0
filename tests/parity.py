"""One process against a mesh: the same weights and data, every number compared. Shared by the parity tests."""

from __future__ import annotations

import functools
import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from cuboid.parallel.loss import IGNORE
from cuboid.parallel.mesh import connect
from cuboid.trainer.assemble import assemble
from cuboid.trainer.data import Batch
from cuboid.trainer.model import draw_blueprint
from cuboid.trainer.model_config import read_checked_config
from cuboid.trainer.optimizer import is_decayed
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.weights import from_full

# gathering a whole parameter to look at it is allowed to be slow
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

TOKENS, VOCABULARY, GLOBAL_BATCH, STEPS = 16, 96, 16, 3

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 4},
    "qwen2": {"model_type": "qwen2"},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
}


@dataclass(frozen=True)
class Case:
    """A mesh with everything that may change its numbers."""

    pipeline: int = 1
    data: int = 1
    tensor: int = 1
    schedule: str = "1f1b"
    family: str = "llama"
    tied: bool = False
    shard: bool = True
    sequence: bool = True
    activation_checkpointing: str = "none"
    microbatches: int = 4

    def __str__(self) -> str:
        words = [f"{self.pipeline}x{self.data}x{self.tensor}", self.schedule, self.family, f"m{self.microbatches}"]
        words += ["tied"] * self.tied + ["replicated"] * (not self.shard) + ["tokens-whole"] * (not self.sequence)
        return "-".join(words + ["recomputed"] * (self.activation_checkpointing == "full"))

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.tensor

    def recipe(self) -> Recipe:
        parallel = asdict(self)
        config = model_config(parallel.pop("family"), parallel.pop("tied"))
        return Recipe.model_validate(
            {
                "name": "parity",
                "model": {"config": config},
                "data": {"kind": "text", "path": "package:stdlib", "sequence_length": TOKENS},
                "parallel": parallel,
                "optimizer": {"learning_rate": 1e-2, "eps": 1e-6, "clip_grad_norm": 0.5, "schedule": "constant"},
                "train": {"steps": STEPS, "global_batch": GLOBAL_BATCH},
            }
        )


def model_config(family: str, tied: bool) -> dict[str, Any]:
    return FAMILIES[family] | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
    }


@dataclass(frozen=True)
class Reference:
    """What one process computes with transformers and torch alone."""

    weights: dict[str, torch.Tensor]
    batches: list[Batch]
    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    """Of the first step, before clipping."""
    updates: dict[str, torch.Tensor]
    """Weights after the last step minus weights before the first."""


def make_batch(seed: int) -> Batch:
    """Random tokens with very uneven label masks, and documents that begin in the middle of sequences."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, TOKENS + 1), generator=generator)
    labels, positions = ids[:, 1:].clone(), torch.arange(TOKENS).repeat(GLOBAL_BATCH, 1)
    for row in range(GLOBAL_BATCH):
        labels[row, : row * TOKENS // GLOBAL_BATCH] = IGNORE
        start = 1 + (5 * row) % (TOKENS - 1)
        if row % 3:
            positions[row, start:] -= start
    return Batch(ids[:, :-1].contiguous(), labels.contiguous(), positions)


@functools.cache
def reference(family: str, tied: bool) -> Reference:
    """Plain transformers and torch: the whole model, the whole batch, a mean over all valid tokens."""
    config = read_checked_config(Case(family=family, tied=tied).recipe().model)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # norms away from one and biases away from zero, so that a wrong gradient of theirs shows
        for parameter in model.parameters():
            noise = 0.1 * torch.randn_like(parameter)
            parameter.copy_(parameter + noise if parameter.dim() == 1 else 3 * parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = [
        {"params": [p for n, p in model.named_parameters() if is_decayed(n, p) is wanted], "weight_decay": decay}
        for wanted, decay in ((True, 0.1), (False, 0.0))
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-6)
    losses, norms, gradients = [], [], {}
    batches = [make_batch(seed) for seed in range(STEPS)]
    for step, batch in enumerate(batches):
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")
        loss = loss / (batch.labels != IGNORE).sum()
        loss.backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        adamw.step()
        adamw.zero_grad()
    updates = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    return Reference(before, batches, losses, norms, gradients, updates)


@dataclass(frozen=True)
class Difference:
    """How far a mesh is from one process; each figure relative, each worst over all parameters and ranks."""

    loss: float
    """Of the first step; later ones follow the updates."""
    grad_norm: float
    gradient: float
    worst_gradient: str
    missing: tuple[str, ...]
    update: float
    worst_update: str
    seen: frozenset[str]
    """Global names of the parameters that this rank holds."""


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(case: Case, expected: Reference) -> Difference:
    """Runs in every rank: a first backward for the gradients, then the optimizer steps."""
    recipe = case.recipe()
    with connect(recipe.layout, timeout_seconds=60) as block:
        blueprint = draw_blueprint(read_checked_config(recipe.model))
        engine = assemble(recipe, block, blueprint, from_full(expected.weights.__getitem__))
        missing, gradient, update = [], (0.0, ""), (0.0, "")
        for step, batch in enumerate(expected.batches):
            share = GLOBAL_BATCH // case.data
            rows = slice(block.coordinate.data * share, (block.coordinate.data + 1) * share)
            result = engine.backward(Batch(batch.input_ids[rows], batch.labels[rows], batch.position_ids[rows]))
            if step == 0:
                loss = abs(result.loss - expected.losses[0]) / expected.losses[0]
                norm = abs(result.grad_norm - expected.norms[0]) / expected.norms[0]
                for name, parameter in engine.parameters:
                    if parameter.grad is None:
                        missing.append(name)
                        continue
                    wanted = expected.gradients[name]
                    error = (full(parameter.grad) - wanted).abs().max() / wanted.abs().max()
                    gradient = max(gradient, (error.item(), name))
            engine.update(result, learning_rate=1e-2)
        for name, parameter in engine.parameters:
            wanted = expected.updates[name]
            moved = full(parameter.detach()) - expected.weights[name]
            update = max(update, (((moved - wanted).norm() / wanted.norm()).item(), name))
        seen = frozenset(name for name, _ in engine.parameters)
    return Difference(loss, norm, *gradient, tuple(missing), *update, seen)
