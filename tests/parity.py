"""One process against a mesh: the same weights and data, every number compared. Shared by the parity tests."""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from cuboid.parallel.gradients import local
from cuboid.parallel.loss import IGNORE
from cuboid.parallel.mesh import connect
from cuboid.trainer.assemble import assemble
from cuboid.trainer.data import Batch
from cuboid.trainer.engine import Engine
from cuboid.trainer.model import draw_blueprint
from cuboid.trainer.model_config import read_checked_config
from cuboid.trainer.optimizer import is_decayed
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.weights import from_full

# gathering a whole parameter to look at it is allowed to be slow
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

TOKENS, VOCABULARY, GLOBAL_BATCH, STEPS = 12, 96, 16, 3
CLIP, LEARNING_RATE, EPS = 0.25, 1e-2, 1e-3
"""Every step clips. A gradient's elements are about as large as eps: with a small one AdamW would be free of scale, and
clipping too much or too little would leave no trace in the updates."""

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "smollm2": {"model_type": "llama", "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3},
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
                "optimizer": {
                    "learning_rate": LEARNING_RATE,
                    "eps": EPS,
                    "clip_grad_norm": CLIP,
                    "schedule": "constant",
                },
                "train": {"steps": STEPS, "global_batch": GLOBAL_BATCH},
            }
        )


@dataclass(frozen=True)
class ZeroCase(Case):
    """A mesh on which DeepSpeed runs data parallelism."""

    engine: str = "deepspeed"
    zero_stage: int = 1
    offload: str | None = None

    def __str__(self) -> str:
        return f"zero{self.zero_stage}-{super().__str__()}" + f"-{self.offload}" * bool(self.offload)


def model_config(family: str, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
    } | FAMILIES[family]


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
    adamw = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=EPS)
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
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        adamw.step()
        adamw.zero_grad()
    updates = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    # what is compared must be there: an error relative to nothing would mean nothing
    assert min(losses) > 0
    assert min(norms) > CLIP, f"a step that does not clip: {norms}"
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, f"{name} has no gradient"
        assert updates[name].norm() > 0, f"{name} does not move"
    return Reference(before, batches, losses, norms, gradients, updates)


@dataclass(frozen=True)
class Held:
    """A parameter on one rank: in how many parts it says that it is cut, and how much of it is there."""

    parts: dict[str, int]
    """By axis; an axis over which the parameter is whole is left out."""
    numel: int
    whole_numel: int
    is_matrix: bool


@dataclass(frozen=True)
class Work:
    """What a rank did in its first backward and what it holds: an option that does nothing shows here alone."""

    layer_calls: frozenset[int]
    """How often a layer computed, recomputation included; one number where all layers are alike."""
    layer_tokens: frozenset[int]
    """Tokens of the hidden states that enter a layer."""
    boundaries: frozenset[tuple[int, ...]]
    """Shapes [B, T_local, D] of what a stage gives to the next one."""
    logits: frozenset[tuple[int, ...]]
    """Shapes [B, T, V_local] of what the last stage gives to the loss."""
    held: dict[str, Held]


class Watch:
    """Looks on while an engine's stages compute."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._calls = engine, Counter[str]()
        self._tokens, self._boundaries, self._logits = set[int](), set[tuple[int, ...]](), set[tuple[int, ...]]()
        for timed in engine.pipeline._stages:
            stage = timed.submod
            outputs = self._logits if stage.is_last else self._boundaries
            stage.register_forward_hook(lambda _, args, output, outputs=outputs: outputs.add(tuple(output.shape)))
            for index, layer in stage.layers.items():
                layer.register_forward_pre_hook(lambda _, args: self._tokens.add(args[0].shape[1]))
                # inside of the layer, since a layer that is recomputed is not called again from outside
                layer.mlp.register_forward_pre_hook(lambda _, args, index=index: self._calls.update([index]))

    def work(self) -> Work:
        return Work(
            frozenset(self._calls.values()),
            frozenset(self._tokens),
            frozenset(self._boundaries),
            frozenset(self._logits),
            {name: _held(parameter) for name, parameter in self._engine.parameters},
        )


def _held(parameter: torch.Tensor) -> Held:
    parts: dict[str, int] = {}
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for axis, size, placement in zip(mesh.mesh_dim_names or (), mesh.shape, parameter.placements, strict=True):
            if not placement.is_replicate():
                parts[axis] = size
    return Held(parts, local(parameter).numel(), parameter.numel(), parameter.dim() > 1)


@dataclass(frozen=True)
class Difference:
    """How far a mesh is from one process; each figure relative, each worst over all parameters and ranks."""

    losses: tuple[float, ...]
    """Of each step; later ones follow the updates."""
    grad_norms: tuple[float, ...]
    gradient: float
    """Of the first step."""
    worst_gradient: str
    missing: tuple[str, ...]
    update: float
    worst_update: str
    work: Work = field(repr=False)

    @property
    def seen(self) -> set[str]:
        """Global names of the parameters that this rank holds."""
        return set(self.work.held)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def relative(found: float, expected: float) -> float:
    return abs(found - expected) / expected


def worst(errors: Iterable[tuple[torch.Tensor, str]]) -> tuple[float, str]:
    """The largest error and its name. Nothing is larger than NaN, and `max` would pass over it: it is refused."""
    found = [(error.item(), name) for error, name in errors]
    broken = [f"{name}: {error}" for error, name in found if not math.isfinite(error)]
    assert not broken, f"not finite: {', '.join(broken)}"
    return max(found)


def compare(case: Case, expected: Reference) -> Difference:
    """Runs in every rank: a first backward for the gradients, then the optimizer steps."""
    recipe = case.recipe()
    with connect(recipe.layout, timeout_seconds=60) as block:
        blueprint = draw_blueprint(read_checked_config(recipe.model))
        engine = assemble(recipe, block, blueprint, from_full(expected.weights.__getitem__))
        watch = Watch(engine)
        losses, norms, missing, errors = [], [], [], []
        for step, batch in enumerate(expected.batches):
            share = GLOBAL_BATCH // case.data
            rows = slice(block.coordinate.data * share, (block.coordinate.data + 1) * share)
            result = engine.backward(Batch(batch.input_ids[rows], batch.labels[rows], batch.position_ids[rows]))
            losses.append(relative(result.loss, expected.losses[step]))
            norms.append(relative(result.grad_norm, expected.norms[step]))
            if step == 0:
                work = watch.work()
                for name, gradient in engine.gradients():
                    if gradient is None:
                        missing.append(name)
                        continue
                    wanted = expected.gradients[name]
                    errors.append(((full(gradient) - wanted).abs().max() / wanted.abs().max(), name))
            engine.update(result, learning_rate=LEARNING_RATE)
        moved = {name: full(weight) - expected.weights[name] for name, weight in engine.weights()}
        updates = [
            ((moved[name] - update).norm() / update.norm(), name)
            for name, update in expected.updates.items()
            if name in moved
        ]
    return Difference(tuple(losses), tuple(norms), *worst(errors), tuple(missing), *worst(updates), work)
