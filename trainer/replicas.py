"""Whether ranks that hold the same tensor still hold the same bits: a memory or a device that flips one says nothing.

Parameters are replicated over data (`parallel.shard: false`, groups of HSDP), over tensor ranks (norms, routers), and
over the pipeline (a tied embedding). From equal bits the same sums give equal bits, so every difference is a fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from cuboid.parallel.errors import one_of
from cuboid.parallel.gradients import local
from cuboid.parallel.local import owned_slices

PRIME = 2**31 - 19
"""Checksums are compared modulo this prime. No 2^k and no 2^j - 1 up to 2^64 is a multiple of it, so that one flipped
bit always shows; and the shares of a million ranks add up exactly in float64."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Replicas:
    """What this rank holds and others hold too. All ranks of the world make one together.

    Args:
        tensors: global name -> plain tensor or DTensor, whose memory stays where it is.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        parts = {(name, str(owned_slices(tensor))): local(tensor) for name, tensor in tensors.items()}
        held: list[list[tuple[str, str]]] = [[]] * dist.get_world_size()
        dist.all_gather_object(held, list(parts))
        holders: dict[tuple[str, str], list[int]] = {}
        for rank, names in enumerate(held):
            for part in names:
                holders.setdefault(part, []).append(rank)
        self._holders = {part: ranks for part, ranks in holders.items() if len(ranks) > 1}
        self._parts = {part: tensor for part, tensor in parts.items() if part in self._holders and tensor.numel()}
        # the first holder's checksum counts once for each other one's, which are taken away: equal ones add up to zero
        self._shares = [
            len(self._holders[part]) - 1 if self._holders[part][0] == dist.get_rank() else -1 for part in self._parts
        ]

    def share(self) -> float:
        """This rank's share of a sum over all ranks that is a multiple of `PRIME` where all replicas are equal."""
        checksums = _checksums(list(self._parts.values()))
        return float(sum(share * found for share, found in zip(self._shares, checksums, strict=True)) % PRIME)

    def differences(self) -> list[str]:
        """Which rank holds other bits of what, in words, the same on every rank; all call it together."""
        own = dict(zip(self._parts, _checksums(list(self._parts.values())), strict=True))
        found: list[dict[tuple[str, str], int]] = [{}] * dist.get_world_size()
        dist.all_gather_object(found, own)
        words = []
        for part, ranks in self._holders.items():
            values = {rank: found[rank][part] for rank in ranks if part in found[rank]}
            ((most, count), *others) = Counter(values.values()).most_common() or [(0, 0)]
            if not others:
                continue
            name = part[0].partition(".")[2] if part[0].startswith("model.") else part[0]
            odd = [rank for rank, value in values.items() if value != most]
            if count > len(odd):
                words.append(f"rank {one_of(odd)} holds other bits of {name} than the {count} others")
            else:
                words.append(f"ranks {' and '.join(map(str, ranks))} hold different bits of {name}")
        return words


def _checksums(tensors: list[Tensor]) -> list[int]:
    """Of each tensor the sum of its bits as 64-bit integers, modulo 2^64; in [0, 2^64). One exchange with the host."""
    if not tensors:
        return []
    return [total % 2**64 for total in torch.stack([_sum_of_bits(tensor) for tensor in tensors]).tolist()]


def _sum_of_bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    size = flat.element_size()
    if (flat.numel() * size) % 8 == (flat.storage_offset() * size) % 8 == 0:
        return flat.view(torch.int64).sum()  # 30 times faster on a CPU than the sum of narrower integers
    return flat.view(_INTEGERS[size]).sum(dtype=torch.int64)
