"""What may change when a run goes on: everything else would make it another run. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cuboid.parallel.errors import FieldError
from cuboid.trainer.recipe import Recipe, validated
from cuboid.trainer.recipe_errors import shown

MAY_DIFFER = (
    "parallel",
    "launch",
    "track",
    "checkpoint",
    "faults",
    "runs",
    "train.log_every",
    "train.eval_every",
    "train.eval_first",
    "train.eval_batches",
    "data.eval_path",
    "data.eval_split",
    "distill.cache",
)
"""Settings of the mesh, the launch and the logs, which change no sample and no number beyond rounding; and what is done
about a step that is not to be trusted, since a run that has stopped at one may go on past it."""


def differences(old: Mapping[str, Any], new: Recipe) -> list[FieldError]:
    """Every field by which ``new`` is another run than the one of the stored recipe ``old``; empty where it may go on.

    ``train.steps`` may grow. A key that ``old`` does not know yet has its default.
    """
    stored, _ = validated(old)
    before = dict(_flat(stored.model_dump(mode="json") if stored else old))
    after = dict(_flat(new.model_dump(mode="json")))
    errors = []
    for field in sorted(before.keys() | after.keys()):
        was, now = before.get(field), after.get(field)
        if was == now or any(field == free or field.startswith(f"{free}.") for free in MAY_DIFFER):
            continue
        if field == "train.steps" and isinstance(was, int) and isinstance(now, int):
            if now < was:
                errors.append(FieldError(field, now, f"is fewer than the run's {was}", f"use {was} or more"))
            continue
        errors.append(
            FieldError(field, shown(now), f"differs from the run's {shown(was)}", f"set {field}={shown(was)}")
        )
    return errors


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
