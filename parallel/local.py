"""Modules whose parameters are DTensors and whose computation runs on this rank's plain tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor


def placed(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """The parameter (the same on every rank, or on `meta`) as a DTensor over ``mesh`` (one-dimensional)."""
    tensor = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


@contextmanager
def local_parameters(module: nn.Module, replicated_grad: Placement) -> Iterator[dict[str, Tensor]]:
    """Within: ``module.weight`` is this rank's plain tensor, whose gradient flows back into the DTensor parameter.

    An attribute in ``__dict__`` shadows the registered parameter, which itself stays where sharding put it.
    ``replicated_grad`` says what the local gradient of a replicated parameter is: `Partial` where each rank sees other
    tokens or heads and the sum is still to be taken, `Replicate` where all computed the same.
    """
    local: dict[str, Tensor] = {}
    for name, parameter in module._parameters.items():
        if isinstance(parameter, DTensor):
            grad = replicated_grad if parameter.placements[0].is_replicate() else parameter.placements[0]
            local[name] = parameter.to_local(grad_placements=[grad])
    module.__dict__.update(local)
    try:
        yield local
    finally:
        for name in local:
            module.__dict__.pop(name, None)
