"""The data axis: parameters sharded over it (FSDP2, as in Rajbhandari et al. 2020, "ZeRO", stage 3) or replicated."""

from __future__ import annotations

from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from cuboid.parallel.stages import Stage


def apply_data_parallel(stage: Stage, mesh: DeviceMesh, *, shard: bool, reshard_after_forward: bool) -> None:
    """Shard or replicate ``stage`` in place over ``mesh``, layer by layer.

    ``mesh`` has one dimension, or two: replicated over the first and sharded over the second (Zhao et al. 2023,
    "PyTorch FSDP", section 3.2.2, hybrid sharding).

    Gradients are summed, not averaged: the loss is already divided by the tokens of the whole global batch. With
    ``reshard_after_forward`` a layer's full parameters live only while it computes; without, until the step's last
    backward.
    """
    if mesh.size() == 1:
        return
    for module in (*stage.layers.values(), stage):
        if shard:
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward)
        else:
            replicate(module, mesh=mesh)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows neither AVG nor a pre-multiplied sum
