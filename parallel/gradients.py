"""What remains to be done to gradients after a schedule ran: open sums, tied copies, the one global norm, clipping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cuboid.parallel.mesh import Block
from cuboid.parallel.stages import Stage


def local(tensor: Tensor) -> Tensor:
    """The part that this rank holds: a view, no communication."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def close_sums(parameters: Iterable[nn.Parameter]) -> None:
    """Add up gradients that are still partial sums over the tensor axis (norms under sequence parallelism).

    FSDP does this for the parameters that it manages; without a data axis it is left to us. One exchange for all.
    """
    open_ = [p for p in parameters if isinstance(p.grad, DTensor) and p.grad.placements != p.placements]
    if not open_:
        return
    assert all(p.grad.placements[0].is_partial() for p in open_), "only partial sums can be left open"
    mesh = open_[0].device_mesh
    locals_ = [local(p.grad) for p in open_]
    flat = torch.cat([grad.flatten() for grad in locals_])
    dist.all_reduce(flat, group=mesh.get_group())
    for parameter, grad, total in zip(open_, locals_, flat.split([g.numel() for g in locals_]), strict=True):
        parameter.grad = DTensor.from_local(total.view_as(grad), mesh, parameter.placements, run_check=False)


class TiedWeights:
    """Copies of a tied embedding on the first and the last stage: their gradients are summed, so they stay equal.

    Both copies start from the same values and take the same update, bit for bit.
    """

    def __init__(self, stages: Sequence[Stage], block: Block) -> None:
        self.copies: list[nn.Parameter] = []
        self.second: nn.Parameter | None = None
        """This rank's copy that is not the embedding itself: it counts in no norm."""
        self.group: dist.ProcessGroup | None = None
        if not stages[0].anatomy.tied:
            return
        anatomy = stages[0].anatomy
        for stage in stages:
            names = dict(stage.named_parameters())  # one entry where one stage holds both ends
            self.copies += [names[key] for key in (anatomy.embedding_weight, anatomy.head_weight) if key in names]
            self.second = names.get(anatomy.head_weight, self.second)
        column = dist.get_process_group_ranks(block.mesh["pipeline"].get_group())
        ends = [column[0], column[-1]]
        if len(column) > 1 and block.rank in ends and len(self.copies) == 1:
            self.group = dist.new_group(ends, use_local_synchronization=True)

    def sum_gradients(self) -> None:
        if len(self.copies) == 2:  # both ends stand on this rank, on two stages
            first, last = (local(copy.grad) for copy in self.copies)
            first += last
            last.copy_(first)
        elif self.group is not None:
            dist.all_reduce(local(self.copies[0].grad), group=self.group)


def replicas(tensor: Tensor, sizes: Mapping[str, int]) -> int:
    """How many ranks of one pipeline coordinate hold the same values; ``sizes`` are those of the data and tensor axes."""
    count = 1
    names = (tensor.device_mesh.mesh_dim_names or ()) if isinstance(tensor, DTensor) else ()
    for axis, size in sizes.items():
        divided = axis in names and not tensor.placements[names.index(axis)].is_replicate()  # type: ignore[attr-defined]
        count *= 1 if divided else size
    return count


def squared_norm(parameters: Sequence[nn.Parameter], sizes: Mapping[str, int]) -> Tensor:
    """This rank's share of the squared global gradient norm, float64: the sum over all ranks is the whole.

    A value that several ranks hold counts once in the sum. Parameters without a gradient add nothing.
    """
    parameters = [p for p in parameters if p.grad is not None]
    if not parameters:
        return torch.zeros((), dtype=torch.float64)
    grads = [local(p.grad) for p in parameters]
    shares = torch.tensor([1.0 / replicas(p, sizes) for p in parameters], dtype=torch.float64, device=grads[0].device)
    norms = torch.stack(torch._foreach_norm(grads, 2.0)).double()
    return (norms.square() * shares).sum()


def clip(parameters: Iterable[nn.Parameter], *, norm: float, limit: float) -> None:
    """Scale all gradients by ``limit / norm`` where the global norm exceeds it (Pascanu et al. 2013)."""
    if norm > limit:
        grads = [local(p.grad) for p in parameters if p.grad is not None]
        torch._foreach_mul_(grads, limit / (norm + 1e-6))
