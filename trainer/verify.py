"""Promise 1 for one recipe: one process against its mesh, the same weights and data, every number compared."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cuboid.parallel.mesh import connect
from cuboid.parallel.nf4 import values
from cuboid.trainer.adapter_folder import settings_of
from cuboid.trainer.assemble import assemble
from cuboid.trainer.check_distill import teacher_recipe
from cuboid.trainer.check_preference import own_reference, reference_recipe
from cuboid.trainer.data import Batch
from cuboid.trainer.model import Blueprint
from cuboid.trainer.model_config import config_of, num_experts
from cuboid.trainer.one_process import Reference, first_values, undropped_blueprint, whole_with_values
from cuboid.trainer.optimizer import learning_rate
from cuboid.trainer.recipe import ModelSettings, Recipe
from cuboid.trainer.shrink import LEAST_SIZE, shrink_recipe

_ROUNDED = {"loss_rel": 2e-4, "grad_norm_rel": 1e-2, "update_rel": 2e-2}
"""With rounded weights (`quantize`), from the second step on: an update that differs in its last bit may lie on the
other side of an edge. One process whose microbatches are cut otherwise is as far: 4e-5, 4e-3 and 6e-3. The gradients,
which are those of the first step, keep their tolerance."""
_ROUNDED_INPUTS = {"loss_rel": 1e-3, "grad_norm_rel": 2e-2, "gradient_rel": 5e-2, "update_rel": 2e-1}
"""Where what layers read is rounded too, another order of the same sums changes the first step already: a gradient by
1e-2 on two tensor ranks, and an update by 3e-2 also in one process."""
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
class Verdict:
    """How far the mesh is from one process; each figure the worst over ranks, steps or parameters."""

    mesh: str
    compute: str
    """Type of activations."""
    rounded: str | None
    """Scheme by which layers round what they compute with."""
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
        tolerance = TOLERANCES[self.compute]
        wider = {} if self.rounded is None else _ROUNDED_INPUTS if self.rounded == "8da4w" else _ROUNDED
        return tolerance | {name: max(limit, tolerance[name]) for name, limit in wider.items()}

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


def small_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with a model that is tried in seconds; a teacher or reference that is as small is written into
    ``folder``."""
    small = shrink_recipe(recipe, config_of(recipe))
    if recipe.distill is not None:
        own = teacher_recipe(recipe)
        like = small.model if recipe.distill.compares_layers else shrink_recipe(own, config_of(own)).model
        # what was written of another teacher is not read; of a small vocabulary fewer tokens are the likeliest
        top_k = recipe.distill.top_k and min(recipe.distill.top_k, config_of(small).vocab_size // 2)
        changes = {"teacher": _small_model(own, like, folder / "teacher"), "cache": None, "top_k": top_k}
        # of other layers and heads than the recipe's own
        layers = recipe.distill.attention_layers and tuple(range(config_of(small).num_hidden_layers))
        changes |= {"attention_layers": layers, "relation_heads": None}
        small = small.model_copy(update={"distill": recipe.distill.model_copy(update=changes)})
    if recipe.preference is not None and own_reference(recipe) is not None:
        own = reference_recipe(recipe)
        reference = _small_model(own, shrink_recipe(own, config_of(own)).model, folder / "reference")
        small = small.model_copy(update={"preference": recipe.preference.model_copy(update={"reference": reference})})
    return small


def _small_model(own: Recipe, like: ModelSettings, folder: Path) -> str:
    """The folder with another model of the recipe's, which is ``like`` the one that is trained or as small."""
    # of another seed: one that says the same as the model that is trained teaches nothing
    small = own.model_copy(update={"model": like, "seed": own.seed + 1})
    whole_with_values(small, undropped_blueprint(small)).save_pretrained(folder)
    return str(folder)


def comparable(recipe: Recipe) -> Recipe:
    """The recipe with adapters that can be compared: without dropout, whose masks are each mesh's own, and with drawn
    values, since those of a saved adapter fit the model that is not shrunk."""
    if recipe.lora is None:
        return recipe
    settings = settings_of(recipe.lora).model_copy(update={"adapter": None, "dropout": 0.0})
    if settings.takes_out:  # a shrunk matrix has no more to take out
        settings = settings.model_copy(update={"rank": min(settings.rank, LEAST_SIZE)})
    return recipe.model_copy(update={"lora": settings})


def run_mesh(recipe: Recipe, folder: Path, *, expected: Reference) -> None:
    """What every rank of the mesh runs: the same steps, compared with ``expected``; its figures go into ``folder``."""
    # gathering a whole parameter to look at it is allowed to be slow
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    with connect(recipe.layout, timeout_seconds=recipe.launch.timeout_seconds, device=torch.device("cpu")) as block:
        blueprint, weights = first_values(recipe, undropped_blueprint(recipe))
        engine = assemble(recipe, block, blueprint, weights)
        losses, norms, missing, gradients = [], [], [], []
        for step, batch in enumerate(expected.batches, start=1):
            share = recipe.train.global_batch // block.layout.data
            rows = slice(block.coordinate.data * share, (block.coordinate.data + 1) * share)
            mine = Batch(batch.input_ids[rows], batch.labels[rows], batch.position_ids[rows])
            engine.prune(step, mine)
            engine.begin_step(step)
            result = engine.backward(mine)
            losses.append(_relative(result.loss, expected.losses[step - 1]))
            norms.append(_relative(result.grad_norm, expected.grad_norms[step - 1]))
            if step == 1:
                for name, gradient in engine.gradients():
                    if gradient is None and name in expected.gradients:
                        missing.append(name)
                    elif gradient is not None:
                        own = _gathered(gradient)
                        wanted = expected.gradients.get(name, torch.zeros_like(own))  # frozen in one process
                        gradients.append((name, _relative_to((own - wanted).abs().max(), wanted.abs().max())))
            engine.update(
                result, learning_rate=learning_rate(step, steps=recipe.train.steps, settings=recipe.optimizer)
            )
        updates = []
        for name, weight in engine.weights():
            moved = _gathered(weight) - expected.weights[name]
            updates.append((name, _relative_to((moved - expected.updates[name]).norm(), expected.updates[name].norm())))
        found = Verdict(
            mesh=_mesh(recipe, blueprint),
            compute=recipe.precision.compute,
            rounded=recipe.quantize.scheme if recipe.quantize else None,
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
        rounded=ranks[0]["rounded"],
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
    if recipe.lora is not None:
        words.append(f"adapters of rank {recipe.lora.rank}" + " beside 4 bits" * (recipe.lora.base == "nf4"))
    if recipe.parallel.expert > 1:
        words.append(f"experts over {recipe.parallel.expert} ranks")
    if recipe.prune is not None:
        words.append(f"{recipe.prune.method} pruned to {recipe.prune.ratio:g}")
    if recipe.quantize is not None:
        words.append(f"rounded to {recipe.quantize.scheme}")
    if recipe.distill is not None:
        words.append(f"with {recipe.distill.weight:g} of a teacher")
    if recipe.preference is not None:
        words.append(f"pairs of answers ({recipe.preference.loss})")
    if recipe.precision.compute != "float32":
        words.append(recipe.precision.compute)
        if num_experts(blueprint.config):
            words.append("each token to all experts")
    return ", ".join(words)


def _gathered(tensor: Tensor) -> Tensor:
    return values(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


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
