"""Which stage stands on which pipeline rank, in what order each rank acts, and how long that takes. Imports no torch.

Words: a pipeline of p ranks and v stages a rank has n = p v stages; a step runs m microbatches through all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cuboid.parallel.errors import FieldError, UserError, one_of


@dataclass(frozen=True, slots=True)
class Action:
    """One piece of work of one rank.

    ``kind`` is F (forward, with the loss on the last stage), B (full backward), I (input gradient alone), W (weight
    gradient alone) or R (reduction of the stage's gradients over the data axis, once a step, ``microbatch`` -1).
    """

    kind: str
    stage: int
    microbatch: int


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """What a schedule is called, what it needs, and which step of the project offers it."""

    name: str
    torch_name: str
    default_virtual_stages: int = 1
    splits_backward: bool = False
    v_shaped: bool = False
    offered: bool = True

    def check(self, *, pipeline: int, virtual_stages: int, microbatches: int) -> list[UserError]:
        """Every reason why this schedule cannot run so, each with the values that would work; empty where it can."""
        if not self.offered:
            offered = one_of([spec.name for spec in SCHEDULES.values() if spec.offered])
            return [FieldError("parallel.schedule", self.name, "is not offered yet", f"use {offered}")]
        errors: list[UserError] = []
        if microbatches < 1:
            errors.append(
                FieldError("parallel.microbatches", microbatches, "is no number of microbatches", "use 1 or more")
            )
        looped = self.default_virtual_stages > 1
        if looped and virtual_stages < 2:
            errors.append(
                FieldError(
                    "parallel.virtual_stages",
                    virtual_stages,
                    f"is too few for {self.name}, which interleaves the stages of a rank",
                    "use 2 or more, or schedule 1f1b",
                )
            )
        if not looped and virtual_stages != 1:
            remedy = "use 1 (or null), or schedule interleaved_1f1b"
            errors.append(
                FieldError(
                    "parallel.virtual_stages",
                    virtual_stages,
                    f"is not for {self.name}, which has one stage a rank",
                    remedy,
                )
            )
        if errors:
            return errors
        # torch's Schedule1F1B refuses fewer microbatches than stages; its ScheduleInterleaved1F1B runs them in rounds
        # of equal size ("flex" rounds), max(1, m // p) of them.
        if self.name == "1f1b" and microbatches < pipeline:
            errors.append(
                FieldError(
                    "parallel.microbatches",
                    microbatches,
                    f"is fewer than the {pipeline} stages that 1f1b keeps busy",
                    f"use {pipeline} or more, or schedule gpipe",
                )
            )
        if self.name == "interleaved_1f1b" and not _rounds_are_even(pipeline, microbatches):
            below = next(m for m in range(microbatches - 1, 0, -1) if _rounds_are_even(pipeline, m))
            above = next(m for m in range(microbatches + 1, 3 * microbatches) if _rounds_are_even(pipeline, m))
            errors.append(
                FieldError(
                    "parallel.microbatches",
                    microbatches,
                    f"does not fill {microbatches // pipeline} rounds over {pipeline} pipeline ranks evenly",
                    f"use {below} or {above} (any multiple of {pipeline} works)",
                )
            )
        return errors


def _rounds_are_even(pipeline: int, microbatches: int) -> bool:
    return microbatches % max(1, microbatches // pipeline) == 0


SCHEDULES: Mapping[str, ScheduleSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            ScheduleSpec(name="gpipe", torch_name="GPipe"),
            ScheduleSpec(name="1f1b", torch_name="1F1B"),
            ScheduleSpec(name="interleaved_1f1b", torch_name="Interleaved1F1B", default_virtual_stages=2),
            ScheduleSpec(name="looped_bfs", torch_name="LoopedBFS", default_virtual_stages=2, offered=False),
            ScheduleSpec(
                name="interleaved_zero_bubble",
                torch_name="InterleavedZeroBubble",
                default_virtual_stages=2,
                splits_backward=True,
                offered=False,
            ),
            ScheduleSpec(
                name="zbv",
                torch_name="ZBVZeroBubble",
                default_virtual_stages=2,
                splits_backward=True,
                v_shaped=True,
                offered=False,
            ),
            ScheduleSpec(
                name="dualpipe_v",
                torch_name="DualPipeV",
                default_virtual_stages=2,
                splits_backward=True,
                v_shaped=True,
                offered=False,
            ),
        )
    }
)


def stage_indices(schedule: str, *, pipeline: int, rank: int, virtual_stages: int) -> tuple[int, ...]:
    """The stages on pipeline rank ``rank``, in the order in which a microbatch passes through them.

    Looped: rank, rank + p, rank + 2p, ... V-shaped schedules turn round at the end, so that the first rank also holds
    the last stage.
    """
    if SCHEDULES[schedule].v_shaped:
        assert virtual_stages == 2, f"{schedule} is a V of 2 stages a rank, not {virtual_stages}"
        return (rank, 2 * pipeline - 1 - rank)
    return tuple(rank + turn * pipeline for turn in range(virtual_stages))
