"""Promise 1's other side: what one process computes, by plain transformers, peft and torch.

It shares no line with the stages, axes and schedules that it judges, but the tokens, the first weights and the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cuboid.parallel.loss import IGNORE
from cuboid.trainer.assemble import prepared
from cuboid.trainer.check_distill import teacher_recipe
from cuboid.trainer.check_preference import reference_recipe
from cuboid.trainer.data import Batch, prepare
from cuboid.trainer.model import (
    Blueprint,
    draw_blueprint,
    parameter_shapes,
    prunable,
    seed_of,
    whole_masks,
    whole_model,
)
from cuboid.trainer.model_config import config_of, read_checked_config
from cuboid.trainer.optimizer import is_decayed, learning_rate
from cuboid.trainer.plain_experts import PlainBalance
from cuboid.trainer.plain_preference import PlainPreference, pairs
from cuboid.trainer.plain_pruning import PlainPruning, PlainStructures, PlainWeights
from cuboid.trainer.plain_quantization import PlainQuantization
from cuboid.trainer.plain_teacher import PlainTeacher
from cuboid.trainer.recipe import MoeSettings, Recipe
from cuboid.trainer.recipe_preference import ADAPTER
from cuboid.trainer.structures import structures
from cuboid.trainer.tokenizer import open_tokenizer
from cuboid.trainer.tokens import cache_folder
from cuboid.trainer.weights import CopyInto, from_full

STEPS = 3
_B_STD = 0.02


@dataclass(frozen=True)
class Reference:
    """What one process computes; tensors by global name."""

    weights: Mapping[str, Tensor]
    """Before the first step."""
    batches: list[Batch]
    """The whole global batch of each step."""
    losses: list[float]
    grad_norms: list[float]
    """Before clipping."""
    gradients: Mapping[str, Tensor]
    """Of the first step, before clipping; of what is trained."""
    updates: Mapping[str, Tensor]
    """Weights after the last step minus weights before the first; zeros of what is frozen."""


def reference(recipe: Recipe, original: Recipe) -> Reference:
    """What plain transformers and torch compute in this process.

    Args:
        recipe: whose model is trained.
        original: whose tokenizer and text are read; ids beyond a smaller vocabulary wrap around.
    """
    torch.set_num_threads(1)  # the ranks are forked from this process: see `launch.verify`
    blueprint = undropped_blueprint(recipe)
    model = whole_with_values(recipe, blueprint)
    teaching, preferring = _teaching(recipe, model, blueprint), _preferring(recipe)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    masters = {name: nn.Parameter(weights[name].clone()) for name, p in model.named_parameters() if p.requires_grad}
    model.to(blueprint.compute)
    balance = PlainBalance(model, recipe.moe or MoeSettings())
    pruning = _pruning(recipe, blueprint, masters, model)
    quantization = recipe.quantize and PlainQuantization(model, recipe.quantize, head=blueprint.anatomy.head)
    settings = recipe.optimizer
    groups = [
        {
            "params": [p for name, p in masters.items() if is_decayed(name, p) is wanted],
            "weight_decay": settings.weight_decay if wanted else 0.0,
        }
        for wanted in (True, False)
    ]
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], betas=settings.betas, eps=settings.eps)
    batches = _batches(recipe, original)
    losses, norms, gradients = [], [], {}
    for step, batch in enumerate(batches, start=1):
        rows = recipe.batch_plan.microbatch_size
        if pruning:
            pruning.begin(step, partial(_compute, blueprint, model, masters, batch))
        if quantization:
            quantization.begin(step)
        loss = _backward(blueprint, model, masters, balance, batch, rows=rows, teaching=teaching, preferring=preferring)
        losses.append(loss)
        if pruning:
            pruning.mask_gradients()
        if step == 1:
            gradients = {name: _gradient(name, parameter) for name, parameter in masters.items()}
        limit = math.inf if settings.clip_grad_norm is None else settings.clip_grad_norm
        norms.append(math.sqrt(sum(_gradient(name, p).double().square().sum().item() for name, p in masters.items())))
        torch.nn.utils.clip_grad_norm_(masters.values(), limit)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step, steps=recipe.train.steps, settings=settings)
        adamw.step()
        adamw.zero_grad()
        balance.end_step()
        if pruning:
            pruning.end()
    updates = {name: masters.get(name, weight).detach() - weight for name, weight in weights.items()}
    return Reference(weights, batches, losses, norms, gradients, updates)


def first_values(recipe: Recipe, blueprint: Blueprint) -> tuple[Blueprint, CopyInto]:
    """As a run begins, but that an adapter's B is drawn too where it would be zeros: A then has no gradient, and zeros
    on both sides prove nothing."""
    blueprint, weights = prepared(recipe, blueprint)
    if recipe.lora is None or recipe.lora.init not in ("default", "gaussian"):
        return blueprint, weights

    def draw(name: str) -> Tensor:
        owner, _, _ = name.partition(".lora_B.")
        (scaling,) = blueprint.model.get_submodule(owner).scaling.values()
        generator = torch.Generator().manual_seed(seed_of(recipe.seed, name))
        # as W is drawn: a large product would make the model itself sensitive to rounding
        return torch.randn(blueprint.model.get_parameter(name).shape, generator=generator) * (_B_STD / scaling)

    drawn = from_full(draw)

    def copy_into(name: str, part: tuple[slice, ...], target: Tensor) -> None:
        (drawn if ".lora_B." in name else weights)(name, part, target)

    return blueprint, copy_into


def whole_with_values(recipe: Recipe, blueprint: Blueprint) -> Any:
    """The model that one process trains, with the first values of the recipe's: transformers', with peft's adapters."""
    model, (_, read) = whole_model(blueprint), first_values(recipe, blueprint)
    if recipe.lora is not None:
        from cuboid.trainer.adapters import inject

        inject(model, recipe.lora, blueprint.anatomy)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            read(name, tuple(slice(0, size) for size in parameter.shape), parameter)
    return model


def undropped_blueprint(recipe: Recipe) -> Blueprint:
    """Without dropout: no other mesh draws the same masks."""
    config = config_of(recipe)
    for key, value in list(vars(config).items()):
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(config, key, 0.0)
    return draw_blueprint(config, attention=recipe.model.attention, compute=recipe.precision.compute)


def _logits(model: nn.Module, blueprint: Blueprint, batch: Batch) -> Tensor:
    masks, positions = whole_masks(blueprint, batch.position_ids), batch.position_ids
    return model(
        input_ids=batch.input_ids, position_ids=positions, attention_mask=masks, use_cache=False
    ).logits.float()


def _teaching(recipe: Recipe, model: nn.Module, of_student: Blueprint) -> PlainTeacher | None:
    """With the teacher as a whole model of its own."""
    if recipe.distill is None:
        return None
    own = teacher_recipe(recipe)
    blueprint = undropped_blueprint(own)
    teacher = whole_with_values(own, blueprint).to(blueprint.compute).eval().requires_grad_(False)
    both = (model, of_student), (teacher, blueprint)
    return PlainTeacher(recipe.distill, *both, lambda batch: _logits(teacher, blueprint, batch))


def _preferring(recipe: Recipe) -> PlainPreference | None:
    """With the reference as a whole model of its own; its adapters are off where they are on the mesh, by peft."""
    if (settings := recipe.preference) is None:
        return None
    own = reference_recipe(recipe)
    blueprint = undropped_blueprint(own)
    reference = whole_with_values(own, blueprint).to(blueprint.compute).eval().requires_grad_(False)
    if settings.reference == ADAPTER:
        from cuboid.trainer.adapters import without_adapters

        without_adapters(reference)
    return PlainPreference(settings, lambda batch: _logits(reference, blueprint, batch))


def _pruning(
    recipe: Recipe, blueprint: Blueprint, masters: Mapping[str, nn.Parameter], model: nn.Module
) -> PlainPruning | None:
    if (settings := recipe.prune) is None:
        return None
    if settings.is_structured:
        units = structures(blueprint.config, settings, parameter_shapes(blueprint))
        stem = f"{blueprint.anatomy.base}.{blueprint.anatomy.layers}"
        layers = {f"{stem}.{index}": layer for index, layer in model.get_submodule(stem).named_children()}
        return PlainStructures(masters, settings, units, layers)
    names = prunable(blueprint, settings.modules)
    return PlainWeights({name: masters[name] for name in names}, settings)


@torch.no_grad()
def _compute(blueprint: Blueprint, model: nn.Module, masters: Mapping[str, nn.Parameter], batch: Batch) -> Tensor:
    """Logits of the whole batch, by the masters as they are now."""
    _copy(masters, model)
    return _logits(model, blueprint, batch)


@torch.no_grad()
def _copy(masters: Mapping[str, nn.Parameter], model: nn.Module) -> None:
    copies = dict(model.named_parameters())
    for name, parameter in masters.items():
        copies[name].copy_(parameter)


def _gradient(name: str, parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, f"one process gives {name} no gradient"
    return parameter.grad.clone()


def _backward(
    blueprint: Blueprint,
    model: nn.Module,
    masters: Mapping[str, nn.Parameter],
    balance: PlainBalance,
    batch: Batch,
    *,
    rows: int,
    teaching: PlainTeacher | None,
    preferring: PlainPreference | None,
) -> float:
    """Loss and gradients of the global batch, some rows at a time: a sum, divided by the one count. The model computes
    on copies of the masters in its own dtype, and their gradients are added up in float32. Experts are balanced beside
    the loss. ``teaching`` makes the loss of a teacher's, ``preferring`` one of pairs, divided by their number."""
    count, total = int((batch.labels != IGNORE).sum()), 0.0
    num_pairs = sum(1 for _ in pairs(batch))
    _copy(masters, model)
    copies = dict(model.named_parameters())
    for start in range(0, len(batch.labels), rows):
        part = slice(start, start + rows)
        some = Batch(batch.input_ids[part], batch.labels[part], batch.position_ids[part])
        balance.begin(len(some.labels))
        logits, labels = _logits(model, blueprint, some), some.labels
        if preferring:
            loss = preferring.loss(some, logits) / num_pairs
        else:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
            loss = (teaching.loss(some, logits, loss) if teaching else loss) / count
        (loss + balance.loss(labels, count)).backward()
        total += loss.item()
        for name, parameter in masters.items():
            gradient = copies[name].grad
            if gradient is not None:
                parameter.grad = gradient.float() if parameter.grad is None else parameter.grad + gradient.float()
        model.zero_grad()
    return total


def _batches(recipe: Recipe, original: Recipe) -> list[Batch]:
    """The recipe's first global batches, of each sequence the part that a shorter one holds, labels thinned by more in
    each row: only where microbatches and ranks predict unequally many tokens does a mean of means differ from the
    mean. Of pairs each third row loses all of its own."""
    vocabulary = read_checked_config(original.model).vocab_size
    tokenizer = open_tokenizer(original.data.tokenizer, pretrained=original.model.pretrained, vocab_size=vocabulary)
    dataset = prepare(original.data, tokenizer=tokenizer, seed=recipe.seed, cache=cache_folder())
    smaller, rows = read_checked_config(recipe.model).vocab_size, recipe.train.global_batch
    batches = []
    for step in range(STEPS):
        batch, length = dataset.batch(range(step * rows, (step + 1) * rows)), recipe.data.sequence_length
        batch = _window_of_pairs(batch, length) if recipe.preference else _window(batch, length)
        labels = torch.where(batch.labels == IGNORE, IGNORE, batch.labels % smaller)
        for row in range(rows):
            masked = labels.shape[1] * (row % 3 == 2) if recipe.preference else row * labels.shape[1] // rows
            labels[row, :masked] = IGNORE
        batches.append(Batch(batch.input_ids % smaller, labels, batch.position_ids))
    return batches


def _window(batch: Batch, length: int) -> Batch:
    """Of each row, [n, T] -> [n, ``length``], a part with predicted tokens, as many as may be, and if it can be with a
    document's beginning: in conversations both are rare."""

    def held(flags: Tensor) -> Tensor:
        """How many of these flags each part holds, by its first token: [n, T - length + 1]."""
        counts = F.pad(flags.cumsum(1), (1, 0))
        return counts[:, length:] - counts[:, :-length]

    begins = batch.position_ids == 0
    predicted = held(batch.labels != IGNORE)
    inside = held(begins) > begins[:, : predicted.shape[1]].long()
    first = ((predicted > 0) * (predicted + length * inside)).argmax(1, keepdim=True)
    index = first + torch.arange(length)
    ids, labels, positions = (part.gather(1, index) for part in (batch.input_ids, batch.labels, batch.position_ids))
    cut = (positions == 0).cumsum(1) == 0  # of the document that the part begins inside
    return Batch(ids, labels, torch.where(cut, torch.arange(length), positions))


def _window_of_pairs(batch: Batch, length: int) -> Batch:
    """Of each row's first pair, [n, T] -> [n, ``length``], a part of either answer, half and half."""
    if length == batch.labels.shape[1]:
        return batch
    documents, sides = (batch.position_ids == 0).cumsum(1) - 1, []
    for side, size in enumerate((length - length // 2, length // 2)):
        rows = [_at_least(batch, row, documents[row] == side, size) for row in range(len(documents))]
        sides.append([_window(row, size) for row in rows])
    names = ("input_ids", "labels", "position_ids")
    return Batch(*(torch.cat([torch.cat([getattr(row, name) for row in side]) for side in sides], 1) for name in names))


def _at_least(batch: Batch, row: int, kept: Tensor, length: int) -> Batch:
    """The kept tokens of a row, [1, ...], filled up to ``length`` where they are fewer."""
    ids, labels = batch.input_ids[row, kept], batch.labels[row, kept]
    missing = max(0, length - len(ids))
    positions = torch.arange(len(ids) + missing)
    return Batch(F.pad(ids, (0, missing))[None], F.pad(labels, (0, missing), value=IGNORE)[None], positions[None])
