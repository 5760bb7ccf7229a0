"""Modules whose parameters are DTensors and whose computation runs on this rank's plain tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from cuboid.parallel.collectives import enter


@dataclass(frozen=True)
class Place:
    """Where a rank's part of a DTensor stands in the whole, without the part itself."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    """Of the whole."""
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: DTensor) -> Self:
        return cls(tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride())

    @property
    def is_replicated(self) -> bool:
        return all(placement.is_replicate() for placement in self.placements)

    def put(self, local: Tensor) -> DTensor:
        """The DTensor of which ``local`` is this rank's part; they share memory."""
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


def owned_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this rank holds, one slice a dimension."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def place_of(parameter: Tensor) -> Place | None:
    """What `localise` noted; None where the parameter was whole."""
    return getattr(parameter, "place", None)


def localise(stage: nn.Module) -> None:
    """Replace DTensor parameters by plain ones, in the same memory, for an engine that knows no DTensor (DeepSpeed).

    The stage computes the same; but the gradient of a replicated parameter is summed over the axis in each backward,
    since a plain gradient cannot say that it is a partial sum.
    """
    plain: dict[nn.Parameter, nn.Parameter] = {}
    for module in stage.modules():
        for name, parameter in module._parameters.items():
            if not isinstance(parameter, DTensor):
                continue
            if parameter not in plain:  # two modules may share it (tied)
                plain[parameter] = nn.Parameter(parameter.detach().to_local(), requires_grad=parameter.requires_grad)
                plain[parameter].place = Place.of(parameter)
            module._parameters[name] = plain[parameter]


def placed(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """The parameter (the same on every rank, or on `meta`) as a DTensor over ``mesh`` (one-dimensional)."""
    tensor = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


@contextmanager
def local_parameters(module: nn.Module, replicated_grad: Placement) -> Iterator[dict[str, Tensor]]:
    """Within: ``module.weight`` is this rank's plain tensor, whose gradient flows back into the parameter.

    An attribute in ``__dict__`` shadows the registered parameter, which itself stays where sharding put it.
    ``replicated_grad`` says what the local gradient of a replicated parameter is: `Partial` where each rank sees other
    tokens or heads and the sum is still to be taken, `Replicate` where all computed the same.
    """
    local: dict[str, Tensor] = {}
    for name, parameter in module._parameters.items():
        if isinstance(parameter, DTensor):
            grad = replicated_grad if parameter.placements[0].is_replicate() else parameter.placements[0]
            local[name] = parameter.to_local(grad_placements=[grad])
        elif parameter is not None and (place := place_of(parameter)):
            is_open = place.is_replicated and replicated_grad.is_partial()
            local[name] = enter(parameter, place.mesh.get_group(), sequence=False) if is_open else parameter
    module.__dict__.update(local)
    try:
        yield local
    finally:
        for name in local:
            module.__dict__.pop(name, None)
