"""Tensor and sequence parallelism from a plan that is data.

Parameters become DTensors over the tensor axis, so that sharding, checkpoints and the optimizer know what each rank
holds; the computation runs on plain local tensors with explicit exchanges (`collectives`), which costs no dispatch and
lets any linear (adapter, fake-quantised) take part. Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.

Shapes: B batch, T tokens, t = T / ranks, D model, F features of a rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from cuboid.parallel.collectives import enter, leave


class Role(StrEnum):
    """What a module does under tensor parallelism."""

    COLUMN = "column"
    """A linear whose outputs are divided: [B, T, D] -> [B, T, F]; its parent is entered once for all of them."""
    ROW = "row"
    """A linear whose inputs are divided: [B, T, F] -> partial sums -> [B, t, D]."""
    TOKENS = "tokens"
    """A norm on the residual stream: replicated weight, this rank's tokens."""
    HEADS = "heads"
    """A norm within heads: replicated weight, this rank's heads."""
    EMBEDDING = "embedding"
    """The vocabulary divided: ids [B, T] -> [B, t, D]."""
    HEAD = "head"
    """The vocabulary divided: [B, t, D] -> logits [B, T, V / ranks]."""


Plan = Mapping[str, Role]
"""Role of every module that holds parameters, by its name in the whole model with ``*`` for the layer's index."""


def apply_tensor_parallel(stage: nn.Module, mesh: DeviceMesh, plan: Plan, *, sequence: bool = True) -> None:
    """Divide ``stage`` in place over ``mesh`` (one-dimensional) as ``plan`` says.

    Every module of the stage that holds parameters must have a role: one that was forgotten would train on wrong
    gradients in silence.
    """
    if mesh.size() == 1:
        return
    shared: dict[nn.Parameter, nn.Parameter] = {}
    entered: set[nn.Module] = set()
    for name, module in list(stage.named_modules()):
        if not module._parameters:
            continue
        role = plan.get(pattern(name))
        assert role is not None, f"no tensor-parallel role for {name}"
        _distribute(module, mesh, role, shared, sequence=sequence)
        if role is Role.COLUMN:
            entered.add(stage.get_submodule(name.rpartition(".")[0]))
        _WRAP[role](module, mesh, sequence)
    for block in entered:
        _enter_block(block, mesh, sequence)


def pattern(name: str) -> str:
    """``model.layers.7.mlp.up_proj`` -> ``model.layers.*.mlp.up_proj``."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _placements(role: Role, parameter: str) -> Placement:
    if role in (Role.COLUMN, Role.EMBEDDING, Role.HEAD):
        return Shard(0)
    if role is Role.ROW and parameter == "weight":
        return Shard(1)
    return Replicate()


def _distribute(
    module: nn.Module, mesh: DeviceMesh, role: Role, shared: dict[nn.Parameter, nn.Parameter], *, sequence: bool
) -> None:
    """Replace the module's parameters by DTensors; a parameter that two modules share (tied) stays one."""
    for name, parameter in list(module._parameters.items()):
        if parameter is None:
            continue
        if parameter not in shared:
            placed = distribute_tensor(parameter.detach(), mesh, [_placements(role, name)], src_data_rank=None)
            shared[parameter] = nn.Parameter(placed, requires_grad=parameter.requires_grad)
        module.register_parameter(name, shared[parameter])


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


@contextmanager
def _local_parameters(module: nn.Module, replicated_grad: Placement) -> Iterator[dict[str, Tensor]]:
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


def _wrap_local(module: nn.Module, replicated_grad: Placement) -> None:
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _local_parameters(module, replicated_grad):
            return inner(*args, **kwargs)

    module.forward = forward


def _column(module: nn.Module, mesh: DeviceMesh, sequence: bool) -> None:
    _wrap_local(module, Partial())


def _tokens(module: nn.Module, mesh: DeviceMesh, sequence: bool) -> None:
    _wrap_local(module, Partial() if sequence else Replicate())


def _heads(module: nn.Module, mesh: DeviceMesh, sequence: bool) -> None:
    _wrap_local(module, Partial())


def _row(module: nn.Module, mesh: DeviceMesh, sequence: bool) -> None:
    inner, group = module.forward, mesh.get_group()

    def forward(x_BTF: Tensor) -> Tensor:
        with _local_parameters(module, Partial() if sequence else Replicate()) as local:
            bias = local.get("bias")
            if bias is not None:  # added once, to the sum
                module.__dict__["bias"] = None
            summed = leave(inner(x_BTF), group, sequence=sequence)
            return summed if bias is None else summed + bias

    module.forward = forward


def _embedding(module: nn.Module, mesh: DeviceMesh, sequence: bool) -> None:
    assert isinstance(module, nn.Embedding)
    inner, group = module.forward, mesh.get_group()
    rows = module.num_embeddings // mesh.size()
    first = rows * mesh.get_local_rank()
    padding = module.padding_idx
    module.padding_idx = padding - first if padding is not None and first <= padding < first + rows else None

    def forward(ids_BT: Tensor) -> Tensor:
        elsewhere = (ids_BT < first) | (ids_BT >= first + rows)
        with _local_parameters(module, Partial()):
            hidden = inner((ids_BT - first).masked_fill(elsewhere, 0))
        return leave(hidden.masked_fill(elsewhere.unsqueeze(-1), 0), group, sequence=sequence)

    module.forward = forward  # type: ignore[method-assign, assignment]


def _head(module: nn.Module, mesh: DeviceMesh, sequence: bool) -> None:
    _wrap_local(module, Partial())
    _enter_block(module, mesh, sequence)


def _enter_block(block: nn.Module, mesh: DeviceMesh, sequence: bool) -> None:
    """Exchange the hidden states once at the door of a block, however many column linears read them."""
    group = mesh.get_group()

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (enter(args[0], group, sequence=sequence), *args[1:]), kwargs
        hidden = enter(kwargs["hidden_states"], group, sequence=sequence)
        return args, {**kwargs, "hidden_states": hidden}

    block.register_forward_pre_hook(hook, with_kwargs=True)


_WRAP: Mapping[Role, Callable[[nn.Module, DeviceMesh, bool], None]] = {
    Role.COLUMN: _column,
    Role.ROW: _row,
    Role.TOKENS: _tokens,
    Role.HEADS: _heads,
    Role.EMBEDDING: _embedding,
    Role.HEAD: _head,
}
