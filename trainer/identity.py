"""What a run is recognised by when it goes on: fingerprints, the same on every rank, and versions."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch.distributed as dist

from cuboid.parallel.errors import UserError
from cuboid.trainer.adapter_folder import settings_of
from cuboid.trainer.data import Dataset, Mixture
from cuboid.trainer.model import Blueprint, local_folder
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.teacher_cache import refuse_other_data
from cuboid.trainer.version import version
from cuboid.trainer.weights import fingerprint


def adapter_facts(recipe: Recipe, blueprint: Blueprint) -> dict[str, Any] | None:
    """What stands in the checkpoints of an adapter run beside its tensors, the same on every rank."""
    if recipe.lora is None:
        return None
    from cuboid.trainer.adapters import trained_share

    pretrained = recipe.model.pretrained
    base = None if pretrained is None else fingerprint(local_folder(pretrained))
    same_on_every_rank("the frozen model's fingerprint", base or "")
    settings = settings_of(recipe.lora).model_dump(mode="json")
    return {"base": base, "settings": settings, **trained_share(blueprint)}


def teacher_fingerprint(recipe: Recipe, dataset: Dataset | Mixture) -> str | None:
    """Fingerprint of the teacher's files, the same on every rank."""
    if recipe.distill is None:
        return None
    found = fingerprint(local_folder(recipe.distill.teacher))
    same_on_every_rank("the teacher's fingerprint", found)
    if recipe.distill.cache is not None:
        refuse_other_data(recipe, dataset)
    return found


def same_on_every_rank(what: str, value: str) -> None:
    """Raises UserError, on every rank, where ``value`` is not."""
    values: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(values, value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise UserError(f"{what} differs: {values[0][:12]} on rank 0, {other[:12]} on rank {rank}")


def versions(recipe: Recipe) -> dict[str, str]:
    """Of what computes."""
    optional = {
        "deepspeed": recipe.parallel.engine == "deepspeed",
        "peft": recipe.lora is not None,
        "torchao": recipe.quantize is not None,
    }
    names = ["torch", "transformers", *(name for name, is_used in optional.items() if is_used)]
    return {"cuboid": version(), **{name: metadata.version(name) for name in names}}
