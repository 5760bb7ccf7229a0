"""Tensor and sequence parallelism from a plan that is data.

Parameters become DTensors over the tensor axis, so that sharding, checkpoints and the optimizer know what each rank
holds; the computation runs on plain local tensors with explicit exchanges (`collectives`), which costs no dispatch and
lets any linear (adapter, fake-quantised) take part. Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.

Shapes: B batch, T tokens, t = T / ranks, D model, F features of a rank, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from cuboid.parallel.collectives import enter, gather_features, leave
from cuboid.parallel.dora import apply_lengths
from cuboid.parallel.local import local_parameters, placed


class Role(StrEnum):
    """What a module does under tensor parallelism."""

    COLUMN = "column"
    """A linear whose outputs are divided: [B, T, D] -> [B, T, F]; its parent is entered once for all of them."""
    ROW = "row"
    """A linear whose inputs are divided: [B, T, F] -> partial sums -> [B, t, D]."""
    COLUMN_GATHERED = "column_gathered"
    """A column whose outputs all ranks need whole, since its parent cuts them (queries, keys and values in one matrix)
    or norms over them: [B, T, D] -> [B, T, F ranks]. The parent computes the same on every rank."""
    ROW_CUT = "row_cut"
    """A row that takes this rank's features out of whole ones: [B, T, F ranks] -> partial sums -> [B, t, D]. Backward
    each rank so has a part of the gradient of what stands between column and row."""
    TOKENS = "tokens"
    """A norm on the residual stream: replicated weight, this rank's tokens."""
    HEADS = "heads"
    """A norm between column and row: replicated weight, of whose gradient each rank has a part (its heads)."""
    EMBEDDING = "embedding"
    """The vocabulary divided: ids [B, T] -> [B, t, D]."""
    POSITIONS = "positions"
    """Learned positions: replicated weight, this rank's tokens: ids [B, T] -> [B, t, D]."""
    HEAD = "head"
    """The vocabulary divided: [B, t, D] -> logits [B, T, V / ranks]."""
    LENGTHS = "lengths"
    """DoRA's lengths of a column's rows, divided with them."""
    LENGTHS_GATHERED = "lengths_gathered"
    """The same beside a column whose outputs are gathered."""
    LENGTHS_WHOLE = "lengths_whole"
    """Those of a row: of whole rows, of which each rank has a part."""
    EXPERTS = "experts"
    """Experts on the tokens of this rank: `expert` divides them, nothing is done here."""


Plan = Mapping[str, Role]
"""Role of every module that holds parameters, by its name in the whole model with ``*`` for the layer's index; without
adapters, whose own roles follow from it."""
_PART = re.compile(r"(?:\.(base_layer|lora_A|lora_B|lora_magnitude_vector|modules_to_save)(\.[^.]+)?)+$")
"""What peft calls the parts of a linear with an adapter, of experts with one for each of several parameters, and a
module that is trained whole."""
_ADAPTER: Mapping[Role, Mapping[str, Role]] = {
    Role.COLUMN: {"A": Role.HEADS, "B": Role.COLUMN, "magnitude_vector": Role.LENGTHS},
    Role.COLUMN_GATHERED: {"A": Role.HEADS, "B": Role.COLUMN_GATHERED, "magnitude_vector": Role.LENGTHS_GATHERED},
    Role.ROW: {"A": Role.ROW, "B": Role.TOKENS, "magnitude_vector": Role.LENGTHS_WHOLE},
    Role.ROW_CUT: {"A": Role.ROW_CUT, "B": Role.TOKENS, "magnitude_vector": Role.LENGTHS_WHOLE},
    Role.HEAD: {"A": Role.HEADS, "B": Role.HEAD, "magnitude_vector": Role.LENGTHS},
    Role.EXPERTS: {"A": Role.EXPERTS, "B": Role.EXPERTS},
}
"""Roles of the two matrices beside a linear of each role (y = W x + B A x: Hu et al. 2022, "LoRA", section 4.1),
without peft's ``lora_``. Beside a column A [r, D] is whole and reads all tokens, and each rank's rows of B give a part
of its gradient. Beside a row A is cut as W is, [B, T, F] -> partial sums -> [B, t, r], so that r numbers of a token
travel, and B [D, r] is whole and reads this rank's tokens. DoRA's lengths are those of the rows of W: see `dora`."""


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
        role = _role(plan, name)
        if role is Role.EXPERTS:
            continue
        _distribute(module, mesh, role, shared, sequence=sequence)
        if role in (Role.COLUMN, Role.COLUMN_GATHERED):
            entered.add(stage.get_submodule(adapted(name).rpartition(".")[0]))
        elif role is Role.HEAD:
            entered.add(stage.get_submodule(adapted(name)))  # its adapter reads the same
        _WRAP[role](module, mesh, sequence)
    for block in entered:
        _enter_block(block, mesh, sequence)


def pattern(name: str) -> str:
    """``model.layers.7.mlp.up_proj`` -> ``model.layers.*.mlp.up_proj``."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def adapted(name: str) -> str:
    """``layers.*.q_proj.lora_A.default`` -> ``layers.*.q_proj``: what a part of an adapter belongs to; the name itself
    where it is of none."""
    return _PART.sub("", name)


def _role(plan: Plan, name: str) -> Role:
    role = plan.get(pattern(adapted(name)))
    assert role is not None, f"no tensor-parallel role for {name}"
    part = _PART.search(name)
    return _ADAPTER[role][part[1].removeprefix("lora_")] if part and part[1].startswith("lora_") else role


def _placements(role: Role, module: nn.Module, parameter: str) -> Placement:
    outputs, inputs = (1, 0) if _is_transposed(module) and parameter == "weight" else (0, 1)
    if role in (Role.COLUMN, Role.COLUMN_GATHERED, Role.EMBEDDING, Role.HEAD, Role.LENGTHS, Role.LENGTHS_GATHERED):
        return Shard(outputs)
    if role in (Role.ROW, Role.ROW_CUT) and parameter == "weight":
        return Shard(inputs)
    return Replicate()


def _is_transposed(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2) is a linear whose weight is [inputs, outputs], and its ``nf`` their number."""
    return type(module).__name__ == "Conv1D"


def _distribute(
    module: nn.Module, mesh: DeviceMesh, role: Role, shared: dict[nn.Parameter, nn.Parameter], *, sequence: bool
) -> None:
    """Replace the module's parameters by DTensors; a parameter that two modules share (tied) stays one."""
    for name, parameter in list(module._parameters.items()):
        if parameter is None:
            continue
        if parameter not in shared:
            shared[parameter] = placed(parameter, mesh, _placements(role, module, name))
        module.register_parameter(name, shared[parameter])


def _wrap_local(module: nn.Module, replicated_grad: Placement) -> None:
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with local_parameters(module, replicated_grad):
            return inner(*args, **kwargs)

    module.forward = forward


def _column(module: nn.Module, mesh: DeviceMesh, sequence: bool) -> None:
    if _is_transposed(module):
        module.__dict__["nf"] //= mesh.size()
    _wrap_local(module, Partial())


def _column_gathered(module: nn.Module, mesh: DeviceMesh, sequence: bool) -> None:
    _column(module, mesh, sequence)
    inner, group = module.forward, mesh.get_group()
    module.forward = lambda x_BTD: gather_features(inner(x_BTD), group)


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
                module.__dict__["bias"] = torch.zeros_like(bias)  # a Conv1D cannot do without
            summed = leave(inner(x_BTF), group, sequence=sequence)
            return summed if bias is None else summed + bias

    module.forward = forward


def _row_cut(module: nn.Module, mesh: DeviceMesh, sequence: bool) -> None:
    _row(module, mesh, sequence)
    inner, ranks, rank = module.forward, mesh.size(), mesh.get_local_rank()
    module.forward = lambda x_BTF: inner(x_BTF.chunk(ranks, dim=-1)[rank])


def _positions(module: nn.Module, mesh: DeviceMesh, sequence: bool) -> None:
    _tokens(module, mesh, sequence)
    if sequence:
        inner, ranks, rank = module.forward, mesh.size(), mesh.get_local_rank()
        module.forward = lambda ids_BT: inner(ids_BT.chunk(ranks, dim=1)[rank])


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


def _lengths(module: nn.Module, mesh: DeviceMesh, sequence: bool, *, cut: bool = False, gathered: bool = False) -> None:
    grad = Partial() if sequence else Replicate()
    apply_lengths(module, mesh.get_group(), cut=cut, gathered=gathered, replicated_grad=grad)


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
    Role.COLUMN_GATHERED: _column_gathered,
    Role.ROW_CUT: _row_cut,
    Role.TOKENS: _tokens,
    Role.HEADS: _heads,
    Role.EMBEDDING: _embedding,
    Role.POSITIONS: _positions,
    Role.HEAD: _heads,
    Role.LENGTHS: _lengths,
    Role.LENGTHS_GATHERED: partial(_lengths, gathered=True),
    Role.LENGTHS_WHOLE: partial(_lengths, cut=True),
}
