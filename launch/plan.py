"""The `plan` command: what a recipe will do, before any rank starts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cuboid.launch.memory import rank_limit_bytes, readable, too_small
from cuboid.launch.training import checked_recipe
from cuboid.parallel.errors import UserError
from cuboid.parallel.simulation import ideal_bubble
from cuboid.trainer.check import Devices, check
from cuboid.trainer.check_mesh import virtual_stages
from cuboid.trainer.recipe import Recipe

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_PARTS = ("parameters", "optimizer", "gathered", "gradients", "activations", "messages", "working", "total")


def plan(name: str, overrides: Sequence[str], *, memory: str | None, as_json: bool) -> int:
    """Print what the recipe will do; returns the command's exit code.

    Args:
        memory: that one rank may have, as 80GiB, on another machine; None: what it may have here, where the ranks start
            on this machine.

    Raises:
        UserError: the recipe cannot run so, in the same words as for `train`; this machine may be too small for it.
    """
    given = None if memory is None else parse_bytes(memory)
    recipe = checked_recipe(name, overrides, check=_anywhere, elsewhere=given is not None)
    found = facts(recipe, limit_bytes=given or rank_limit_bytes(recipe))
    print(json.dumps(found) if as_json else "\n".join(_lines(found)))
    return 0


def _anywhere(recipe: Recipe, devices: Devices | None) -> None:
    """All that `check` finds but room on this machine."""
    check(recipe, None)


def parse_bytes(words: str) -> int:
    """80GiB, 24 GB or a plain number; raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)?", words.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if not size:
        raise UserError(f"--memory {words} is no number of bytes; use for example 80GiB or 24GB")
    return size


def facts(recipe: Recipe, *, limit_bytes: int | None) -> dict[str, Any]:
    """The plan as plain data: block, batch, stages, bubble and memory."""
    from cuboid.trainer import prediction

    sizes = recipe.batch_plan
    try:
        ranks, reason = [rank.record() for rank in prediction.predict(recipe)], None
    except prediction.NotPredicted as error:
        ranks, reason = None, str(error)
    return {
        "name": recipe.name,
        "layout": str(recipe.layout),
        "ranks": recipe.layout.world_size,
        "schedule": recipe.parallel.schedule,
        "batch": asdict(sizes) | {"microbatch_size": sizes.microbatch_size},
        "sequence_length": recipe.data.sequence_length,
        "tokens_per_step": recipe.train.global_batch * recipe.data.sequence_length,
        "stages": [asdict(stage) for stage in prediction.stages(recipe)],
        "bubble_ideal": ideal_bubble(
            recipe.parallel.schedule,
            pipeline=recipe.layout.pipeline,
            virtual_stages=virtual_stages(recipe),
            microbatches=sizes.microbatches,
        ),
        "bubble_expected": prediction.expected_bubble(recipe),
        "memory": ranks,
        "memory_not_predicted": reason,
        "limit_bytes": limit_bytes,
    }


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    batch = found["batch"]
    yield f"{found['name']}: {found['layout']}, {found['ranks']} ranks, {found['schedule']}"
    yield (
        f"{found['tokens_per_step']:,} tokens a step: {batch['global_batch']} sequences of {found['sequence_length']}, "
        f"in microbatches of {batch['microbatch_size']}, {batch['microbatches']} on each of {batch['data']} data ranks"
    )
    yield f"bubble: {found['bubble_expected']:.1%} expected, {found['bubble_ideal']:.1%} with stages that cost the same"
    yield "stage  pipeline rank  layers  parameters  cost"
    for stage in found["stages"]:
        layers = f"{stage['first_layer']}-{stage['last_layer']}"
        share = f"{stage['cost']:>4.0%}"
        yield f"{stage['index']:>5}  {stage['pipeline']:>13}  {layers:>6}  {stage['parameters']:>10,}  {share}"
    yield from _memory_lines(found)


def _memory_lines(found: Mapping[str, Any]) -> Iterator[str]:
    if found["memory"] is None:
        yield f"memory: not predicted, {found['memory_not_predicted']}"
        return
    limit = found["limit_bytes"]
    yield "memory of a rank in its fullest moment, in MB"
    yield "  ".join(["pipeline rank", *(f"{part:>11}" for part in _PARTS)])
    for rank in found["memory"]:
        yield "  ".join([f"{rank['pipeline']:>13}", *(f"{rank[part] / 1e6:>11,.1f}" for part in _PARTS)])
    worst = max(rank["total"] for rank in found["memory"])
    if limit is not None:
        yield f"limit of a rank: {readable(limit)}, of which the fullest takes {worst / limit:.0%}"
        if words := too_small(found["memory"], limit):
            yield f"warning: {words}"
