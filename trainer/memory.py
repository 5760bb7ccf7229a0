"""A rank that runs out of memory: told with what would help, and the next start with smaller microbatches."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cuboid.parallel.errors import RunFailed
from cuboid.parallel.mesh import Block
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.runlog import RunLog, read_events

_EVENT = "out_of_memory"
_WORDS = ("can't allocate memory", "not enough memory", "bad_alloc")
"""What torch's allocator on a CPU says in a plain RuntimeError, and C++'s own."""
_CGROUP = Path("/sys/fs/cgroup/memory.max")
"""Of a container, bytes or "max"."""


class OutOfMemory(RuntimeError):
    """A rank could not get the memory that a step needs."""


@contextmanager
def told(recipe: Recipe, folder: Path, block: Block, *, step: int) -> Iterator[None]:
    """Around a step: what it needs and does not get becomes an event and an error in words.

    Raises:
        OutOfMemory: in place of what the allocator raised. The kernel's own killer sends SIGKILL and cannot be caught.
    """
    try:
        yield
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        size, microbatches = recipe.batch_plan.microbatch_size, recipe.parallel.microbatches
        peak, limit = peak_bytes(block.device), limit_bytes(block.device)
        about: dict[str, Any] = {"microbatch_size": size, "layout": str(block.layout), "peak_bytes": peak}
        predicted = _predicted_bytes(folder, block, size)
        RunLog(folder).event(_EVENT, rank=block.rank, step=step, limit_bytes=limit, predicted_bytes=predicted, **about)
        smaller = _with_smaller(recipe, size)
        remedy = "use more pipeline or tensor ranks, parallel.activation_checkpointing=full, or a shorter sequence"
        if smaller is not None:
            remedy = f"use parallel.microbatches={smaller.parallel.microbatches}, which changes no number"
        words = f"step {step} with microbatches of {size} (parallel.microbatches={microbatches}) needs more memory"
        raise OutOfMemory(
            f"{words} than there is: peak {peak / 1e9:.2f} GB, limit {limit / 1e9:.2f} GB; {remedy}"
        ) from error


def fitted(recipe: Recipe, folder: Path, block: Block) -> Recipe:
    """The recipe, its microbatches smaller than those with which a rank of this run has run out of memory on the same
    layout, where the recipe allows that. All ranks call it together.

    Raises:
        RunFailed: not even microbatches of one sequence fit.
    """
    if not recipe.faults.shrink_microbatch:
        return recipe
    too_large: list[int | None] = [None]
    if block.rank == 0:
        events = [event for event in read_events(folder) if event["kind"] == _EVENT]
        sizes = [event["microbatch_size"] for event in events if event["layout"] == str(block.layout)]
        too_large = [min(sizes, default=None)]
    dist.broadcast_object_list(too_large, src=0)
    if too_large[0] is None or recipe.batch_plan.microbatch_size < too_large[0]:
        return recipe
    smaller = _with_smaller(recipe, too_large[0])
    if smaller is None:
        raise RunFailed(f"microbatches of {too_large[0]} need more memory than there is, and no smaller ones divide")
    if block.rank == 0:
        size, number = smaller.batch_plan.microbatch_size, smaller.parallel.microbatches
        RunLog(folder).event("shrink", microbatch_size=size, microbatches=number, too_large=too_large[0])
    return smaller


def _with_smaller(recipe: Recipe, too_large: int) -> Recipe | None:
    """The recipe with the fewest microbatches that are smaller than this; a multiple of its own number, so that a
    schedule that wants as many for each rank has them."""
    size, number = recipe.batch_plan.microbatch_size, recipe.parallel.microbatches
    factor = next((f for f in range(1, size + 1) if size % f == 0 and size // f < too_large), None)
    if factor is None:
        return None
    parallel = recipe.parallel.model_copy(update={"microbatches": number * factor})
    return recipe.model_copy(update={"parallel": parallel})


def _predicted_bytes(folder: Path, block: Block, microbatch_size: int) -> int | None:
    """What the launcher foresaw for this rank; None where it foresaw nothing, or another layout or batch."""
    asked = {"kind": "memory", "layout": str(block.layout), "microbatch_size": microbatch_size}
    told = [event for event in read_events(folder) if asked.items() <= event.items()]
    return told[-1]["ranks"][block.coordinate.pipeline]["total"] if told else None


def _is_out_of_memory(error: BaseException | None) -> bool:
    """The pipeline's runtime raises errors of its own from what a stage raised."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def peak_bytes(device: torch.device) -> int:
    """Held on the device at most, or resident in the process where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def limit_bytes(device: torch.device) -> int:
    """What this process may have: the device's memory, or the smallest of the machine's and the limits of container
    and process (which counts addresses, more than what is resident)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if (own := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        limits.append(own)
    if _CGROUP.exists() and (words := _CGROUP.read_text().strip()).isdecimal():
        limits.append(int(words))
    return min(limits)
