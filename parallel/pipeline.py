"""This rank's stages, the schedule that runs them, and how long each action took.

A thin layer over ``torch.distributed.pipelining``: `PipelineStage` gives every schedule the same four calls (forward,
backward, weight gradient, gradient reduction), which are timed here; sends and receives happen outside of them, so
that waiting for a neighbour is never counted as work. Collectives of the tensor and data axes happen inside of them
and are counted as work; only with interleaving torch gathers sharded parameters between two calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from cuboid.parallel.schedules import SCHEDULES, Action

T = TypeVar("T")
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class ActionTime:
    """When one action ran: ``start_seconds`` and ``stop_seconds`` on this host's monotonic clock, and the processor
    time that the thread which ran it used meanwhile (less than the wall time where ranks share a core)."""

    kind: str
    stage: int
    microbatch: int
    start_seconds: float
    stop_seconds: float
    thread_seconds: float
    held: bool = False
    """As in `Action`; known once the order of the schedule is."""

    @property
    def seconds(self) -> float:
        return self.stop_seconds - self.start_seconds

    @property
    def action(self) -> Action:
        return Action(self.kind, self.stage, self.microbatch, self.held)


class Timer:
    """Marks the start and the end of each action of one step.

    On CPU a mark is the monotonic clock. On CUDA the host runs ahead of the device, so a mark is an event in the
    stream; all of them are read against one event that is recorded while the device is idle, which ties the device's
    clock to the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._marks: list[list[Any]] = []
        self._origin: Any = None
        self._origin_seconds = 0.0

    def begin(self) -> None:
        """Forget the last step; on CUDA, wait until the device is idle (once a step) and set the clock's origin."""
        self._marks.clear()
        if self.cuda:
            torch.cuda.synchronize()
            self._origin_seconds, self._origin = time.monotonic(), self._mark()

    def time(self, kind: str, stage: int, microbatch: int, call: Callable[[], T]) -> T:
        """Run ``call`` as the action ``kind`` of ``stage`` on ``microbatch``."""
        thread_seconds, start = time.thread_time(), self._mark()
        result = call()
        stop = self._mark()
        self._marks.append([kind, stage, microbatch, start, stop, time.thread_time() - thread_seconds])
        return result

    def prolong(self, call: Callable[[], T]) -> T:
        """Run ``call`` as a part of the newest action: the loss belongs to the last stage's forward."""
        thread_seconds = time.thread_time()
        result = call()
        self._marks[-1][4] = self._mark()
        self._marks[-1][5] += time.thread_time() - thread_seconds
        return result

    def read(self) -> list[ActionTime]:
        """The times of the step that `begin` began, in the order in which they ran; waits for the device on CUDA."""
        if self.cuda and self._marks:
            torch.cuda.synchronize()
        return [
            ActionTime(kind, stage, microbatch, self._seconds(start), self._seconds(stop), thread_seconds)
            for kind, stage, microbatch, start, stop, thread_seconds in self._marks
        ]

    def _mark(self) -> Any:
        if not self.cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, mark: Any) -> float:
        return self._origin_seconds + self._origin.elapsed_time(mark) / 1e3 if self.cuda else mark


class TimedStage(PipelineStage):
    """A `PipelineStage` that times what it computes."""

    timer: Timer

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        call = super().forward_one_chunk
        return self.timer.time("F", self.stage_index, fwd_chunk_id, lambda: call(fwd_chunk_id, *args, **kwargs))

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        call = super().backward_one_chunk
        kind = "B" if full_backward else "I"
        self.timer.time(
            kind,
            self.stage_index,
            bwd_chunk_id,
            lambda: call(bwd_chunk_id, loss=loss, full_backward=full_backward, last_backward=last_backward),
        )

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        call = super().backward_weight_one_chunk
        self.timer.time("W", self.stage_index, bwd_chunk_id, lambda: call(bwd_chunk_id, last_backward=last_backward))

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        call = super().perform_reduce_grad
        self.timer.time("R", self.stage_index, -1, lambda: call(grad_scale_factor))

    # In a V neighbouring stages of one rank hand gradients over by these; torch's assert that there is a backward.

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)


class Pipeline:
    """This rank's stages, their schedule, and one step.

    Args:
        modules: stage number -> module, those of `schedules.stage_indices` for this rank. A module's forward is
            ``forward(x, *, <kwargs of step>)``: x is the token ids on the first stage and hidden states later; the last
            stage returns what ``loss`` takes. Modules may be wrapped by ``fully_shard`` or ``replicate``: gradients
            then pile up over the microbatches and are reduced once a step, in the action R.
        loss: ``loss(output, targets) -> scalar`` of one microbatch, a sum (nothing is scaled here).
        group: the ranks of this pipeline, in the order of the pipeline axis; a group of 1 works too.
        boundary, logits: examples on ``meta`` of ONE microbatch: the hidden states [B, T_local, D] that travel between
            stages, and the last stage's output [B, T, ...]; token ids are int64 [B, T]. Shapes are static, so no
            microbatch runs twice to learn them; other shapes need another `Pipeline`.

    The number of stages is that of ``modules`` times the ranks of ``group``.
    """

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        *,
        schedule: str,
        microbatches: int,
        group: ProcessGroup,
        loss: Loss,
        boundary: Tensor,
        logits: Tensor,
    ) -> None:
        self.microbatches = microbatches
        self.num_stages = group.size() * len(modules)
        self.is_first, self.is_last = 0 in modules, self.num_stages - 1 in modules
        self.timer = Timer(_device(modules))
        self._shape = (logits.shape[0] * microbatches, logits.shape[1])
        self._loss = loss
        token_ids = torch.empty(logits.shape[:2], dtype=torch.int64, device="meta")
        # Torch leaves the hidden states that a stage receives without gradient unless the example asks for it.
        boundary = torch.empty_like(boundary, device="meta").requires_grad_()
        self._stages = []
        for number, module in sorted(modules.items()):
            stage = TimedStage(
                module,
                number,
                self.num_stages,
                _device(modules),
                input_args=token_ids if number == 0 else boundary,
                output_args=logits if number == self.num_stages - 1 else boundary,
                group=group,
            )
            stage.timer = self.timer
            self._stages.append(stage)
        kind = get_schedule_class(SCHEDULES[schedule].torch_name)
        stages = self._stages[0] if issubclass(kind, PipelineScheduleSingle) else self._stages
        self._schedule = kind(stages, n_microbatches=microbatches, loss_fn=self._timed_loss, scale_grads=False)
        self.entered_seconds = 0.0

    def step(self, input_ids: Tensor | None, targets: Tensor | None, **kwargs: Tensor) -> Tensor | None:
        """Forward and backward of this data rank's whole share; gradients accumulate into ``.grad``.

        ``input_ids`` [microbatches * B, T] is needed on the first stage's rank and ``targets`` on the last's; each of
        ``kwargs`` goes to every stage of every rank, split by its first dimension like the ids. Returns the sum of the
        microbatch losses in float32, detached, on the last stage's rank, and None elsewhere. When it returns, no
        activation is held.
        """
        self.entered_seconds = time.monotonic()
        self.timer.begin()
        return self._run(self._schedule.step, input_ids, targets, kwargs)

    @torch.no_grad()
    def evaluate(self, input_ids: Tensor | None, targets: Tensor | None, **kwargs: Tensor) -> Tensor | None:
        """`step` without a backward: the sum of the microbatch losses, and nothing else changes."""
        for stage in self._stages:
            stage.submod.eval()
        try:
            return self._run(self._schedule.eval, input_ids, targets, kwargs)
        finally:
            for stage in self._stages:
                stage.submod.train()

    def _run(
        self,
        call: Callable[..., Any],
        input_ids: Tensor | None,
        targets: Tensor | None,
        kwargs: Mapping[str, Tensor],
    ) -> Tensor | None:
        for name, tensor in {"input_ids": input_ids, "targets": targets, **kwargs}.items():
            # gloo aborts the whole process when a message has another size than the one waited for
            if tensor is not None:
                expected = self._shape[: tensor.dim()]
                assert tensor.shape == expected, f"{name} is {tuple(tensor.shape)}, not {expected}"
        losses: list[Tensor] = []
        call(
            *([input_ids] if self.is_first else []),
            target=targets if self.is_last else None,
            losses=losses,
            return_outputs=False,
            **kwargs,
        )
        for stage in self._stages:
            stage.clear_runtime_states()
        return torch.stack([loss.detach().float() for loss in losses]).sum() if self.is_last else None

    @property
    def times(self) -> list[ActionTime]:
        """Every action of the newest step, in the order in which this rank ran them."""
        return self.timer.read()

    def _timed_loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return self.timer.prolong(lambda: self._loss(output, targets))


def _device(modules: Mapping[int, nn.Module]) -> torch.device:
    return next(
        (parameter.device for module in modules.values() for parameter in module.parameters()), torch.device("cpu")
    )
