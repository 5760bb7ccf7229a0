"""`cuboid drill`: a recipe run undisturbed and with faults, and what these cost. Imports no torch.

Both runs are real ones of the recipe's launcher, in a folder of their own; all figures are read from their logs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cuboid.launch.drill_options import DrillOptions
from cuboid.launch.failures import shown
from cuboid.launch.faults import SLOW_STEPS, Drill, parse
from cuboid.launch.run_folder import open_run_folder
from cuboid.launch.training import checked_recipe
from cuboid.launch.worker import Train
from cuboid.parallel.errors import FieldError, RunFailed, UserError
from cuboid.trainer.manifest import read_manifest, steps
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.runlog import read_events, read_metrics


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one fault cost. Seconds are None where nothing had to be started again."""

    fault: str
    rank: int
    step: int
    cause: str
    """As the run told it."""
    steps_repeated: int = 0
    detect_seconds: float | None = None
    """From the fault to the verdict."""
    restart_seconds: float | None = None
    """From the verdict until all ranks stood at the checkpoint."""
    replay_seconds: float | None = None
    """For the steps that were done once more."""
    recover_seconds: float | None = None
    """From the fault to the end of the next step that was done, an old or a new one."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a drill found."""

    layout: str
    launcher: str
    costs: Sequence[Cost]
    samples_lost: int
    """Samples of steps that are missing from the run, or whose loss is not that of the undisturbed one."""
    bit_equal: bool
    """The final checkpoint's tensors, to those of the undisturbed run."""
    seconds: float
    """From the first start of the ranks to the run's end."""
    goodput: float
    """Share of these that went into the steps of the run, each counted once."""
    broken: Sequence[str]
    """The promises that did not hold."""


def drill(options: DrillOptions) -> int:
    """Run, compare and print; returns the command's exit code.

    Raises:
        UserError: the recipe is wrong, or has no checkpoints; a fault that is none; nothing to compare with.
        RunFailed: the undisturbed run fails.
    """
    recipe = checked_recipe(options.recipe, [*(options.overrides or ()), "track.to=none"])
    if not recipe.checkpoint.every:
        raise FieldError("checkpoint.every", 0, "leaves nothing to go on from after a fault", "use 1 or more")
    if recipe.launch.launcher == "slurm":
        raise FieldError("launch.launcher", "slurm", "cannot be drilled", "use local or ray")
    faults = parse(options.faults, recipe, seed=options.seed, rate=options.rate)
    root = str(Path(recipe.runs) / f"{recipe.name}-drill")
    undisturbed = options.against.absolute() if options.against else _undisturbed(recipe, root)
    if _final(undisturbed, recipe) is None:
        raise UserError(f"--against {options.against}: there is no checkpoint of step {recipe.train.steps} to compare")
    tougher = recipe.launch.model_copy(update={"max_failures": recipe.launch.max_failures + len(faults)})
    disturbed = recipe.model_copy(update={"runs": root, "name": "disturbed", "launch": tougher})
    code, folder = _run(disturbed, Drill(faults))
    report = account(recipe, undisturbed, folder, code=code)
    print(json.dumps(asdict(report)) if options.as_json else "\n".join(_table(report)))
    return 1 if report.broken else 0


def _undisturbed(recipe: Recipe, root: str) -> Path:
    code, folder = _run(recipe.model_copy(update={"runs": root, "name": "undisturbed"}), None)
    if code:
        raise RunFailed(f"the undisturbed run ended with exit code {code}; its folder is {shown(folder)}")
    return folder


def _run(recipe: Recipe, train: Train | None) -> tuple[int, Path]:
    with open_run_folder(recipe, "fresh") as folder:
        if recipe.launch.launcher == "local":
            from cuboid.launch import local

            return local.launch(recipe, folder, train=train, quiet=True), folder
        from cuboid.launch import ray_cluster

        return ray_cluster.launch(recipe, folder, train=train), folder


def account(recipe: Recipe, undisturbed: Path, disturbed: Path, *, code: int) -> Report:
    """What the faults of the run in ``disturbed`` cost, and which promises did not hold."""
    events, metrics = read_events(disturbed), read_metrics(disturbed)
    costs = list(_costs(events, {record["step"]: record["step_seconds"] for record in metrics}))
    known = {record["step"]: record["loss"] for record in read_metrics(undisturbed)}
    found = {record["step"]: record["loss"] for record in metrics}
    other = [step for step in range(1, recipe.train.steps + 1) if found.get(step) != known.get(step)]
    final = _final(disturbed, recipe)
    starts = [event["time"] for event in events if event["kind"] == "start"]
    seconds = events[-1]["time"] - starts[0] if starts else 0.0
    bit_equal = final is not None and final == _final(undisturbed, recipe)
    # a checkpoint that is still being written when the next one is due counts for nothing
    allowed = recipe.checkpoint.every * (2 if recipe.checkpoint.asynchronous else 1)
    checks = {
        f"the run ended with exit code {code}": code == 0,
        "the final weights are not those of the undisturbed run": bit_equal,
        f"losses differ in {len(other)} steps, first in step {other[0] if other else 0}": not other,
        **{
            f"{cost.fault} on rank {cost.rank}: {cost.steps_repeated} steps were lost, over {allowed}": (
                cost.steps_repeated <= allowed
            )
            for cost in costs
        },
        **{
            f"slow rank {cost.rank} was not told within {SLOW_STEPS} steps": bool(cost.cause)
            for cost in costs
            if cost.fault == "slow" and cost.step + SLOW_STEPS <= recipe.train.steps
        },
    }
    return Report(
        layout=str(recipe.layout),
        launcher=recipe.launch.launcher,
        costs=costs,
        samples_lost=len(other) * recipe.train.global_batch,
        bit_equal=bit_equal,
        seconds=round(seconds, 3),
        goodput=round(sum(record["step_seconds"] for record in metrics) / seconds, 4) if seconds else 0.0,
        broken=[words for words, holds in checks.items() if not holds],
    )


def _costs(events: Sequence[Mapping[str, Any]], step_seconds: Mapping[int, float]) -> Iterator[Cost]:
    for index, fault in enumerate(events):
        if fault["kind"] != "fault":
            continue
        after = events[index + 1 :]
        about = {"fault": fault["fault"], "rank": fault["rank"], "step": fault["step"]}
        if fault["fault"] == "slow":
            told = (event for event in after if event["kind"] == "slow_rank" and event["rank"] == fault["rank"])
            event = next((event for event in told if event["step"] <= fault["step"] + SLOW_STEPS), None)
            cause = f"told after step {event['step']}: {event['factor']} times as long" if event else ""
            yield Cost(**about, cause=cause)
            continue
        failure = next((event for event in after if event["kind"] == "failure"), None)
        start = next((e for e in after if e["kind"] == "start" and failure and e["time"] > failure["time"]), None)
        if failure is None or start is None:
            yield Cost(**about, cause=failure["words"] if failure else "")
            continue
        again = range(start["step"] + 1, fault["step"])
        yield Cost(
            **about,
            cause=failure["words"].partition("; starting again")[0],
            steps_repeated=len(again),
            detect_seconds=round(failure["time"] - fault["time"], 3),
            restart_seconds=round(start["time"] - failure["time"], 3),
            replay_seconds=round(sum(step_seconds.get(step, 0.0) for step in again), 3),
            recover_seconds=round(start["time"] - fault["time"] + step_seconds.get(start["step"] + 1, 0.0), 3),
        )


def _final(folder: Path, recipe: Recipe) -> dict[str, str] | None:
    """SHA-256 of every file of tensors of the last step's checkpoint; None where there is none."""
    path = steps(folder / "checkpoints").get(recipe.train.steps)
    if path is None:
        return None
    files = read_manifest(path).files
    return {name: record.sha256 for name, record in files.items() if name.endswith(".safetensors")}


def _table(report: Report) -> Iterator[str]:
    yield f"{report.layout}, {report.launcher}: {len(report.costs)} faults in {report.seconds:.0f} s"
    yield f"{'fault':<6}{'rank':>5}{'step':>6}{'lost':>6}{'detect':>8}{'restart':>9}{'replay':>8}{'recover':>9}  told"
    for cost in report.costs:
        times = (cost.detect_seconds, cost.restart_seconds, cost.replay_seconds, cost.recover_seconds)
        cells = "".join(
            f"{'-' if seconds is None else f'{seconds:.1f} s':>{width}}"
            for seconds, width in zip(times, (8, 9, 8, 9), strict=True)
        )
        yield f"{cost.fault:<6}{cost.rank:>5}{cost.step:>6}{cost.steps_repeated:>6}{cells}  {cost.cause}"
    weights = "the final weights are bit-equal" if report.bit_equal else "the final weights DIFFER"
    yield f"{weights}; samples lost or repeated: {report.samples_lost}; goodput {report.goodput:.1%}"
    yield from (f"NOT kept: {words}" for words in report.broken)
