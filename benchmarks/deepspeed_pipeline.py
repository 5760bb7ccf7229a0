"""DeepSpeed's own pipeline, `PipelineEngine` over a `PipelineModule`, on the stages of the bare loop: a peer of 1F1B.

Its `TrainSchedule` is 1F1B. Each stage is one module of the `PipelineModule`, so that masks and rotary tables are made
once a stage, as elsewhere. The optimizer is torch's fused AdamW, as cuboid's; nothing is compiled.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is first imported

import deepspeed
import torch
import torch.nn.functional as F
from bare_loop import Part
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.utils import clip_grad_norm_
from step_speed import Step, cuboid, fed, whole_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from cuboid.parallel.loss import IGNORE
from cuboid.parallel.mesh import Block, connect
from cuboid.trainer.optimizer import make_adamw
from cuboid.trainer.recipe import Recipe


class PipedPart(nn.Module):
    """A stage that takes one tuple and returns one: what DeepSpeed sends along the pipeline."""

    def __init__(self, model: LlamaForCausalLM, stage: int, stages: int) -> None:
        super().__init__()
        self.part = Part(model, stage, stages)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        x, position_ids = inputs
        output = self.part(x, position_ids=position_ids)
        return output if self.part.last else (output, position_ids)


class DeepSpeedPipeline:
    """``step(ids, labels, positions) -> (loss, gradient norm)``, both the same on every rank.

    DeepSpeed adds the norm up over the ranks of a pipeline, but a rank other than the first counts only parameters that
    are marked ``model_parallel``: as it comes, it clips every stage by the norm of stage 0 alone.

    Args:
        every_stage: mark all parameters, so that it clips by the norm over all stages.
    """

    def __init__(self, model: LlamaForCausalLM, recipe: Recipe, *, every_stage: bool = True) -> None:
        plan, stages = recipe.batch_plan, recipe.parallel.pipeline
        self.microbatches, self.tokens, self.norm = plan.microbatches, 1, 0.0
        deepspeed.ops.__compatible_ops__ = {}  # or an operator is compiled, for inference alone
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        with redirect_stdout(io.StringIO()):  # its topology
            deepspeed.init_distributed(dist_init_required=False)
            specs = [LayerSpec(PipedPart, model, stage, stages) for stage in range(stages)]
            module = PipelineModule(specs, num_stages=stages, partition_method="uniform", loss_fn=self._loss)
            self.engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=make_adamw(list(module.named_parameters()), recipe.optimizer),
                config={
                    "train_micro_batch_size_per_gpu": plan.microbatch_size,
                    "gradient_accumulation_steps": plan.microbatches,
                    "gradient_clipping": recipe.optimizer.clip_grad_norm,
                    "steps_per_print": 10**9,
                },
                dist_init_required=False,
            )
        module._layer_specs.clear()  # they hold the whole model
        self.parameters = list(module.parameters())
        for parameter in self.parameters:
            parameter.model_parallel = every_stage  # type: ignore[attr-defined]
        self.engine.clip_fp32_gradients = self._clip  # the same call, whose result DeepSpeed throws away

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """DeepSpeed takes the mean over microbatches."""
        summed = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return summed * self.microbatches / self.tokens

    def _clip(self) -> None:
        limit = self.engine.gradient_clipping()
        self.norm = float(clip_grad_norm_(self.parameters, max_norm=limit, mpu=self.engine.mpu))

    def step(self, ids: Tensor, labels: Tensor, positions: Tensor) -> tuple[float, float]:
        self.tokens = int((labels != IGNORE).sum())
        chunks = (tensor.chunk(self.microbatches) for tensor in (ids, positions, labels))
        batch = (((x, where), y) for x, where, y in zip(*chunks, strict=True))
        return float(self.engine.train_batch(batch)), self.norm


@contextmanager
def deepspeed_pipeline(recipe: Recipe, block: Block) -> Iterator[Step]:
    yield fed(DeepSpeedPipeline(whole_model(recipe), recipe).step, recipe, block)


def norms_as_it_comes(recipe: Recipe) -> tuple[float, float]:
    """In every rank, of the first step: (the norm of this stage's gradient, the norm by which DeepSpeed clips)."""
    own = []
    with connect(recipe.layout, timeout_seconds=120) as block:
        loop = DeepSpeedPipeline(whole_model(recipe), recipe, every_stage=False)
        clip = loop.engine.clip_fp32_gradients

        def look_and_clip() -> None:
            own.append(float(torch.nn.utils.get_total_norm([parameter.grad for parameter in loop.parameters])))
            clip()

        loop.engine.clip_fp32_gradients = look_and_clip
        fed(loop.step, recipe, block)(1)
    return own[0], loop.norm


def zero(recipe: Recipe, block: Block) -> AbstractContextManager[Step]:
    """The product with its other engine, ZeRO 1."""
    settings = recipe.parallel.model_copy(update={"engine": "deepspeed", "zero_stage": 1})
    return cuboid(recipe.model_copy(update={"parallel": settings}), block)
