"""Tensor and sequence parallelism from a plan that is data.

Parameters become DTensors over the tensor axis, so that sharding, checkpoints and the optimizer know what each rank
holds; the computation runs on plain local tensors with explicit exchanges (`collectives`), which costs no dispatch and
lets any linear (adapter, fake-quantised) take part. Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.

Shapes: B batch, T tokens, t = T / ranks, D model, F features of a rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from cuboid.parallel.collectives import enter, leave
from cuboid.parallel.local import local_parameters, placed


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
    EXPERTS = "experts"
    """Experts on the tokens of this rank: `expert` divides them, nothing is done here."""


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
        if role is Role.EXPERTS:
            continue
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
            shared[parameter] = placed(parameter, mesh, _placements(role, name))
        module.register_parameter(name, shared[parameter])


def _wrap_local(module: nn.Module, replicated_grad: Placement) -> None:
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with local_parameters(module, replicated_grad):
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
        with local_parameters(module, Partial() if sequence else Replicate()) as local:
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
        with local_parameters(module, Partial()):
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
