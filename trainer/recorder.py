"""What a run says of itself: metrics.jsonl, events.jsonl, timeline pictures and the tracker, all written by rank 0."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cuboid.parallel.loss import perplexity
from cuboid.parallel.mesh import Block
from cuboid.parallel.pipeline import Pipeline
from cuboid.parallel.schedules import stage_indices
from cuboid.trainer.check_mesh import virtual_stages
from cuboid.trainer.engine import Evaluation, StepResult
from cuboid.trainer.memory import peak_bytes
from cuboid.trainer.metrics import BubbleMeter, Measurement
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.runlog import RunLog, read_events
from cuboid.trainer.stragglers import Stragglers, microbatch_seconds
from cuboid.trainer.timeline import import_matplotlib, write_timeline
from cuboid.trainer.track import Tracker, open_tracker

_ROUNDED = ("eval_loss_full", "eval_loss_rounded")


class Recorder:
    """Every rank makes one and calls the same methods; what is written is written by rank 0."""

    def __init__(self, recipe: Recipe, folder: Path, block: Block) -> None:
        self.recipe, self.folder, self.block = recipe, folder, block
        self.log = RunLog(folder)
        self.tracker: Tracker | None = None
        self._meter = BubbleMeter(
            block,
            schedule=recipe.parallel.schedule,
            virtual_stages=virtual_stages(recipe),
            microbatches=recipe.parallel.microbatches,
        )
        is_cpu = block.device.type == "cpu"
        self._clocks = {
            **({} if is_cpu and self._meter.contended else {"wall": Stragglers(block.layout, meets=True)}),
            **({"processor": Stragglers(block.layout, meets=False)} if is_cpu else {}),
        }
        self._phases: dict[str, float] = {}
        self._last = time.monotonic()

    @property
    def run_id(self) -> str | None:
        """The tracker's run, on rank 0."""
        return self.tracker.run_id if self.tracker else None

    def event(self, kind: str, /, **fields: Any) -> None:
        """Write an event from this rank alone; a finished checkpoint goes to the tracker too.

        ``rank`` is this one, unless the event is about another: the one that could not write its part of a checkpoint.
        """
        self.log.event(kind, **{"rank": self.block.rank, **fields})
        if kind == "checkpoint" and self.tracker is not None:
            self.tracker.checkpoint(Path(fields["path"]), fields["step"])

    def phase(self, name: str) -> None:
        """Note what the time since the phase before went into; told by the start event."""
        now = time.monotonic()
        self._phases[name] = round(now - self._last, 3)
        self._last = now

    def open(self, *, step: int, run_id: str | None) -> None:
        """Begin the record of a run that stands at ``step``; later steps of an earlier attempt are cut off."""
        if self.block.rank == 0:
            self.log.truncate(step)
            if self.recipe.track.timeline_every:
                import_matplotlib()  # not in the first step that is drawn: the step's time would tell of it
            self.tracker = open_tracker(
                self.recipe.track,
                run_id=run_id,
                name=self.recipe.name,
                recipe=self.recipe.model_dump(mode="json"),
                folder=self.folder,
            )
        self.phase("tracker")

    def rewound(self, step: int) -> None:
        """The run went back to ``step``: later ones are cut off, so that each step stands once."""
        if self.block.rank == 0:
            self.log.truncate(step)
        self._last = time.monotonic()

    def started(self, step: int, **facts: Any) -> None:
        """Tell where every rank runs, what was chosen, and what the start cost."""
        places: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
        dist.all_gather_object(places, (socket.gethostname(), os.getpid()))
        if self.block.rank == 0:
            ranks = {str(rank): {"host": host, "pid": pid} for rank, (host, pid) in enumerate(places)}
            self.event("start", step=step, layout=str(self.block.layout), ranks=ranks, phases=self._phases, **facts)
        self._last = time.monotonic()

    def by_rank(self, pipeline: Pipeline) -> list[float]:
        """Zeros, with this rank's numbers in its own places: summed over ranks, those of each. First of all ranks the
        peak of memory, then the wall seconds of a microbatch in the step before, then its processor seconds."""
        own = (peak_bytes(self.block.device), *microbatch_seconds(pipeline.times))
        ranks = range(self.block.layout.world_size)
        return [float(number) if rank == self.block.rank else 0.0 for number in own for rank in ranks]

    def step(
        self,
        step: int,
        result: StepResult,
        *,
        learning_rate: float,
        by_rank: Sequence[float],
        pipeline: Pipeline,
        evaluation: Callable[[], Evaluation] | None,
        skipped: str | None,
    ) -> float | None:
        """Write the record of a completed step; the loss of its evaluation, the same on every rank, where it has one.

        ``by_rank`` is what the method of that name gave, summed over ranks; ``evaluation`` is of held-out text, and is
        called by every rank when the step has been measured; ``skipped`` says why the step updated nothing.
        """
        self.block.whereabouts.begin("record")
        measured = self._meter.measure(pipeline)
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        loss, evaluated = None, {}
        if evaluation is not None:
            found = evaluation()
            self._last = time.monotonic()
            loss, evaluated = found.loss, {**_of_held_out(found), "eval_seconds": self._last - now}
        if measured is None:
            return loss
        ranks = self.block.layout.world_size
        self._tell_slow_ranks(step - 1, by_rank[ranks:])
        tokens = self.recipe.train.global_batch * self.recipe.data.sequence_length
        record = {
            "step": step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": learning_rate,
            **({"skipped": skipped} if skipped else {}),
            "tokens": step * tokens,
            "tokens_predicted": result.tokens,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "memory_peak_bytes": int(max(by_rank[:ranks])),
            **measured.bubble.record(),
            **(result.measures.record() if result.measures else {}),
            **(result.preferences.record() if result.preferences else {}),
            **evaluated,
        }
        self.log.metrics(record)
        assert self.tracker is not None
        if step % self.recipe.train.log_every == 0:
            self.tracker.log(step, record)
        if self._timeline_is_due(step):
            self._draw(step, measured)
        return loss

    def _tell_slow_ranks(self, step: int, seconds: Sequence[float]) -> None:
        ranks, schedule = self.block.layout.world_size, self.recipe.parallel.schedule
        by_clock = {"wall": seconds[:ranks], "processor": seconds[ranks:]}
        for clock, stragglers in self._clocks.items():
            for rank, factor in stragglers.judge(by_clock[clock]).items():
                place = self.block.layout.coordinate(rank).pipeline
                sizes = {"pipeline": self.block.layout.pipeline, "virtual_stages": virtual_stages(self.recipe)}
                stages = stage_indices(schedule, rank=place, **sizes)
                self.event("slow_rank", rank=rank, step=step, stages=stages, factor=round(factor, 2), clock=clock)

    def evaluated_first(self, found: Evaluation) -> None:
        """Tell the held-out loss before the first step."""
        if self.block.rank == 0:
            self.event("evaluation", step=0, **_of_held_out(found))
        self._last = time.monotonic()

    def rounded(self, step: int, *, learned: bool, **facts: Any) -> None:
        """Tell the held-out loss in full precision and rounded, after ``step``; once rounding is ``learned``, beside
        that of rounding after training, which was told before the first step with it."""
        if self.block.rank == 0:
            earlier = [event for event in read_events(self.folder) if event["kind"] == "quantize"]
            untrained = next((event for event in reversed(earlier) if learned and not event["learned"]), None)
            after_training = {name: untrained[name] for name in ("step", *_ROUNDED)} if untrained else None
            self.event("quantize", step=step, learned=learned, after_training=after_training, **facts)
        self._last = time.monotonic()

    def stopped(self, step: int, reason: str | None) -> None:
        """Tell that the run ended in order: done, or asked to stop."""
        if self.block.rank == 0:
            self.event("stop", step=step, reason=reason or "done")

    def close(self) -> None:
        if self.tracker is not None:
            self.tracker.close(failed=sys.exc_info()[0] is not None)
        self.log.close()

    def _timeline_is_due(self, step: int) -> bool:
        every = self.recipe.track.timeline_every
        return every > 0 and (step in (2, self.recipe.train.steps) or step % every == 0)

    def _draw(self, step: int, measured: Measurement) -> None:
        try:
            picture = write_timeline(self.folder / "timeline", step, measured)
        except OSError as error:  # a full disk costs a picture, not the run
            self.event("timeline_failed", step=step, cause=str(error))
            return
        if picture is not None and self.tracker is not None:
            self.tracker.image("timeline", picture)


def _of_held_out(found: Evaluation) -> dict[str, float]:
    """The fields of an evaluation; a loss of pairs is no mean over tokens and has no perplexity."""
    record = {"eval_loss": found.loss, "eval_tokens": found.tokens}
    if found.preferences is None:
        return record | {"eval_perplexity": perplexity(found.loss)}
    return record | {f"eval_{name}": value for name, value in found.preferences.record().items()}
