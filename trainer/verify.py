"""Promise 1 for one recipe: one process against its mesh, the same weights and data, every number compared.

The one process is transformers' own model and torch's AdamW: it shares no line with the stages, axes and schedules that
it judges, but the tokens, the first weights and the recipe.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cuboid.parallel.loss import IGNORE
from cuboid.parallel.mesh import connect
from cuboid.trainer.assemble import assemble, initial_weights
from cuboid.trainer.data import Batch, prepare
from cuboid.trainer.model import Blueprint, draw_blueprint, whole_masks, whole_model
from cuboid.trainer.model_config import config_of, read_checked_config
from cuboid.trainer.optimizer import is_decayed, learning_rate
from cuboid.trainer.plain_experts import PlainBalance
from cuboid.trainer.recipe import MoeSettings, Recipe
from cuboid.trainer.shrink import shrink_recipe
from cuboid.trainer.tokenizer import open_tokenizer
from cuboid.trainer.tokens import cache_folder

STEPS = 3
TOLERANCES = {
    "float32": {"loss_rel": 1e-6, "grad_norm_rel": 1e-5, "gradient_rel": 1e-5, "update_rel": 1e-3},
    "bfloat16": {"loss_rel": 2e-4, "grad_norm_rel": 1e-2, "gradient_rel": 5e-2, "update_rel": 5e-1},
}
"""By the type of activations. In float32 another order of the same sums moves a loss by 4e-7, a gradient by 5e-6 of its
largest element, and an update by 6e-5 of its norm: AdamW divides by the gradient's own size, so that small ones count
as much as large. In bfloat16, which rounds each number by up to 2e-3, one process on stages is as far from
transformers: 2e-5, 1e-2 and 1e-1. A fault of parallelism moves some gradient by about its own size in either."""
_RESULTS = "verify"


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
    """Of the first step, before clipping."""
    updates: Mapping[str, Tensor]
    """Weights after the last step minus weights before the first."""


@dataclass(frozen=True)
class Verdict:
    """How far the mesh is from one process; each figure the worst over ranks, steps or parameters."""

    mesh: str
    compute: str
    """Type of activations."""
    loss_rel: float
    grad_norm_rel: float
    worst_gradient: tuple[str, float]
    """Name, and max|dg| / max|g| in the first step."""
    missing_gradients: tuple[str, ...]
    missing_parameters: tuple[str, ...]
    """Of the model, on no rank."""
    worst_update: tuple[str, float]
    """Name, and ||du|| / ||u|| after `STEPS` steps."""

    @property
    def tolerance(self) -> Mapping[str, float]:
        return TOLERANCES[self.compute]

    @property
    def passed(self) -> bool:
        found = {
            "loss_rel": self.loss_rel,
            "grad_norm_rel": self.grad_norm_rel,
            "gradient_rel": self.worst_gradient[1],
            "update_rel": self.worst_update[1],
        }
        missing = self.missing_gradients or self.missing_parameters
        # a NaN is at most nothing
        return not missing and all(found[name] <= limit for name, limit in self.tolerance.items())

    def record(self) -> dict[str, Any]:
        """What ``cuboid verify --json`` prints."""
        return {
            "pass": self.passed,
            "mesh": self.mesh,
            "loss_rel": _plain(self.loss_rel),
            "grad_norm_rel": _plain(self.grad_norm_rel),
            "worst_gradient": {"name": self.worst_gradient[0], "rel": _plain(self.worst_gradient[1])},
            "missing_gradients": [*self.missing_gradients, *self.missing_parameters],
            "weights_rel": _plain(self.worst_update[1]),
            "worst_update": {"name": self.worst_update[0], "rel": _plain(self.worst_update[1])},
            "tolerance": self.tolerance,
        }


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def small_recipe(recipe: Recipe) -> Recipe:
    """The recipe with a model that is tried in seconds."""
    return shrink_recipe(recipe, config_of(recipe))


def reference(recipe: Recipe, original: Recipe) -> Reference:
    """What plain transformers and torch compute in this process.

    Args:
        recipe: whose model is trained.
        original: whose tokenizer and text are read; ids beyond a smaller vocabulary wrap around.
    """
    torch.set_num_threads(1)  # the ranks are forked from this process: see `launch.verify`
    blueprint = _blueprint(recipe)
    model = whole_model(blueprint)
    read = initial_weights(recipe, blueprint)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            read(name, tuple(slice(0, size) for size in parameter.shape), parameter)
    masters = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in model.named_parameters()}
    model.to(blueprint.compute)
    balance = PlainBalance(model, recipe.moe or MoeSettings())
    settings = recipe.optimizer
    groups = [
        {
            "params": [p for name, p in masters.items() if is_decayed(name, p) is wanted],
            "weight_decay": settings.weight_decay if wanted else 0.0,
        }
        for wanted in (True, False)
    ]
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], betas=settings.betas, eps=settings.eps)
    weights = {name: parameter.detach().clone() for name, parameter in masters.items()}
    batches = _batches(recipe, original)
    losses, norms, gradients = [], [], {}
    for step, batch in enumerate(batches, start=1):
        losses.append(_backward(blueprint, model, masters, balance, batch, rows=recipe.batch_plan.microbatch_size))
        if step == 1:
            gradients = {name: _gradient(name, parameter) for name, parameter in masters.items()}
        limit = math.inf if settings.clip_grad_norm is None else settings.clip_grad_norm
        norms.append(torch.nn.utils.clip_grad_norm_(masters.values(), limit).item())
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step, steps=recipe.train.steps, settings=settings)
        adamw.step()
        adamw.zero_grad()
        balance.end_step()
    updates = {name: parameter.detach() - weights[name] for name, parameter in masters.items()}
    return Reference(weights, batches, losses, norms, gradients, updates)


def _blueprint(recipe: Recipe) -> Blueprint:
    """Without dropout: no other mesh draws the same masks."""
    config = config_of(recipe)
    for key, value in list(vars(config).items()):
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(config, key, 0.0)
    return draw_blueprint(config, attention=recipe.model.attention, compute=recipe.precision.compute)


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
) -> float:
    """Loss and gradients of the global batch, some rows at a time: a sum, divided by the one count. The model computes
    on copies of the masters in its own dtype, and their gradients are added up in float32. Experts are balanced beside
    the loss."""
    count, total = int((batch.labels != IGNORE).sum()), 0.0
    copies = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in masters.items():
            copies[name].copy_(parameter)
    for start in range(0, len(batch.labels), rows):
        part = slice(start, start + rows)
        ids, positions, labels = batch.input_ids[part], batch.position_ids[part], batch.labels[part]
        balance.begin(len(ids))
        masks = whole_masks(blueprint, positions)
        logits = model(input_ids=ids, position_ids=positions, attention_mask=masks, use_cache=False).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum") / count
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
    mean."""
    vocabulary = read_checked_config(original.model).vocab_size
    tokenizer = open_tokenizer(original.data.tokenizer, pretrained=original.model.pretrained, vocab_size=vocabulary)
    dataset = prepare(original.data, tokenizer=tokenizer, seed=recipe.seed, cache=cache_folder())
    smaller, rows = read_checked_config(recipe.model).vocab_size, recipe.train.global_batch
    batches = []
    for step in range(STEPS):
        batch = _window(dataset.batch(range(step * rows, (step + 1) * rows)), recipe.data.sequence_length)
        labels = torch.where(batch.labels == IGNORE, IGNORE, batch.labels % smaller)
        for row in range(rows):
            labels[row, : row * labels.shape[1] // rows] = IGNORE
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


def run_mesh(recipe: Recipe, folder: Path, *, expected: Reference) -> None:
    """What every rank of the mesh runs: the same steps, compared with ``expected``; its figures go into ``folder``."""
    # gathering a whole parameter to look at it is allowed to be slow
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    with connect(recipe.layout, timeout_seconds=recipe.launch.timeout_seconds, device=torch.device("cpu")) as block:
        blueprint = _blueprint(recipe)
        engine = assemble(recipe, block, blueprint, initial_weights(recipe, blueprint))
        losses, norms, missing, gradients = [], [], [], []
        for step, batch in enumerate(expected.batches, start=1):
            share = recipe.train.global_batch // block.layout.data
            rows = slice(block.coordinate.data * share, (block.coordinate.data + 1) * share)
            result = engine.backward(Batch(batch.input_ids[rows], batch.labels[rows], batch.position_ids[rows]))
            losses.append(_relative(result.loss, expected.losses[step - 1]))
            norms.append(_relative(result.grad_norm, expected.grad_norms[step - 1]))
            if step == 1:
                for name, gradient in engine.gradients():
                    if gradient is None:
                        missing.append(name)
                    else:
                        wanted = expected.gradients[name]
                        gradients.append(
                            (name, _relative_to((_whole(gradient) - wanted).abs().max(), wanted.abs().max()))
                        )
            engine.update(
                result, learning_rate=learning_rate(step, steps=recipe.train.steps, settings=recipe.optimizer)
            )
        updates = []
        for name, weight in engine.weights():
            moved = _whole(weight) - expected.weights[name]
            updates.append((name, _relative_to((moved - expected.updates[name]).norm(), expected.updates[name].norm())))
        found = Verdict(
            mesh=_mesh(recipe, blueprint),
            compute=recipe.precision.compute,
            loss_rel=_worst(losses),
            grad_norm_rel=_worst(norms),
            worst_gradient=_worst_of(gradients),
            missing_gradients=tuple(missing),
            missing_parameters=tuple(sorted(expected.weights.keys() - dict(engine.parameters).keys())),
            worst_update=_worst_of(updates),
        )
        path = folder / _RESULTS / f"rank-{block.rank}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(asdict(found)))


def verdict(folder: Path) -> Verdict:
    """The worst of what the ranks left in ``folder``."""
    ranks = [json.loads(path.read_text()) for path in sorted((folder / _RESULTS).glob("rank-*.json"))]
    assert ranks, f"no rank has left its figures in {folder}"
    return Verdict(
        mesh=ranks[0]["mesh"],
        compute=ranks[0]["compute"],
        loss_rel=_worst(rank["loss_rel"] for rank in ranks),
        grad_norm_rel=_worst(rank["grad_norm_rel"] for rank in ranks),
        worst_gradient=_worst_of(rank["worst_gradient"] for rank in ranks),
        missing_gradients=tuple(sorted({name for rank in ranks for name in rank["missing_gradients"]})),
        missing_parameters=tuple(sorted(set.intersection(*(set(rank["missing_parameters"]) for rank in ranks)))),
        worst_update=_worst_of(rank["worst_update"] for rank in ranks),
    )


def _mesh(recipe: Recipe, blueprint: Blueprint) -> str:
    parallel = recipe.parallel
    words = [
        str(recipe.layout),
        parallel.schedule,
        f"{parallel.microbatches} microbatches",
        blueprint.config.model_type,
    ]
    if parallel.engine == "deepspeed":
        words.append(f"ZeRO stage {parallel.zero_stage}" + (f" on {parallel.offload}" if parallel.offload else ""))
    elif recipe.layout.data > 1:
        groups = f" in groups of {parallel.shard}" if recipe.layout.replicas > 1 else ""
        words.append(f"sharded{groups}" if recipe.is_sharded else "replicated")
    if recipe.parallel.expert > 1:
        words.append(f"experts over {recipe.parallel.expert} ranks")
    if recipe.precision.compute != "float32":
        words.append(recipe.precision.compute)
    return ", ".join(words)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected)


def _relative_to(difference: Tensor, size: Tensor) -> float:
    """0 where there is nothing on either side: a token that never came has no gradient and no update."""
    return (difference / size).item() if difference or size else 0.0


def _worst(values: Iterable[float]) -> float:
    """The largest; a NaN is worse than any number, which `max` does not know."""
    values = list(values)
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _worst_of(named: Iterable[tuple[str, float]]) -> tuple[str, float]:
    named = [(name, value) for name, value in named]
    return max(named, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1], default=("", 0.0))
