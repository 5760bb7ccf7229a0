"""A hand-written loop on torch alone: what a careful engineer writes for one mesh without cuboid. The benchmark's peer.

Stock parallel styles, FSDP2, torch's pipeline schedules, AdamW and clipping; no recipe, no records, no measured bubble.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from transformers import LlamaForCausalLM
from transformers.masking_utils import create_causal_mask


class Part(nn.Module):
    """The layers of one stage."""

    def __init__(self, model: LlamaForCausalLM, stage: int, stages: int) -> None:
        super().__init__()
        self.config, self.first, self.last = model.config, stage == 0, stage == stages - 1
        share = model.config.num_hidden_layers // stages
        self.embed_tokens = model.model.embed_tokens if self.first else None
        self.layers = model.model.layers[stage * share : (stage + 1) * share]
        self.rotary_emb = model.model.rotary_emb
        self.norm = model.model.norm if self.last else None
        self.lm_head = model.lm_head if self.last else None

    def forward(self, x: Tensor, *, position_ids: Tensor) -> Tensor:
        hidden = self.embed_tokens(x) if self.first else x
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=torch.empty(*position_ids.shape, 0),
            attention_mask=None,
            past_key_values=None,
            position_ids=position_ids,
        )
        rotary = self.rotary_emb(hidden, position_ids=position_ids)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, position_ids=position_ids, position_embeddings=rotary)
        return self.lm_head(self.norm(hidden)) if self.last else hidden


def divide(part: Part, mesh: DeviceMesh) -> None:
    """Stock tensor and sequence parallelism with the vocabulary divided."""
    tokens = Shard(1)
    plan: dict[str, Any] = {}
    if part.first:
        plan["embed_tokens"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=tokens)
    for index in range(len(part.layers)):
        layer = f"layers.{index}"
        plan |= {
            f"{layer}.input_layernorm": SequenceParallel(),
            f"{layer}.post_attention_layernorm": SequenceParallel(),
            f"{layer}.self_attn": PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": tokens},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
            ),
            f"{layer}.mlp": PrepareModuleInput(input_layouts=(tokens,), desired_input_layouts=(Replicate(),)),
            **{f"{layer}.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
            f"{layer}.self_attn.o_proj": RowwiseParallel(output_layouts=tokens),
            f"{layer}.mlp.gate_proj": ColwiseParallel(),
            f"{layer}.mlp.up_proj": ColwiseParallel(),
            f"{layer}.mlp.down_proj": RowwiseParallel(output_layouts=tokens),
        }
    if part.last:
        plan["norm"] = SequenceParallel()
        plan["lm_head"] = ColwiseParallel(input_layouts=tokens, output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(part, mesh, plan)


def shard(part: Part, mesh: DeviceMesh, *, reshard: bool) -> None:
    """FSDP2, layer by layer; gradients are summed."""
    for module in (*part.layers, part):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    for module in part.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def stages_of(schedule: str, rank: int, ranks: int) -> tuple[list[int], int]:
    """The stages of a pipeline rank under torch's schedule of this name, and how many there are in all."""
    if schedule in ("GPipe", "1F1B"):
        return [rank], ranks
    if schedule in ("ZBVZeroBubble", "DualPipeV"):
        return [rank, 2 * ranks - 1 - rank], 2 * ranks
    return [rank, rank + ranks], 2 * ranks


class BareLoop:
    """``step(ids, labels, positions) -> (loss on the last stage, global gradient norm)``; tensors of this data rank."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        mesh: DeviceMesh,
        *,
        microbatches: int,
        shape: tuple[int, int],
        schedule: str = "1F1B",
    ) -> None:
        self.mesh, self.microbatches = mesh, microbatches
        pipeline, tensor = mesh["pipeline"], mesh["tensor"]
        numbers, stages = stages_of(schedule, pipeline.get_local_rank(), pipeline.size())
        self.parts = {number: Part(model, number, stages) for number in numbers}
        for part in self.parts.values():
            if tensor.size() > 1:
                divide(part, tensor)
            if mesh["data"].size() > 1:
                shard(part, mesh["data"], reshard=pipeline.size() == 1)
        self.first, self.last = 0 in numbers, stages - 1 in numbers
        self.schedule = self._schedule(schedule, stages, model.config, shape) if pipeline.size() > 1 else None
        self.parameters = [parameter for part in self.parts.values() for parameter in part.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
        self.tokens = 1

    def _schedule(self, name: str, num_stages: int, config: Any, shape: tuple[int, int]) -> Any:
        batch, length = shape
        local = length // self.mesh["tensor"].size()
        hidden = torch.empty(batch, local, config.hidden_size, device="meta", requires_grad=True)
        ids = torch.empty(batch, length, dtype=torch.int64, device="meta")
        logits = torch.empty(batch, length, config.vocab_size, device="meta")
        stages = [
            PipelineStage(
                part,
                number,
                num_stages,
                torch.device("cpu"),
                input_args=ids if part.first else hidden,
                output_args=logits if part.last else hidden,
                group=self.mesh["pipeline"].get_group(),
            )
            for number, part in self.parts.items()
        ]
        kind = get_schedule_class(name)
        of_rank = stages[0] if issubclass(kind, PipelineScheduleSingle) else stages
        return kind(of_rank, self.microbatches, loss_fn=self._loss, scale_grads=False)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / self.tokens

    def step(self, ids: Tensor, labels: Tensor, positions: Tensor) -> tuple[float | None, float]:
        count = (labels != -100).sum()
        dist.all_reduce(count, group=self.mesh["data"].get_group())
        self.tokens = int(count)
        losses: list[Tensor] = []
        with loss_parallel() if self.mesh["tensor"].size() > 1 else nullcontext():
            if self.schedule is not None:
                self.schedule.step(
                    *((ids,) if self.first else ()),
                    target=labels if self.last else None,
                    losses=losses,
                    return_outputs=False,
                    position_ids=positions,
                )
            else:
                self._accumulate(ids, labels, positions, losses)
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.last:
            return None, norm
        loss = torch.stack([_full(loss.detach()) for loss in losses]).sum()
        dist.all_reduce(loss, group=self.mesh["data"].get_group())
        return loss.item(), norm

    def _accumulate(self, ids: Tensor, labels: Tensor, positions: Tensor, losses: list[Tensor]) -> None:
        (part,) = self.parts.values()
        chunks = zip(*(tensor.chunk(self.microbatches) for tensor in (ids, labels, positions)), strict=True)
        for index, (x, y, where) in enumerate(chunks):
            if isinstance(part, FSDPModule):
                last = index == self.microbatches - 1
                part.set_is_last_backward(last)
                part.set_requires_gradient_sync(last)
            loss = self._loss(part(x, position_ids=where), y)
            loss.backward()
            losses.append(loss)

    def _clip(self) -> float:
        for parameter in self.parameters:
            grad = parameter.grad
            if isinstance(grad, DTensor) and grad.placements != parameter.placements:
                parameter.grad = grad.redistribute(placements=parameter.placements)
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in self.parameters])
        squared = _full(norm) ** 2
        dist.all_reduce(squared, group=self.mesh["pipeline"].get_group())
        total = squared.sqrt()
        torch.nn.utils.clip_grads_with_norm_(self.parameters, 1.0, total)
        return total.item()


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
