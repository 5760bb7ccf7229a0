"""DeepSpeed's ZeRO as the data-parallel engine (Rajbhandari et al. 2020, "ZeRO", section 5). The deepspeed door.

ZeRO divides flat buffers, and its cuts follow no dimension of a tensor. So nothing of its layout leaves this file: what
others ask for is gathered over the data axis, one parameter at a time.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from cuboid.parallel.errors import FieldError
from cuboid.parallel.gradients import TiedWeights, local, sum_of_squares
from cuboid.parallel.local import place_of
from cuboid.parallel.mesh import Block
from cuboid.parallel.stages import Stage
from cuboid.trainer.data import Batch
from cuboid.trainer.engine import Engine, StepResult
from cuboid.trainer.optimizer import MOMENTS, make_adamw, make_moments, set_step
from cuboid.trainer.recipe import Recipe

_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's own size of the buffer in which gradients are reduced."""
_GROUP_ELEMENTS = 100_000_000
"""Elements that are updated at a time where the state lies on disk: weights, gradients and both moments of so many are
in memory then, 1.6 GB a rank."""


def divide(
    stage: Stage, parameters: Sequence[tuple[str, nn.Parameter]], tied: TiedWeights, recipe: Recipe, block: Block
) -> deepspeed.DeepSpeedEngine:
    """``stage`` as a module whose gradients, optimizer state and parameters are divided as ``zero_stage`` says.

    Args:
        parameters: of the stage, plain (`tensor.localise`), by global name.
    """
    for _, parameter in parameters:
        # what is not cut counts in DeepSpeed's norm on the first tensor rank alone
        parameter.model_parallel = _is_cut(parameter)  # type: ignore[attr-defined]
    if tied.second is not None:
        # counts on the other stage
        tied.second.ds_pipe_replicated = True  # type: ignore[attr-defined]
    # On CPU DeepSpeed would compile an operator, which takes a minute and a compiler, for its inference alone.
    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # it calls torch's collectives by the names of torch 2.11
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    settings, clip = recipe.parallel, recipe.optimizer.clip_grad_norm
    config = {
        # gradients pile up over the microbatches of our own schedule; to DeepSpeed a step is one batch
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip or 0.0,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler either
        "zero_optimization": {
            "stage": settings.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": min(_BUCKET_ELEMENTS, sum(parameter.numel() for _, parameter in parameters)),
            # stage 3: every parameter is divided, and freed after each use, however small the model
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            **_offload(recipe, block),
        },
    }
    engine, *_ = deepspeed.initialize(
        model=stage,
        optimizer=make_adamw([named for named in parameters if named[1].requires_grad], recipe.optimizer),
        config=config,
        mpu=_Axes(block),
        dist_init_required=False,
    )
    return engine


def _offload(recipe: Recipe, block: Block) -> dict[str, Any]:
    """What DeepSpeed is told of where optimizer state lies.

    Raises:
        FieldError: another run writes there.
    """
    kind, path = recipe.parallel.offload, recipe.parallel.offload_path
    if kind != "nvme":
        return {"offload_optimizer": {"device": kind}} if kind else {}
    assert path is not None, "the check wants a folder"
    folder = Path(path).expanduser() / f"{recipe.name}-rank{block.rank}"
    try:
        folder.mkdir(exist_ok=True)
        # held as long as this process lives: its files have the same names in every run
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder / "zero_stage_3", ignore_errors=True)  # of an earlier start: a checkpoint has what counts
    except OSError as error:
        in_use = "is in use by another run of this name"
        constraint = in_use if isinstance(error, BlockingIOError) else f"cannot be written: {error.strerror}"
        raise FieldError("parallel.offload_path", path, constraint, "use another folder, or another name") from None
    return {"offload_optimizer": {"device": kind, "nvme_path": str(folder)}, "sub_group_size": _GROUP_ELEMENTS}


@dataclass(kw_only=True)
class ZeroEngine(Engine):
    """ZeRO reduces the gradients, and AdamW updates this data rank's part of the flat buffers."""

    zero: Any
    """The `deepspeed.DeepSpeedEngine` of this rank's stage."""

    def __post_init__(self) -> None:
        self._optimizer = self.zero.optimizer
        self._stage = self.zero.zero_optimization_stage()
        if self._stage == 3:
            self._flat = self._optimizer.fp32_partitioned_groups_flat
            # DeepSpeed has reduced gradients in one buffer, in the order of its groups, also where the rest is on disk
            divided = [parameter for group in self._optimizer.fp16_groups for parameter in group]
            sizes = [parameter.partition_numel() for parameter in divided]
            parts = self._optimizer.grad_partitions_flat_buffer.split(sizes)
            self._gradient_parts = dict(zip(divided, parts, strict=True))
        else:
            self._flat = self._optimizer.single_partition_of_fp32_groups
        for group, flat in enumerate(self._flat):
            with self._in_memory(group, changed=True):
                make_moments(self._optimizer.optimizer, [flat])
        set_step(self._optimizer.optimizer, self._flat, 0)
        if self._stage < 3:
            self._optimizer._lazy_init_hp_params_optimizer_state()  # parameters learn where their moments lie
        assert all(parameter.requires_grad for _, parameter in self.saved), "only an adapter leaves something frozen"
        self._owners = _share_out([_shape(parameter).numel() for _, parameter in self.saved], self.averaged_over)

    def backward(self, batch: Batch, *, told: Sequence[float] = ()) -> StepResult:
        self.zero.set_gradient_accumulation_boundary(False)
        return super().backward(batch, told=told)

    def close_gradients(self) -> None:
        self.tied.sum_gradients()
        self.zero.set_gradient_accumulation_boundary(True)
        if self._stage == 1:
            self.zero.allreduce_gradients()
        else:  # reduced in every backward
            self._optimizer.finalize_gradient_accumulation_boundary()

    def squared_norm(self) -> Tensor:
        parts, shares = [], []
        for _, parameter in self.parameters:
            counts = parameter.requires_grad and parameter is not self.tied.second
            part = self._own_gradient(parameter) if counts else None
            if part is not None:
                parts.append(part)
                shares.append(1.0 if _is_cut(parameter) else 1.0 / self.block.layout.tensor)
        return sum_of_squares(parts, shares)

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        for name, parameter in self.parameters:
            if not parameter.requires_grad:
                yield name, None
            elif self._stage == 3:
                yield name, _put(parameter, self._gathered(parameter, self._gradient_parts[parameter]))
            else:
                yield name, _put(parameter, safe_get_full_grad(parameter))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.parameters:
            with GatheredParameters([parameter]):
                yield name, _put(parameter, parameter.detach())

    def update(self, result: StepResult, *, learning_rate: float) -> None:
        """DeepSpeed clips, by its own sum of the same gradients."""
        self._optimizer.set_lr(learning_rate)
        self.zero.step()
        if self.experts and result.measures:
            self.experts.rebalance(result.measures)

    def tensors(self) -> dict[str, Tensor]:
        """Of each parameter the whole, gathered over data and then kept by one data rank: all keep about as much."""
        state = self.experts.tensors() if self.experts else {}
        for name, parameter, owner in self._by_group(changed=False):
            with GatheredParameters([parameter]):
                whole = {f"model.{name}": _put(parameter, parameter.detach())}
            for moment in MOMENTS:
                whole[f"optimizer.{moment}.{name}"] = _put(parameter, self._moment(parameter, moment))
            if owner == self.block.coordinate.data:
                state.update(whole)
        return state

    @torch.no_grad()
    def resume_at(self, step: int, tensors: Mapping[str, Tensor], *, skipped: int = 0) -> None:
        for name, parameter, owner in self._by_group(changed=True):
            weight = self._from_owner(tensors.get(f"model.{name}"), parameter, owner)
            with GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(weight)
            if self._stage == 3:
                self._part(parameter).copy_(parameter.ds_tensor)
            for moment in MOMENTS:
                value = self._from_owner(tensors.get(f"optimizer.{moment}.{name}"), parameter, owner)
                self._set_moment(parameter, value, moment)
        if self._stage < 3:
            self._optimizer.refresh_fp32_params()
        set_step(self._optimizer.optimizer, self._flat, step - skipped)

    def _from_owner(self, tensor: Tensor | None, parameter: nn.Parameter, owner: int) -> Tensor:
        """What the data rank ``owner`` read, on every data rank."""
        value = parameter.new_empty(_shape(parameter)) if tensor is None else local(tensor).contiguous()
        group = self.block.data_group
        dist.broadcast(value, src=dist.get_global_rank(group, owner), group=group)
        return value

    def _by_group(self, *, changed: bool) -> Iterator[tuple[str, Any, int]]:
        """(name, parameter, its owner), group by group: of one group at a time the optimizer state is in memory."""
        named = [(self._group(p), name, p, owner) for (name, p), owner in zip(self.saved, self._owners, strict=True)]
        for group, members in groupby(sorted(named, key=itemgetter(0)), key=itemgetter(0)):
            with self._in_memory(group, changed=changed):
                for _, name, parameter, owner in members:
                    yield name, parameter, owner

    @contextmanager
    def _in_memory(self, group: int, *, changed: bool) -> Iterator[None]:
        """A group's weights and moments that lie on disk, in memory meanwhile; written back where they are changed."""
        on_disk = self._stage == 3 and self._optimizer._swappable_optimizer_subgroup(group)
        if on_disk:
            self._optimizer._optimizer_states_and_gradient_swap_in(group)
        yield
        if on_disk and changed:
            self._optimizer._optimizer_states_and_gradient_swap_out(group)
        elif on_disk:
            self._optimizer._release_swap_buffers(group)

    def _group(self, parameter: nn.Parameter) -> int:
        """Of stage 3, which part of the flat buffers the parameter lies in; stages 1 and 2 have all in memory."""
        if self._stage < 3:
            return 0
        return self._optimizer.grad_position[self._optimizer.get_param_id(parameter)][0]

    def _part(self, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
        """This data rank's part of what stage 3 keeps of a parameter, flat and in place: weights, or a moment."""
        group, start, size = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        flat = self._flat[group]
        kept = flat if moment is None else self._optimizer.optimizer.state[flat][moment]
        return kept.detach().narrow(0, start, size)

    def _gathered(self, parameter: Any, part: Tensor) -> Tensor:
        """The whole of which stage 3 gives each data rank a flat part, the last of them filled up."""
        return self._optimizer._fp32_state_allgather(parameter, part)

    def _moment(self, parameter: Any, moment: str) -> Tensor:
        if self._stage == 3:
            return self._gathered(parameter, self._part(parameter, moment))
        return safe_get_full_optimizer_state(parameter, moment)

    def _set_moment(self, parameter: Any, value: Tensor, moment: str) -> None:
        if self._stage < 3:
            safe_set_full_optimizer_state(parameter, value, moment)
            return
        part, rank = self._part(parameter, moment), self.block.coordinate.data
        own = value.flatten()[rank * part.numel() : (rank + 1) * part.numel()]
        part.zero_()[: own.numel()] = own  # the last rank's part is filled up

    def _own_gradient(self, parameter: Any) -> Tensor | None:
        """What this data rank holds of a reduced gradient, flat."""
        if self._stage == 3:
            return self._gradient_parts[parameter].to(self.block.device)
        fragment = parameter._hp_mapping
        return fragment.get_lp_grad_fragment(parameter._index_in_param_group) if fragment else None


class _Axes:
    """What DeepSpeed asks of the framework around it (Megatron's ``mpu``): groups, ranks and sizes of the axes.

    Its model-parallel group is all ranks that hold the same samples: pipeline x tensor.
    """

    def __init__(self, block: Block) -> None:
        layout, ranks = block.layout, torch.arange(block.layout.world_size)
        lines = ranks.view(layout.pipeline, layout.data, layout.tensor).transpose(0, 1).flatten(1).tolist()
        model, _ = dist.new_subgroups_by_enumeration(lines, timeout=block.timeout)
        groups = {
            "model_parallel": model,
            "tensor_model_parallel": block.mesh["tensor"].get_group(),
            "pipeline_model_parallel": block.mesh["pipeline"].get_group(),
            "data_parallel": block.data_group,
        }
        for axis, group in groups.items():
            setattr(self, f"get_{axis}_group", lambda group=group: group)
            setattr(self, f"get_{axis}_rank", lambda group=group: dist.get_rank(group))
            setattr(self, f"get_{axis}_world_size", lambda group=group: dist.get_world_size(group))


def _put(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """``tensor``, this tensor rank's part of what belongs to the parameter, in its place in the whole."""
    place = place_of(parameter)
    return place.put(tensor) if place else tensor


def _is_cut(parameter: nn.Parameter) -> bool:
    """Whether each tensor rank holds another part of it."""
    place = place_of(parameter)
    return place is not None and not place.is_replicated


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of this tensor rank's part, also where stage 3 has divided it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _share_out(sizes: Sequence[int], ranks: int) -> list[int]:
    """A rank for each size, so that all get about as much."""
    held, owners = [0] * ranks, []
    for size in sizes:
        owners.append(held.index(min(held)))
        held[owners[-1]] += size
    return owners
