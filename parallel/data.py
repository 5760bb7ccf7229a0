"""The data axis: parameters sharded over it (FSDP2, as in Rajbhandari et al. 2020, "ZeRO", stage 3) or replicated."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from cuboid.parallel.stages import Stage


def apply_data_parallel(
    stage: Stage,
    mesh: DeviceMesh,
    *,
    experts: Iterable[nn.Module] = (),
    expert_mesh: DeviceMesh | None = None,
    shard: bool,
    reshard_after_forward: bool,
    compute: torch.dtype = torch.float32,
    reduce: torch.dtype = torch.float32,
) -> None:
    """Shard or replicate ``stage`` in place over ``mesh``, layer by layer.

    ``mesh`` has one dimension, or two: replicated over the first and sharded over the second (Zhao et al. 2023,
    "PyTorch FSDP", section 3.2.2, hybrid sharding).

    Gradients are summed, not averaged: the loss is already divided by the tokens of the whole global batch. With
    ``reshard_after_forward`` a layer's full parameters live only while it computes; without, until the step's last
    backward. With another ``compute`` than the parameters' own dtype each layer computes on a copy of them in that
    dtype, also on a mesh of one rank, and its gradients are added up over microbatches and ranks in ``reduce``
    (Micikevicius et al. 2018, "Mixed Precision Training", section 3.1).

    ``experts`` are modules of the stage that see the tokens of other ranks: those of ``expert_mesh`` (one-dimensional)
    hold the same ones.
    """
    mixed = compute != torch.float32
    if mesh.size() == 1 and (expert_mesh is None or expert_mesh.size() == 1) and not mixed:
        return
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce) if mixed else MixedPrecisionPolicy()
    # the inner ones first: what is taken is left out of what lies around it
    meshes = [*((module, expert_mesh) for module in experts), *((layer, mesh) for layer in stage.layers.values())]
    for module, ranks in (*meshes, (stage, mesh)):
        if shard:
            fully_shard(module, mesh=ranks, reshard_after_forward=reshard_after_forward, mp_policy=policy)
        else:
            replicate(module, mesh=ranks, mp_policy=policy)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows neither AVG nor a pre-multiplied sum
