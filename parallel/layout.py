"""The request: how many ranks along each axis, where a rank stands, and which sequences it reads. Imports no torch.

The live fact (process groups, `DeviceMesh`) is made from this in `mesh`; a size is stored only here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from cuboid.parallel.errors import FieldError, one_of

AXES = ("pipeline", "data", "tensor")
"""Outermost to innermost: neighbouring ranks are tensor ranks, which talk most and so share a node."""


class Coordinate(NamedTuple):
    """Where a rank stands along each axis of the block."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the axes of the block of ranks; ``expert`` is folded into data x tensor and adds no ranks."""

    pipeline: int = 1
    data: int = 1
    tensor: int = 1
    expert: int = 1
    replicas: int = 1
    """Groups into which the data ranks fall for sharding: each holds all parameters, sharded over its own ranks."""

    def __post_init__(self) -> None:
        for axis in (*AXES, "expert"):
            if getattr(self, axis) < 1:
                raise FieldError(f"parallel.{axis}", getattr(self, axis), "is not a number of ranks", "use 1 or more")
        if (self.data * self.tensor) % self.expert:
            raise FieldError(
                "parallel.expert",
                self.expert,
                f"does not divide data x tensor = {self.data * self.tensor}",
                f"use {one_of(divisors(self.data * self.tensor))}",
            )
        assert self.data % self.replicas == 0, f"{self.data} data ranks do not fall into {self.replicas} equal groups"

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.tensor

    def coordinate(self, rank: int) -> Coordinate:
        assert 0 <= rank < self.world_size, f"rank {rank} outside a world of {self.world_size}"
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinate(pipeline, data, tensor)

    def rank(self, coordinate: Coordinate) -> int:
        return (coordinate.pipeline * self.data + coordinate.data) * self.tensor + coordinate.tensor

    def __str__(self) -> str:
        return f"pipeline {self.pipeline} x data {self.data} x tensor {self.tensor}"


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How one global batch is cut: global_batch = data x microbatches x microbatch_size (all in sequences)."""

    global_batch: int
    data: int
    microbatches: int

    def __post_init__(self) -> None:
        share = self.data * self.microbatches
        if self.global_batch % share:
            below, above = self.global_batch // share * share, -(-self.global_batch // share) * share
            raise FieldError(
                "train.global_batch",
                self.global_batch,
                f"is not a multiple of data x microbatches = {self.data} x {self.microbatches} = {share}",
                f"use {one_of([value for value in (below, above) if value])}",
            )

    @property
    def microbatch_size(self) -> int:
        """Sequences in one pipeline action."""
        return self.global_batch // (self.data * self.microbatches)

    def samples(self, step: int, data_index: int) -> range:
        """Global sample numbers that data rank ``data_index`` reads in ``step`` (counted from 1)."""
        per_rank = self.global_batch // self.data
        first = (step - 1) * self.global_batch + data_index * per_rank
        return range(first, first + per_rank)


def divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
