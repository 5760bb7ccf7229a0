"""The trace and the picture of a step as it ran."""

import importlib.util
import itertools
import json

import numpy as np
import pytest

from cuboid.parallel.pipeline import ActionTime
from cuboid.parallel.schedules import order
from cuboid.parallel.simulation import ideal_bubble, simulate
from cuboid.trainer.metrics import Measurement, StepTimes, bubble
from cuboid.trainer.timeline import IDLE, KINDS, write_timeline

SIZES = {"pipeline": 3, "virtual_stages": 2, "microbatches": 6}


@pytest.fixture
def measurement():
    actions = order("interleaved_1f1b", **SIZES)
    simulation = simulate(actions, lambda action: {"F": 0.1, "B": 0.2, "R": 0.01}[action.kind])
    times = [
        [
            ActionTime(action.kind, action.stage, action.microbatch, 7e5 + start, 7e5 + stop, 0.05)
            for action, start, stop in zip(*columns, strict=True)
        ]
        for columns in zip(actions, simulation.starts, simulation.stops, strict=True)
    ]
    step = StepTimes(actions=times, freed=[7e5] * 3, entered=[7e5] * 3, updated=[8e5] * 3)
    ideal = ideal_bubble("interleaved_1f1b", **SIZES)
    return Measurement("interleaved_1f1b, 3 ranks", bubble(step, ideal=ideal, contended=False), step)


def test_trace_holds_every_action_once(tmp_path, measurement):
    write_timeline(tmp_path, 50, measurement)
    trace = json.loads((tmp_path / "step-00000050.trace.json").read_text())
    bars = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(bars) == 3 * (2 * 2 * 6 + 2)
    assert {event["tid"] for event in bars} == {0, 1, 2}
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"]
    assert names[0] == "interleaved_1f1b, 3 ranks, step 50"
    assert names[1:] == ["rank 0, stages 0, 3", "rank 1, stages 1, 4", "rank 2, stages 2, 5"]
    for rank in range(3):
        own = [event for event in bars if event["tid"] == rank]
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1 for a, b in itertools.pairwise(own)), "bars overlap"
    first = bars[0]
    assert (first["name"], first["cat"], first["ts"], first["dur"]) == ("F0", "forward", 0, pytest.approx(1e5, abs=1))
    assert trace["otherData"]["bubble_measured"] == measurement.bubble.measured


def test_picture_shows_idle_time_in_grey(tmp_path, measurement):
    from matplotlib.image import imread

    picture = write_timeline(tmp_path / "timeline", 2, measurement)
    assert picture == tmp_path / "timeline" / "step-00000002.png"
    assert {path.name for path in picture.parent.iterdir()} == {"step-00000002.png", "step-00000002.trace.json"}
    image = (imread(picture)[..., :3] * 255).round().astype(int)
    idle = np.array([int(IDLE[i : i + 2], 16) for i in (1, 3, 5)])
    grey = np.abs(image - idle).max(axis=-1) <= 2
    blue = np.array([int(KINDS["F"][1][i : i + 2], 16) for i in (1, 3, 5)])
    assert (np.abs(image - blue).max(axis=-1) <= 2).mean() > 0.05, "no forward is to be seen"
    # of all rows of pixels that cross the first rank's bars, the middle one is hit by numbers: take a quarter's
    rows = np.flatnonzero(grey.mean(axis=1) > 0.05)
    columns = np.flatnonzero((image[rows[3]] != 255).any(axis=-1))
    share = grey[rows[3], columns[0] : columns[-1]].mean()
    assert share == pytest.approx(measurement.bubble.by_rank[0], abs=0.03)


def test_without_matplotlib_there_is_the_trace_alone(tmp_path, measurement, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert write_timeline(tmp_path, 2, measurement) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002.trace.json"]
