"""Low-rank adapters of fused experts: W + s B A for each expert that this rank holds.

peft's `ParamWrapper` stands around the family's module, one for each of its parameters that is adapted, the one around
the other. Its A is [E r, D], the rows of one expert after those of another; its B [F, r, E] names the expert last.
W + s B A is written out before each use, as peft does, so that the family's own kernel computes with it.

Shapes: E experts in all, e of this rank, r rank, D inputs, F outputs of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Shard

from cuboid.parallel.local import local_parameters, placed


def divide_experts(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Leave this rank its share of the experts, adapters included, in place."""
    for name, parameter in list(experts.named_parameters()):
        owner, _, last = name.rpartition(".")
        by_expert = Shard(2 if "lora_B." in name else 0)
        experts.get_submodule(owner).register_parameter(last, placed(parameter, mesh, by_expert))
    own = without_adapters(experts)
    own.num_experts //= mesh.size()  # transformers' own attribute


def without_adapters(experts: nn.Module) -> Any:
    """The family's own module."""
    return _wrappers(experts)[-1]


def _wrappers(experts: Any) -> list[Any]:
    """From the outermost to the family's own module, which is the last."""
    found = [experts]
    while hasattr(found[-1], "parameter_name"):
        found.append(found[-1].base_layer)
    return found


@contextmanager
def local_experts(experts: nn.Module) -> Iterator[None]:
    """Within: the parameters of the family's module are plain tensors, those of this rank's experts, with what their
    adapters add; gradients flow back into all of them."""
    *wrappers, own = _wrappers(experts)
    with ExitStack() as stack:
        stack.enter_context(local_parameters(own, Partial()))
        for wrapper in wrappers:
            if wrapper.disable_adapters:  # peft's own switch
                continue
            (a,), (b,), (scaling,) = wrapper.lora_A.values(), wrapper.lora_B.values(), wrapper.scaling.values()
            stack.enter_context(local_parameters(a, Partial()))
            stack.enter_context(local_parameters(b, Partial()))
            name, transposed = wrapper.parameter_name, getattr(own, "is_transposed", False)
            adapted = _adapted(getattr(own, name), a.weight, b.weight, scaling=scaling, transposed=transposed)
            own.__dict__[name] = adapted  # in front of the registered parameter, as `local_parameters` does it
            stack.callback(own.__dict__.pop, name, None)
        yield


def _adapted(weight: Tensor, a: Tensor, b: Tensor, *, scaling: float, transposed: bool) -> Tensor:
    """W [e, F, D], or [e, D, F] where the family keeps it transposed, plus s B A."""
    a = a.view(len(weight), -1, a.shape[-1])  # [e, r, D]
    b = b.permute(2, 0, 1)  # [e, F, r]
    left, right = (a.mT, b.mT) if transposed else (b, a)
    return torch.baddbmm(weight, left, right, alpha=scaling)
