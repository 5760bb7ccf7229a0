"""One process against a mesh: the same weights and data, every number compared. Shared by the parity tests."""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cases import (
    CLIP,
    EPS,
    FROZEN,
    GLOBAL_BATCH,
    LEARNING_RATE,
    OF_ONE_PROCESS,
    STEPS,
    TOKENS,
    VOCABULARY,
    Case,
)
from four_bits import cut_out_of, round_frozen
from harness import run_ranks
from taught import PlainTeacher
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from watch import Watch, Work

from cuboid.parallel.loss import IGNORE
from cuboid.parallel.mesh import Block, connect
from cuboid.parallel.nf4 import values
from cuboid.trainer.adapters import inject, with_adapters, without_adapters
from cuboid.trainer.assemble import assemble, initial_weights
from cuboid.trainer.data import Batch
from cuboid.trainer.engine import Engine
from cuboid.trainer.model import draw_blueprint, find_parts, whole_masks
from cuboid.trainer.model_config import read_checked_config
from cuboid.trainer.optimizer import is_decayed
from cuboid.trainer.plain_experts import PlainBalance
from cuboid.trainer.plain_preference import PlainPreference, pairs
from cuboid.trainer.plain_pruning import PlainPruning, PlainStructures, PlainWeights
from cuboid.trainer.plain_quantization import PlainQuantization
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.structures import structures

# gathering a whole parameter to look at it is allowed to be slow
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Reference:
    """What one process computes with transformers and torch alone."""

    weights: dict[str, torch.Tensor]
    batches: list[Batch]
    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    """Of the first step, before clipping; of what is trained."""
    updates: dict[str, torch.Tensor]
    """Weights after the last step minus weights before the first, of what is trained."""


def make_batch(seed: int, rows: int = GLOBAL_BATCH, tokens: int = TOKENS) -> Batch:
    """Random tokens with very uneven label masks, and documents that begin in the middle of sequences."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, tokens + 1), generator=generator)
    labels, positions = ids[:, 1:].clone(), torch.arange(tokens).repeat(rows, 1)
    for row in range(rows):
        labels[row, : row * tokens // rows] = IGNORE
        start = 1 + (5 * row) % (tokens - 1)
        if row % 3:
            positions[row, start:] -= start
    return Batch(ids[:, :-1].contiguous(), labels.contiguous(), positions)


def freeze(model: nn.Module, frozen: str) -> None:
    """As an adapter does before the model is cut: these parameters are not trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(fnmatchcase(name, pattern) for pattern in FROZEN[frozen]))


def one_process(case: Case) -> nn.Module:
    """The whole model as transformers computes it, with values that let every part show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(read_checked_config(case.recipe().model))
    with torch.no_grad():  # norms away from one and biases away from zero, so that a wrong gradient of theirs shows
        for parameter in model.parameters():
            noise = 0.1 * torch.randn_like(parameter)
            parameter.copy_(parameter + noise if parameter.dim() == 1 else 3 * parameter)
    freeze(model, case.frozen)
    if (lora := case.recipe().lora) is not None:
        inject(model, lora, find_parts(model))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "magnitude" in name:  # of rows: peft has set them to those of the matrix
                    parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
                elif ".lora_" in name:
                    parameter.normal_(std=0.1)
            if lora.base == "nf4":
                round_frozen(model.get_submodule("model.layers"))
    return model


def logits_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    masks = whole_masks(draw_blueprint(model.config), batch.position_ids)
    return model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=masks, use_cache=False
    ).logits


def backward(
    model: nn.Module,
    batch: Batch,
    balance: PlainBalance | None = None,
    teacher: PlainTeacher | None = None,
    preference: PlainPreference | None = None,
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of the whole batch, a mean over all valid tokens (or pairs), and the gradient of each parameter that is
    trained; ``balance`` is of a model with experts."""
    if balance:
        balance.begin(len(batch.labels))
    logits = logits_of(model, batch)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")
    if teacher:
        with torch.no_grad():
            wanted = logits_of(teacher.model, batch)
        loss = teacher.add_to(loss, logits, wanted, batch.labels != IGNORE, batch.position_ids)
    count = int((batch.labels != IGNORE).sum())
    loss = preference.loss(batch, logits) / len(list(pairs(batch))) if preference else loss / count
    (loss + balance.loss(batch.labels, count) if balance else loss).backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def plain_preference(case: Case) -> PlainPreference | None:
    """With a whole second model as the reference, its adapters switched off by peft."""
    recipe = case.recipe()
    if recipe.preference is None:
        return None
    if case.reference in (None, "adapter"):
        other = one_process(case)
        if case.reference:
            without_adapters(other)
    else:
        other = AutoModelForCausalLM.from_pretrained(case.reference)
    return PlainPreference(recipe.preference, lambda batch: logits_of(other, batch))


def plain_pruning(case: Case, model: nn.Module, trained: Mapping[str, nn.Parameter]) -> PlainPruning | None:
    """Of the weights of the linears in layers, or of structures in the layers."""
    settings = case.recipe().prune
    if settings and settings.is_structured:
        shapes = {name: parameter.shape for name, parameter in trained.items()}
        layers = {f"model.layers.{index}": layer for index, layer in model.model.layers.named_children()}
        return PlainStructures(trained, settings, structures(model.config, settings, shapes), layers)
    named = {name: p for name, p in trained.items() if re.search(r"\.(layers|h)\.", name) and p.dim() == 2}
    return PlainWeights(named, settings) if settings else None


def reference(case: Case) -> Reference:
    """What one process computes of a case, whatever its mesh; made once for all meshes."""
    return _reference(Case(**{name: getattr(case, name) for name in OF_ONE_PROCESS}))


@functools.cache
def _reference(case: Case) -> Reference:
    """Plain transformers, peft and torch: the whole model, the whole batch, clipped AdamW."""
    model, moe = one_process(case), case.recipe().moe
    taught_by = PlainTeacher(case, model) if case.teacher else None
    balance = PlainBalance(model, moe) if moe else None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for n, p in trained.items() if is_decayed(n, p) is wanted], "weight_decay": decay}
        for wanted, decay in ((True, 0.1), (False, 0.0))
    ]
    adamw = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=EPS)
    pruning, settings = plain_pruning(case, model, trained), case.recipe().quantize
    quantization = settings and PlainQuantization(model, settings, head=find_parts(model).head)
    preference = plain_preference(case)
    losses, norms, gradients = [], [], []
    batches = [make_batch(seed) for seed in range(STEPS)]
    for step, batch in enumerate(batches, start=1):
        if pruning:
            pruning.begin(step, partial(logits_of, model, batch))
        if quantization:
            quantization.begin(step)
        loss, of_step = backward(model, batch, balance, taught_by, preference)
        if pruning:
            pruning.mask_gradients()
            of_step = {name: p.grad.clone() for name, p in trained.items()}
        losses.append(loss)
        gradients.append(of_step)
        # not torch's own figure: in float32 it is off by 1e-5 where a parameter has a million elements
        norms.append(math.sqrt(sum(gradient.double().square().sum().item() for gradient in of_step.values())))
        torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
        adamw.step()
        adamw.zero_grad()
        if balance:
            balance.end_step()
        if pruning:
            pruning.end()
    updates = {name: p.detach() - before[name] for name, p in trained.items()}
    # what is compared must be there: an error relative to nothing would mean nothing
    assert min(losses) > 0
    assert min(norms) > CLIP, f"a step that does not clip: {norms}"
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, f"{name} has no gradient"
    for name, update in updates.items():
        assert update.norm() > 0, f"{name} does not move"
    return Reference(before, batches, losses, norms, gradients[0], updates)


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
    touched: tuple[str, ...]
    """Frozen parameters that got a gradient, a state in the optimizer, or another bit."""
    update: float
    worst_update: str
    work: Work = field(repr=False)
    measures: dict[str, Any] | None = field(repr=False)
    """Of a model with experts, in the first step."""

    @property
    def seen(self) -> set[str]:
        """Global names of the parameters that this rank holds."""
        return set(self.work.held)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def relative(found: float, expected: float) -> float:
    return abs(found - expected) / expected


def worst(errors: Iterable[tuple[torch.Tensor, str]]) -> tuple[float, str]:
    """The largest error and its name; (0, "") on a rank that trains nothing. Nothing is larger than NaN, and `max`
    would pass over it: it is refused."""
    found = [(error.item(), name) for error, name in errors]
    broken = [f"{name}: {error}" for error, name in found if not math.isfinite(error)]
    assert not broken, f"not finite: {', '.join(broken)}"
    return max(found, default=(0.0, ""))


@contextmanager
def assembled(case: Case, weights: Mapping[str, torch.Tensor], folder: Path | None = None) -> Iterator[Engine]:
    """The engine of this rank, assembled as a run does it, with what the case freezes frozen before."""
    recipe = case.recipe() if folder is None else pretrained(case.recipe(), folder)
    with connect(recipe.layout, timeout_seconds=60) as block:
        blueprint = draw_blueprint(read_checked_config(recipe.model))
        freeze(blueprint.model, case.frozen)
        if recipe.lora is not None:
            blueprint = with_adapters(blueprint, recipe.lora)
        given = cut_out_of(weights) if folder is None else initial_weights(recipe, blueprint)
        yield assemble(recipe, block, blueprint, given)


def own_share(batch: Batch, block: Block) -> Batch:
    """This data rank's samples; of a batch with fewer than the plan's, the last ranks have few or none."""
    share = GLOBAL_BATCH // block.layout.data
    rows = slice(block.coordinate.data * share, (block.coordinate.data + 1) * share)
    return Batch(batch.input_ids[rows], batch.labels[rows], batch.position_ids[rows])


def compare_gradients(engine: Engine, wanted: Mapping[str, torch.Tensor]) -> tuple[float, str, list[str]]:
    """The worst gradient's error and name, and the names of this rank's parameters that have none and should."""
    errors, missing = [], []
    for name, gradient in engine.gradients():
        if gradient is not None and name in wanted:
            error = (full(gradient) - wanted[name]).abs().max() / wanted[name].abs().max()
            errors.append((error, name))
        elif name in wanted:
            missing.append(name)
    return *worst(errors), missing


def pretrained(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with its model from a folder."""
    model = recipe.model.model_copy(update={"pretrained": str(folder), "config": None})
    return recipe.model_copy(update={"model": model})


def compare(case: Case, expected: Reference, folder: Path | None = None) -> Difference:
    """Runs in every rank: a first backward for the gradients, then the optimizer steps. The first weights are read from
    ``folder`` where one is given, in which transformers has saved them."""
    with assembled(case, expected.weights, folder) as engine:
        watch = Watch(engine)
        losses, norms = [], []
        kept = [name for name, _ in engine.parameters if name not in expected.gradients]
        state = engine.tensors() if kept else {}
        touched = [name for name in state if name.startswith("optimizer.") and name.split(".", 2)[2] in kept]
        for step, batch in enumerate(expected.batches):
            mine = own_share(batch, engine.block)
            engine.prune(step + 1, mine)
            engine.begin_step(step + 1)
            result = engine.backward(mine)
            losses.append(relative(result.loss, expected.losses[step]))
            norms.append(relative(result.grad_norm, expected.norms[step]))
            if step == 0:
                work = watch.work()
                *gradient, missing = compare_gradients(engine, expected.gradients)
                touched += [name for name, grad in engine.gradients() if name in kept and grad is not None]
                measures = result.measures and result.measures.record()
            engine.update(result, learning_rate=LEARNING_RATE)
        moved = {name: values(full(weight)) - expected.weights[name] for name, weight in engine.weights()}
        touched += [name for name in kept if moved[name].any()]
        updates = [
            ((moved[name] - update).norm() / update.norm(), name)
            for name, update in expected.updates.items()
            if name in moved
        ]
    found = (*gradient, tuple(missing), tuple(touched), *worst(updates), work, measures)
    return Difference(tuple(losses), tuple(norms), *found)


def difference(case: Case, folder: Path | None = None) -> list[Difference]:
    """Of every rank; weights from ``folder``, where one is given."""
    expected = reference(case)
    return run_ranks(compare, case.world_size, case, expected, folder, timeout=120)


def assert_same_numbers(case: Case, ranks: Iterable[Difference]) -> None:
    """Each rank's loss, gradient norm, gradients and updates are those of one process, within float rounding."""
    expected = reference(case)
    assert set().union(*(rank.seen for rank in ranks)) == set(expected.weights), "every parameter stands somewhere"
    for rank in ranks:
        assert not rank.missing, f"no gradient: {rank.missing}"
        assert not rank.touched, f"frozen, and yet: {rank.touched}"
        assert rank.gradient <= 1e-5, rank
        assert rank.update <= 2e-4, rank
        # the first step has the same weights; the later ones also show what the updates did to them
        for loss, tolerance in zip(rank.losses, (1e-6, 1e-5, 1e-5), strict=True):
            assert loss <= tolerance, rank
        for norm, tolerance in zip(rank.grad_norms, (1e-5, 1e-4, 1e-4), strict=True):
            assert norm <= tolerance, rank
