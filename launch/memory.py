"""The memory that a run will need, against what a rank may have: told while the ranks start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil
from multiprocessing import get_context
from pathlib import Path
from signal import SIGKILL
from typing import Any

from cuboid.launch.supervise import die_with_parent
from cuboid.launch.worker import send_output_to
from cuboid.trainer.check import runs_elsewhere
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.runlog import RunLog

_LOG = Path("logs") / "memory.txt"
_PATIENCE_SECONDS = 30.0


@contextmanager
def predicted_beside(recipe: Recipe, folder: Path) -> Iterator[None]:
    """Meanwhile a process of its own predicts each rank's memory and writes the event `memory` into the run's folder,
    so that no start waits for it."""
    process = get_context("fork").Process(target=_tell, args=(recipe, folder), name="cuboid-memory")
    process.start()
    try:
        yield
        process.join(_PATIENCE_SECONDS)  # a run may be shorter
    finally:
        process.kill()
        process.join()


def _tell(recipe: Recipe, folder: Path) -> None:
    die_with_parent(SIGKILL)
    try:
        send_output_to(folder / _LOG)  # nobody has asked: what goes wrong here is no concern of the screen
    except OSError:  # a full disk, of which the run itself will tell
        return
    from cuboid.trainer.prediction import NotPredicted, predict

    try:
        ranks = [rank.record() for rank in predict(recipe)]
    except NotPredicted:
        return
    limit, size = rank_limit_bytes(recipe), recipe.batch_plan.microbatch_size
    about = {"layout": str(recipe.layout), "microbatch_size": size, "ranks": ranks, "limit_bytes": limit}
    RunLog(folder).event("memory", words=words_of(ranks, limit), **about)


def words_of(ranks: Sequence[Mapping[str, Any]], limit: int | None) -> str:
    """The fullest rank and its largest parts, in a line."""
    worst = max(ranks, key=lambda rank: rank["total"])
    parts = ("parameters", "optimizer", "gathered", "gradients", "activations")
    largest = sorted(parts, key=lambda part: -worst[part])[:3]
    named = ", ".join(f"{part} {readable(worst[part])}" for part in largest)
    words = f"memory: {readable(worst['total'])} on pipeline rank {worst['pipeline']} at most ({named})"
    if limit is None:
        return words
    warning = too_small(ranks, limit)
    return f"{words}, {worst['total'] / limit:.0%} of its {readable(limit)}" + (f"; {warning}" if warning else "")


def too_small(ranks: Sequence[Mapping[str, Any]], limit: int) -> str | None:
    """Where what a rank holds between two steps cannot fit, whatever the batch: in words, with what would help."""
    worst = max(ranks, key=lambda rank: rank["states"])
    if worst["states"] <= limit:
        return None
    factor = ceil(worst["states"] / limit)
    return (
        f"parameters, moments and gradients alone take {readable(worst['states'])} of pipeline rank "
        f"{worst['pipeline']}, which may have {readable(limit)}; use {factor} times as many pipeline, tensor or "
        "(with parallel.shard=true) data ranks, or lora"
    )


def rank_limit_bytes(recipe: Recipe) -> int | None:
    """What one rank may have on this machine, whose memory ranks on a CPU share; None where they start elsewhere."""
    if runs_elsewhere(recipe.launch):
        return None
    import torch

    from cuboid.trainer.memory import limit_bytes

    if recipe.launch.device == "cuda":
        return limit_bytes(torch.device("cuda", 0))
    return limit_bytes(torch.device("cpu")) // recipe.layout.world_size


def readable(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
