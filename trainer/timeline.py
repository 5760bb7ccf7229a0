"""A step of the pipeline as it ran: a trace for Perfetto or chrome://tracing, and a picture.

The only file that imports matplotlib, and only when a picture is drawn; without it there is the trace alone.
"""

from __future__ import annotations

import colorsys
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cuboid.parallel.pipeline import ActionTime
from cuboid.trainer.metrics import Bubble, Measurement

KINDS = {
    "F": ("forward", "#3b76af"),
    "B": ("backward", "#e1812c"),
    "I": ("backward, inputs", "#e1812c"),
    "W": ("backward, weights", "#5f9e6e"),
    "R": ("gradient reduction", "#8d5a99"),
}
IDLE = "#e9e9ec"


def import_matplotlib() -> bool:
    """Whether pictures can be drawn; imports what draws them.

    To be called before a tracker's thread runs: for every number trackio looks into ``matplotlib.figure`` where that is
    loaded, and drops the number where it is loaded by half.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib.figure  # noqa: F401

    return True


def write_timeline(folder: Path, step: int, measurement: Measurement) -> Path | None:
    """Write ``folder/step-00000007.trace.json`` and ``.png`` of step 7.

    Shows the pipeline of data and tensor coordinate 0; the bubble beside it is the mean over the data axis. Returns the
    picture's path, or None where matplotlib is not installed (extra ``track``).
    """
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{measurement.title}, step {step}"
    path = folder / f"step-{step:08d}.trace.json"
    _write(path, json.dumps(trace(measurement, title=title)).encode())
    if not import_matplotlib():
        return None
    picture = folder / f"step-{step:08d}.png"
    partial = picture.with_name(f".{picture.name}.partial")
    draw(partial, measurement, title=title)
    partial.replace(picture)
    return picture


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def trace(measurement: Measurement, *, title: str) -> dict[str, Any]:
    """The trace-event format (https://ui.perfetto.dev opens it): a row a pipeline rank, times in microseconds."""
    actions = measurement.times.actions
    zero = min(own[0].start_seconds for own in actions)
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": title}}]
    for rank, own in enumerate(actions):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": _row_name(rank, own)}})
        events += [
            {
                "ph": "X",
                "name": time.kind if time.microbatch < 0 else f"{time.kind}{time.microbatch}",
                "cat": KINDS[time.kind][0],
                "pid": 0,
                "tid": rank,
                "ts": round(1e6 * (time.start_seconds - zero), 3),
                "dur": round(1e6 * time.seconds, 3),
                "args": {
                    "stage": time.stage,
                    "microbatch": time.microbatch,
                    "processor_ms": round(1e3 * time.thread_seconds, 3),
                },
            }
            for time in own
        ]
    return {"displayTimeUnit": "ms", "otherData": measurement.bubble.record(), "traceEvents": events}


def draw(path: Path, measurement: Measurement, *, title: str) -> None:
    """Draw the PNG: a row a pipeline rank, a bar an action with its microbatch's number, idle time in grey.

    Where a rank holds several stages, later ones are paler.
    """
    from matplotlib.figure import Figure

    actions = measurement.times.actions
    zero = min(own[0].start_seconds for own in actions)
    wall = max(time.stop_seconds for own in actions for time in own) - zero
    width_inches, dots = 14, 130
    figure = Figure(figsize=(width_inches, 1.7 + 0.62 * len(actions)), dpi=dots, layout="constrained")
    axes = figure.add_subplot()
    label_seconds = 10 * wall / (0.85 * width_inches * dots)  # width of a digit, nearly
    for rank, own in enumerate(actions):
        axes.broken_barh([(0, wall)], (rank - 0.4, 0.8), color=IDLE, zorder=1)
        paler = {stage: 0.45 * turn / max(1, turns - 1) for turn, turns, stage in _turns(own)}
        spans: dict[str, list[tuple[float, float]]] = {}
        for time in _visible(own, wall):
            start, label = time.start_seconds - zero, str(max(time.microbatch, 0))
            spans.setdefault(_paler(KINDS[time.kind][1], paler[time.stage]), []).append((start, time.seconds))
            if time.microbatch >= 0 and time.seconds > (len(label) + 0.6) * label_seconds:
                ink = "white" if paler[time.stage] < 0.3 else "#222222"
                place = {"ha": "center", "va": "center_baseline"}
                axes.text(start + time.seconds / 2, rank, label, color=ink, fontsize=9, zorder=3, **place)
        for colour, bars in spans.items():
            axes.broken_barh(bars, (rank - 0.4, 0.8), facecolor=colour, edgecolor="white", linewidth=0.6, zorder=2)
        idle = 1 - sum(time.seconds for time in own) / wall
        axes.text(wall * 1.006, rank, f"{idle:.0%} idle", va="center", fontsize=9, color="#555555")
    axes.set_yticks(range(len(actions)), [_row_name(rank, own) for rank, own in enumerate(actions)])
    axes.set_ylim(len(actions) - 0.45, -0.55)
    axes.set_xlim(0, wall)
    _finish(axes, seconds=wall)
    above = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(title, xytext=(0, 25), fontsize=13, fontweight="bold", **above)
    axes.annotate(_summary(measurement.bubble), xytext=(0, 8), fontsize=10, color="#333333", **above)
    _legend(axes, actions, wall)
    figure.savefig(path, format="png")


def _finish(axes: Any, *, seconds: float) -> None:
    """A quiet frame, and a time axis in the unit that reads well."""
    scale, unit = (1, "seconds") if seconds >= 10 else (1000, "milliseconds")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value * scale:g}")
    axes.set_xlabel(unit)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _legend(axes: Any, actions: Sequence[Sequence[ActionTime]], wall: float) -> None:
    from matplotlib.patches import Patch

    visible = {time.kind for own in actions for time in _visible(own, wall)}
    shown = [Patch(color=colour, label=name) for kind, (name, colour) in KINDS.items() if kind in visible]
    if any(len(_turns(own)) > 1 for own in actions):
        shown.append(Patch(color=_paler(KINDS["F"][1], 0.45), label="paler: the rank's later stage"))
    axes.legend(
        handles=[*shown, Patch(color=IDLE, label="idle")],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=len(KINDS) + 2,
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        borderaxespad=0.2,
    )


def _visible(actions: Sequence[ActionTime], wall: float) -> list[ActionTime]:
    """Without the reductions of a model that has nothing to reduce, which are a microsecond long."""
    return [time for time in actions if time.seconds > 3e-4 * wall]


def _summary(bubble: Bubble) -> str:
    words = f"bubble: measured {bubble.measured:.1%}, expected {bubble.expected:.1%}, ideal {bubble.ideal:.1%}"
    if bubble.slow_stage is not None:
        words += f". Stage {bubble.slow_stage} is clearly slower than the others"
    return words


def _row_name(rank: int, actions: Sequence[ActionTime]) -> str:
    stages = [str(stage) for _, _, stage in _turns(actions)]
    return f"rank {rank}, stage{'s' if len(stages) > 1 else ''} {', '.join(stages)}"


def _turns(actions: Sequence[ActionTime]) -> list[tuple[int, int, int]]:
    """(which of the rank's stages this is, how many it has, the stage)."""
    stages = sorted({time.stage for time in actions})
    return [(turn, len(stages), stage) for turn, stage in enumerate(stages)]


def _paler(colour: str, share: float) -> str:
    """``colour`` ("#rrggbb") with its lightness moved by ``share`` of the way to white."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)))
    rgb = colorsys.hls_to_rgb(hue, lightness + share * (1 - lightness), saturation)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)
