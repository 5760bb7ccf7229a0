"""This rank's stages, the schedule that runs them, and how long each action took.

A thin layer over ``torch.distributed.pipelining``: `PipelineStage` gives every schedule the same four calls (forward,
backward, weight gradient, gradient reduction), which are timed here; sends and receives happen outside of them, so
that waiting for a neighbour is never counted as work. Collectives of the tensor and data axes happen inside of them
and are counted as work; only with interleaving torch gathers sharded parameters between two calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    get_schedule_class,
)

from cuboid.parallel.schedules import SCHEDULES, Action
from cuboid.parallel.whereabouts import Whereabouts

T = TypeVar("T")
Loss = Callable[..., Tensor]
Targets = Mapping[str, Tensor]

READY_KEPT = 4
"""So many lengths of sequence, the newest ones and each of steps or of evaluation, stay ready to run: each holds the
buffers of a step's messages. To make one ready again takes about a millisecond."""


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
    """Marks the start and the end of each action of one step, and tells both.

    On CPU a mark is the monotonic clock. On CUDA the host runs ahead of the device, so a mark is an event in the
    stream; all of them are read against one event that is recorded while the device is idle, which ties the device's
    clock to the host's.
    """

    def __init__(self, device: torch.device, whereabouts: Whereabouts) -> None:
        self.cuda = device.type == "cuda"
        self._whereabouts, self._evaluating = whereabouts, False
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
        self._whereabouts.at(kind, stage, microbatch, evaluating=self._evaluating)
        thread_seconds, start = time.thread_time(), self._mark()
        result = call()
        stop = self._mark()
        self._marks.append([kind, stage, microbatch, start, stop, time.thread_time() - thread_seconds])
        self._whereabouts.at(kind, stage, microbatch, over=True, evaluating=self._evaluating)
        return result

    def prolong(self, call: Callable[[], T]) -> T:
        """Run ``call`` as a part of the newest action: the loss belongs to the last stage's forward."""
        thread_seconds = time.thread_time()
        result = call()
        self._marks[-1][4] = self._mark()
        self._marks[-1][5] += time.thread_time() - thread_seconds
        return result

    @contextmanager
    def unnoticed(self) -> Iterator[None]:
        """Within: what runs is no part of the step."""
        marks, self._evaluating = len(self._marks), True
        try:
            yield
        finally:
            self._evaluating = False
            del self._marks[marks:]

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


class _Ready(NamedTuple):
    """What runs steps of one length: torch's stages and schedules know the sizes of all messages beforehand."""

    stages: list[TimedStage]
    schedule: PipelineScheduleSingle | PipelineScheduleMulti


class Pipeline:
    """This rank's stages, their schedule, and one step.

    Args:
        modules: stage number -> module, those of `schedules.stage_indices` for this rank. A module's forward is
            ``forward(x, *, <kwargs of step>)``: x is the token ids on the first stage and hidden states later; the last
            stage returns what ``loss`` takes. Modules may be wrapped by ``fully_shard`` or ``replicate``: gradients
            then pile up over the microbatches and are reduced once a step, in the action R. Parameters that need no
            gradient get none, on any stage.
        loss: ``loss(output, **targets) -> scalar`` of one microbatch, a sum (nothing is scaled here).
        group: the ranks of this pipeline, in the order of the pipeline axis; a group of 1 works too.
        boundary, logits: examples on ``meta`` of ONE microbatch: the hidden states [B, T_local, D] that travel between
            stages, and the last stage's output [B, T, ...]; token ids are int64 [B, T]. Shapes are static, so no
            microbatch runs twice to learn them. A step may be of another length: T_local follows in proportion.
        whereabouts: hears of every action when it begins and when it is over.

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
        whereabouts: Whereabouts,
    ) -> None:
        self.modules = dict(sorted(modules.items()))
        self.microbatches = microbatches
        self.rows = logits.shape[0] * microbatches
        """Sequences of a step."""
        self.num_stages = group.size() * len(modules)
        self.is_first, self.is_last = 0 in modules, self.num_stages - 1 in modules
        self.timer = Timer(_device(modules), whereabouts)
        self._kind = get_schedule_class(SCHEDULES[schedule].torch_name)
        self._group, self._loss, self._boundary, self._logits = group, loss, boundary, logits
        self._targets: Targets = {}
        """Of the step that runs."""
        self._ready: dict[tuple[int, bool], _Ready] = {}
        """By length and whether there is a backward: torch 2.11 cannot go from evaluation to steps."""
        self.entered_seconds = 0.0

    def step(self, input_ids: Tensor | None, targets: Targets | None, **kwargs: Tensor) -> Tensor | None:
        """Forward and backward of this data rank's whole share; gradients accumulate into ``.grad``.

        ``input_ids`` [microbatches * B, T] is needed on the first stage's rank and ``targets``, [microbatches * B, T,
        ...] each, on the last's, where the loss takes them; each of ``kwargs`` goes to every stage of every rank, split
        by its first dimension like the ids. T may be another in each step, the same on all ranks of the pipeline; what
        a rank is given tells it. Returns the sum of the
        microbatch losses in float32, detached, on the last stage's rank, and None elsewhere. When it returns, no
        activation is held.
        """
        self.entered_seconds = time.monotonic()
        self.timer.begin()
        return self._run(input_ids, targets, kwargs, backward=True)

    @torch.no_grad()
    def evaluate(self, input_ids: Tensor | None, targets: Targets | None, **kwargs: Tensor) -> Tensor | None:
        """`step` without a backward: the sum of the microbatch losses, and nothing else changes."""
        for module in self.modules.values():
            module.eval()
        try:
            with self.timer.unnoticed():
                return self._run(input_ids, targets, kwargs, backward=False)
        finally:
            for module in self.modules.values():
                module.train()

    def _run(
        self, input_ids: Tensor | None, targets: Targets | None, kwargs: Mapping[str, Tensor], *, backward: bool
    ) -> Tensor | None:
        self._targets = targets or {}
        length = self._length({"input_ids": input_ids, **self._targets, **kwargs})
        ready = self._ready_for(length, backward)
        losses: list[Tensor] = []
        call: Callable[..., Any] = ready.schedule.step if backward else ready.schedule.eval
        call(
            *([input_ids] if self.is_first else []),
            # torch splits one tensor into microbatches: the rows that `_timed_loss` takes of each target
            target=torch.arange(self.rows) if self.is_last else None,
            losses=losses,
            return_outputs=False,
            **kwargs,
        )
        for stage in ready.stages:
            stage.clear_runtime_states()
        self._targets = {}
        return torch.stack([loss.detach().float() for loss in losses]).sum() if self.is_last else None

    def _length(self, given: Mapping[str, Tensor | None]) -> int:
        """Tokens of a sequence of this step."""
        tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
        rows = {name: len(tensor) for name, tensor in tensors.items()}
        # gloo aborts the whole process when a message has another size than the one waited for
        assert set(rows.values()) == {self.rows}, f"a step has {self.rows} sequences, not {rows}"
        shapes = {name: tuple(tensor.shape[:2]) for name, tensor in tensors.items() if tensor.dim() > 1}
        (_, length), *others = set(shapes.values())
        assert not others, f"a step has sequences of one length, not {shapes}"
        ranks = self._logits.shape[1] // self._boundary.shape[1]
        assert length % ranks == 0, f"{length} tokens cannot be divided among {ranks} tensor ranks"
        return length

    def _ready_for(self, length: int, backward: bool) -> _Ready:
        """Every rank of a pipeline sees the same lengths, so that all make and drop theirs in the same step."""
        ready = self._ready.pop((length, backward), None) or self._make_ready(length)
        self._ready[length, backward] = ready
        if len(self._ready) > READY_KEPT:
            del self._ready[next(iter(self._ready))]  # the one not used for longest
        return ready

    def _make_ready(self, length: int) -> _Ready:
        local = self._boundary.shape[1] * length // self._logits.shape[1]
        logits = _of_length(self._logits, length)
        token_ids = torch.empty(logits.shape[:2], dtype=torch.int64, device="meta")
        # Torch leaves the hidden states that a stage receives without gradient unless the example asks for it; it must
        # also where all before is frozen, or a split backward would pass over weights of this stage in silence.
        boundary = _of_length(self._boundary, local).requires_grad_()
        stages = []
        for number, module in self.modules.items():
            stage = TimedStage(
                module,
                number,
                self.num_stages,
                _device(self.modules),
                input_args=token_ids if number == 0 else boundary,
                output_args=logits if number == self.num_stages - 1 else boundary,
                group=self._group,
            )
            stage.timer = self.timer
            stages.append(stage)
        of_rank = stages[0] if issubclass(self._kind, PipelineScheduleSingle) else stages
        schedule = self._kind(of_rank, n_microbatches=self.microbatches, loss_fn=self._timed_loss, scale_grads=False)
        return _Ready(stages, schedule)

    @property
    def times(self) -> list[ActionTime]:
        """Every action of the newest step, in the order in which this rank ran them."""
        return self.timer.read()

    def _timed_loss(self, output: Tensor, rows: Tensor) -> Tensor:
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        targets = {name: target[part] for name, target in self._targets.items()}
        return self.timer.prolong(lambda: self._loss(output, **targets))


def _of_length(example: Tensor, length: int) -> Tensor:
    batch, _, *rest = example.shape
    return torch.empty(batch, length, *rest, dtype=example.dtype, device="meta")


def _device(modules: Mapping[int, nn.Module]) -> torch.device:
    return next(
        (parameter.device for module in modules.values() for parameter in module.parameters()), torch.device("cpu")
    )
