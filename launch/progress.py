"""What the user sees of a run: a bar on a terminal, plain lines elsewhere, fed by the run's own logs. A rich door.

Nothing here knows the launcher or the ranks; the run's folder tells all.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cuboid.launch.failures import Ending
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.runlog import Tail, read_events, read_metrics

_WAITING = {
    "cluster": "starting the ranks",
    "imports": "starting the ranks",
    "workers": "building the model",
    "start": "first step",
}
"""What is under way once a phase is over."""

_SMOOTHED_STEPS = 20
_SHOWN_WAITS = 4


class Screen:
    """Follows a run's folder and shows it; ``quiet`` shows failures alone. Metrics of an earlier launch are not shown
    again."""

    def __init__(self, recipe: Recipe, folder: Path, *, quiet: bool = False) -> None:
        self.folder, self._steps, self._every = folder, recipe.train.steps, recipe.train.log_every
        self._tail = Tail(folder, from_start=False)
        self._console = Console(highlight=False, quiet=quiet)
        self._bar: Progress | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=_SMOOTHED_STEPS)
        self.steps_done = 0
        """Steps recorded since this launch."""

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[words]}"),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._bar.add_task("step", total=self._steps, words="starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._tail.close()

    def say(self, line: str) -> None:
        """One line above the bar."""
        self._console.print(line, markup=False, soft_wrap=True)

    def update(self) -> None:
        """Show what was logged since the last call."""
        records, events = self._tail.poll()
        for event in events:
            line = told(event)
            if line:
                self.say(line)
            if self._bar is not None and self.steps_done == 0:
                words = _WAITING.get(event.get("name", event["kind"]))
                self._bar.update(self._bar.task_ids[0], words=words) if words else None
        for record in records:
            self.steps_done += 1
            self._step(record)

    def _step(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        self._recent.append((time.monotonic(), step))
        words = _metrics_words(record, self._eta(step))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, words=escape(words))
        elif step % self._every == 0 or step == self._steps:
            self.say(f"step {step}/{self._steps}  {words}")

    def _eta(self, step: int) -> float | None:
        """Seconds to the last step, at the pace of the newest steps."""
        (began, first), (now, _) = self._recent[0], self._recent[-1]
        return (now - began) / (step - first) * (self._steps - step) if step > first else None

    def conclude(self, ending: Ending) -> None:
        """The last words: what was reached, or why the run ended otherwise."""
        if ending.code:
            sys.stdout.flush()
            Console(stderr=True, highlight=False).print(f"cuboid: {ending.words}", markup=False, soft_wrap=True)
            return
        records = read_metrics(self.folder)
        first = [event for event in read_events(self.folder) if event["kind"] == "evaluation"]
        changes = ""
        for words, name, found in (("loss", "loss", records), ("held-out loss", "eval_loss", [*first, *records])):
            losses = [record[name] for record in found if isinstance(record.get(name), float)]
            changes += f", {words} {losses[0]:.4g} -> {losses[-1]:.4g}" if losses else ""
        self.say(f"done: {self._steps} steps{changes}")


def told(event: Mapping[str, Any]) -> str | None:
    """An event in a line for the screen; None for those that a user need not see as they come."""
    kind = event["kind"]
    if kind in ("memory", "skip", "rewind") or (kind == "failure" and event["restart"]):
        return event["words"]
    if kind == "hang":
        return f"no rank moves in step {event['step']}: {'; '.join(event['waits'][:_SHOWN_WAITS])}"
    if kind == "slow_rank":
        stages = ", ".join(map(str, event["stages"]))
        return f"rank {event['rank']} (stage {stages}) takes {event['factor']:.1f} times as long as the others"
    if kind == "data" and event["left_out"]:
        return f"{event['part']} data: {event['left_out']}"
    if kind == "start" and event.get("step"):
        return f"going on after step {event['step']}"
    if kind == "seated":
        return f"{event['data']} data ranks find room ({event['asked']} asked for); the cluster has {event['cluster']}"
    if kind == "shrink":
        return f"microbatches of {event['too_large']} took too much memory: now {event['microbatch_size']}"
    if kind == "evaluation":
        return f"held-out loss before training {_held_out_words(event)}"
    if kind == "prune" and "eval_loss_after" in event:
        losses = f"held-out loss {event['eval_loss_before']:.4f} -> {event['eval_loss_after']:.4f}"
        return f"pruned {event['zeros']:.1%} ({event['method']}) before step {event['step']}: {losses}"
    if kind == "quantize":
        return _rounded_words(event)
    if kind == "adapter":
        return _adapter_words(event)
    if kind == "checkpoint_refused":
        return f"{event['path']} is refused: {'; '.join(event['faults'][:3])}; trying the one before it"
    if kind.endswith("_failed") or kind == "checkpoint_not_removed":
        return f"{kind.replace('_', ' ')}: {event.get('cause')}"
    return None


def _rounded_words(event: Mapping[str, Any]) -> str:
    """int4, held-out loss: 2.6770 in full precision, 2.9249 rounded (PTQ), both after step 29; ..."""
    parts = []
    if untrained := event["after_training"] if event["learned"] else event:
        full, rounded = untrained["eval_loss_full"], untrained["eval_loss_rounded"]
        parts += [f"{full:.4f} in full precision, {rounded:.4f} rounded (PTQ), both after step {untrained['step']}"]
    if event["learned"]:
        parts += [f"{event['eval_loss_rounded']:.4f} trained with rounding (QAT), after step {event['step']}"]
    return f"{event['scheme']}, held-out loss: {'; '.join(parts)}"


def _adapter_words(event: Mapping[str, Any]) -> str:
    """trains 4.9 M of 139.4 M parameters (3.5 %): down_proj 1.0 M, ..."""

    def short(count: int) -> str:
        if count < 1e3:
            return str(count)
        return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count / 1e3:,.1f} k"

    share = event["trained"] / event["parameters"]
    modules = ", ".join(f"{name} {short(count)}" for name, count in event["by_module"].items())
    line = f"trains {short(event['trained'])} of {short(event['parameters'])} parameters ({share:.1%}): {modules}"
    return line + ("; the experts stay frozen" if event["frozen_experts"] else "")


def start_phases(folder: Path) -> dict[str, float]:
    """Seconds of each phase from the newest launch's command to its first step, in the order they ended.

    ``driver``: from the command to the launcher; ``cluster``: the launcher's own process and Ray; ``imports`` of the
    model code and ``workers``, the ranks' processes (forked after the imports, or importing each for itself);
    ``groups``: the ranks find one another; then what the start event tells (model, checkpoint, ...), and the
    ``first step``.
    """
    events = read_events(folder)
    newest = max((index for index, event in enumerate(events) if event["kind"] == "launch"), default=None)
    if newest is None:
        return {}
    last: float = events[newest]["time"]
    phases = {"driver": last - events[newest]["command_time"]}
    for event in events[newest:]:
        if event["kind"] == "phase" and event["name"] not in phases:
            phases[event["name"]] = event["time"] - last
            last = event["time"]
        if event["kind"] == "start" and "groups" not in phases:
            inside: dict[str, float] = event.get("phases", {})
            phases |= {"groups": event["time"] - last - sum(inside.values()), **inside}
            last = event["time"]
    return {name: round(seconds, 3) for name, seconds in phases.items()}


def _metrics_words(record: Mapping[str, Any], eta_seconds: float | None) -> str:
    parts = []
    if record.get("loss") is not None:
        parts.append(f"loss {record['loss']:.4f}")
    if record.get("accuracy") is not None:
        parts.append(f"accuracy {record['accuracy']:.0%}")
    if record.get("eval_loss") is not None:
        parts.append(f"eval {_held_out_words(record)}")
    if record.get("tokens_per_second") is not None:
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if record.get("bubble_measured") is not None:
        parts.append(f"bubble {record['bubble_measured']:.0%}")
    if eta_seconds is not None:
        parts.append(f"eta {timedelta(seconds=round(eta_seconds))}")
    return "  ".join(parts)


def _held_out_words(found: Mapping[str, Any]) -> str:
    """2.8330 (perplexity 17.00), or of pairs 0.6214 (accuracy 71%, margin 0.312)."""
    if "eval_accuracy" in found:
        beside = f"accuracy {found['eval_accuracy']:.0%}, margin {found['eval_reward_margin']:.3f}"
    else:
        beside = f"perplexity {found['eval_perplexity']:,.2f}"
    return f"{found['eval_loss']:.4f} ({beside})"
