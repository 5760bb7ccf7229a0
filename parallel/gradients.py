"""What remains to be done to gradients after a schedule ran: open sums, tied copies, the one global norm, clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cuboid.parallel.mesh import Block
from cuboid.parallel.stages import Stage


def local(tensor: Tensor) -> Tensor:
    """The part that this rank holds: a view, no communication."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a gradient that must be there: a view."""
    assert parameter.grad is not None, "no gradient reached this parameter"
    return local(parameter.grad)


def close_sums(parameters: Iterable[nn.Parameter]) -> None:
    """Add up gradients that are still partial sums over the tensor axis (norms under sequence parallelism).

    FSDP does this for the parameters that it manages; without a data axis it is left to us. One exchange for all.
    """
    open_ = []
    for parameter in parameters:
        grad = parameter.grad
        if isinstance(parameter, DTensor) and isinstance(grad, DTensor) and grad.placements != parameter.placements:
            assert grad.placements[0].is_partial(), "only partial sums can be left open"
            open_.append((parameter, grad.to_local()))
    if not open_:
        return
    mesh = open_[0][0].device_mesh
    flat = torch.cat([grad.flatten() for _, grad in open_])
    dist.all_reduce(flat, group=mesh.get_group())
    for (parameter, grad), total in zip(open_, flat.split([grad.numel() for _, grad in open_]), strict=True):
        parameter.grad = DTensor.from_local(total.view_as(grad), mesh, parameter.placements, run_check=False)


class TiedWeights:
    """Copies of a tied embedding on the first and the last stage: their gradients are summed, so they stay equal.

    On two ranks both copies start from the same values and take the same update, bit for bit. On one rank, where a
    V-shaped schedule lays both stages, the embedding alone is updated and saved, and the head follows it.
    """

    def __init__(self, stages: Sequence[Stage], block: Block) -> None:
        self.copy: nn.Parameter | None = None
        """This rank's, where it holds one end of the pipeline and not both."""
        self.second: nn.Parameter | None = None
        """This rank's where it is the head: the embedding itself counts in the norm, this one does not."""
        self.group: dist.ProcessGroup | None = None
        self.followed: nn.Parameter | None = None
        """The embedding, where its copy, ``second``, stands on this rank too."""
        anatomy = stages[0].anatomy
        names = {name: parameter for stage in stages for name, parameter in stage.named_parameters()}
        embedding, head = names.get(anatomy.embedding_weight), names.get(anatomy.head_weight)
        column = dist.get_process_group_ranks(block.mesh["pipeline"].get_group())
        if not anatomy.tied or len(column) == 1 or (embedding is None and head is None):
            return
        self.second = head
        if embedding is not None and head is not None:
            self.followed = embedding
            return
        self.copy = head if embedding is None else embedding
        self.group = dist.new_group([column[0], column[-1]], timeout=block.timeout, use_local_synchronization=True)

    def sum_gradients(self) -> None:
        """After the schedule: every copy that is updated gets the gradient of all. Frozen ones have none."""
        if self.group is not None and self.copy is not None and self.copy.requires_grad:
            dist.all_reduce(local_gradient(self.copy), group=self.group)
        if self.followed is not None and self.second is not None and self.followed.requires_grad:
            local_gradient(self.followed).add_(local_gradient(self.second))
            self.second.grad = None

    @torch.no_grad()
    def follow(self) -> None:
        """After the embedding's values have changed: a head on the same rank takes them."""
        if self.followed is not None and self.second is not None:
            local(self.second).copy_(local(self.followed))


def replicas(tensor: Tensor, ranks: int) -> int:
    """How many of the ``ranks`` of one pipeline coordinate (data x tensor) hold the same values as this one."""
    if not isinstance(tensor, DTensor):
        return ranks
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return ranks // math.prod(size for size, placement in sizes if not placement.is_replicate())


def squared_norm(parameters: Sequence[nn.Parameter], ranks: int) -> Tensor:
    """This rank's share of the squared global gradient norm, float64: the sum over all ranks is the whole.

    A value that several of the ``ranks`` of a pipeline coordinate hold counts once in the sum. Parameters without a
    gradient add nothing.
    """
    parameters = [p for p in parameters if p.grad is not None]
    return sum_of_squares([local_gradient(p) for p in parameters], [1.0 / replicas(p, ranks) for p in parameters])


def sum_of_squares(tensors: list[Tensor], shares: Sequence[float]) -> Tensor:
    """The squared norms of the tensors, each times its share, added up in float64: a CPU's sum of 16 million float32
    squares in float32 would be off by 1e-3."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    norms = torch.stack(torch._foreach_norm(tensors, 2.0, dtype=torch.float64))
    return (norms.square() * torch.tensor(shares, dtype=torch.float64, device=norms.device)).sum()


def clip(parameters: Iterable[nn.Parameter], *, norm: float, limit: float) -> None:
    """Scale all gradients by ``limit / norm`` where the global norm exceeds it (Pascanu et al. 2013)."""
    grads = [local_gradient(p) for p in parameters if p.grad is not None]
    if grads and norm > limit:
        torch._foreach_mul_(grads, limit / (norm + 1e-6))
