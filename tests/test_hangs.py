"""Hangs: when no rank moves it is one, and who waits for whom. Real ones are made by the drills of test_drill.py."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from runs import events, recipe_on

from cuboid.launch.waits import Found, Waits
from cuboid.launch.watch import Watch, tell_hang
from cuboid.parallel.layout import Layout
from cuboid.parallel.schedules import order
from cuboid.parallel.whereabouts import Sighting, Whereabouts, machine, path_of, sighting_of

COLLECTIVE = 'File "/x/torch/distributed/c10d_logger.py", line 83 in wrapper\n'
SUM = 'File "/x/torch/distributed/distributed_c10d.py", line 3 in all_reduce\n' + COLLECTIVE
COUNT = 'File "/x/cuboid/trainer/data.py", line 8 in count\n'


def waits(layout: Layout, *told: dict, schedule: str = "1f1b", virtual_stages: int = 1) -> Waits:
    """Of ranks that said and show what ``told`` says: fields of `Sighting` and of `Found`."""
    found = {}
    for rank, fields in enumerate(told):
        process = {name: fields.pop(name) for name in ("state", "stack") if name in fields}
        seen = Sighting(machine="m", pid=rank, **{"step": 7, "phase": "step"} | fields)
        found[rank] = Found(rank=rank, seen=seen, **process)
    actions = order(schedule, pipeline=layout.pipeline, virtual_stages=virtual_stages, microbatches=4)
    return Waits(found, layout, actions)


def action(kind: str, stage: int, microbatch: int, *, over: bool = False, **more: str) -> dict:
    return {"doing": kind, "stage": stage, "microbatch": microbatch, "over": over, **more}


def test_a_stopped_rank_keeps_the_next_stage_waiting():
    """Rank 2's next action needs what rank 0 computes; both data peers wait within an action."""
    told = waits(
        Layout(pipeline=2, data=2),
        action("F", 0, 2, state="T"),
        action("R", 0, -1, state="S", stack=SUM),
        action("B", 1, 1, over=True, state="S", stack=SUM),
        action("R", 1, -1, state="S", stack=SUM),
    )
    assert told.hung == [0]
    assert told.lines() == [
        "rank 0 hangs in the forward of microbatch 2 on stage 0, stopped by a signal",
        "rank 1 waits in all_reduce for rank 0, which is in the forward of microbatch 2 on stage 0",
        "rank 2 waits in recv for rank 0, which is in the forward of microbatch 2 on stage 0",
        "rank 3 waits in all_reduce for rank 2, which is after the backward of microbatch 1 on stage 1",
    ]


def test_by_what_ranks_said_alone_the_one_in_a_save_is_found():
    """As of ranks on other machines, which give neither state nor stack."""
    told = waits(
        Layout(pipeline=2, data=2),
        {"step": 8, "doing": "count of tokens"},
        {"phase": "save"},
        action("B", 1, 0, over=True) | {"step": 8},
        {"step": 8, "doing": "count of tokens"},
    )
    assert told.hung == [1]
    assert told.lines() == [
        "rank 1 hangs in the save",
        "rank 0 waits in a collective for rank 1, which is in the save",
        "rank 2 waits in recv for rank 0, which is in the count of tokens",
        "rank 3 waits in a collective for rank 1, which is in the save",
    ]


def test_tensor_ranks_in_the_same_action_are_told_apart_by_their_stacks():
    """Nothing that they said differs: one waits for the sum, the other holds the interpreter elsewhere."""
    sighting = action("F", 0, 3)
    told = waits(
        Layout(tensor=2), sighting | {"state": "S", "stack": SUM}, dict(sighting) | {"state": "R", "stack": COUNT}
    )
    assert told.hung == [1]
    assert told.lines()[1] == (
        "rank 0 waits in all_reduce for rank 1, which is in the forward of microbatch 3 on stage 0"
    )
    unknown = waits(Layout(tensor=2), dict(sighting), dict(sighting))
    assert unknown.hung == [0, 1]


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved_1f1b", "zbv", "dualpipe_v"])
def test_every_action_of_every_schedule_leads_back_to_the_rank_that_stopped(schedule):
    """Rank 1 of 4 stops in any of its actions, the others run on as far as messages let them: each then waits for a
    rank, and by these one comes to rank 1."""
    virtual_stages = 1 if schedule == "gpipe" else 2
    layout, sizes = Layout(pipeline=4), {"pipeline": 4, "virtual_stages": virtual_stages, "microbatches": 8}
    actions = order(schedule, **sizes)
    for stopped in range(len(actions[1])):
        ended = run_on(actions, stopped)
        found = {}
        for rank, number in enumerate(ended):
            at = actions[rank][number if rank == 1 else max(number - 1, 0)]
            said = {"doing": at.kind, "stage": at.stage, "microbatch": at.microbatch, "over": rank != 1}
            if number == len(actions[rank]):
                said = {"doing": "gradient sum"}
            elif number == 0 and rank != 1:
                said = {"doing": "count of tokens"}
            seen = Sighting(machine="m", pid=rank, step=1, phase="step", **said)
            found[rank] = Found(rank=rank, seen=seen, state="T" if rank == 1 else "S", stack="" if rank == 1 else SUM)
        told = Waits(found, layout, actions)
        assert told.hung == [1]
        for rank in (0, 2, 3):
            path = [rank]
            while path[-1] != 1:
                awaited = told.awaited(path[-1])[1]
                assert awaited, (stopped, path, told.lines())
                assert len(path) < 5, (stopped, path, told.lines())
                path.append(1 if 1 in awaited else awaited[0])


def run_on(actions, stopped: int) -> list[int]:
    """How many actions each rank has ended when no message lets it go on, rank 1 standing in its ``stopped``-th."""
    ended, done = [0] * len(actions), set()
    last = max(action.stage for own in actions for action in own)

    def is_ready(action) -> bool:
        if action.kind == "F":
            return action.stage == 0 or ("F", action.stage - 1, action.microbatch) in done
        if action.kind in "BI":
            return action.stage == last or ("B", action.stage + 1, action.microbatch) in done
        return True

    moved = True
    while moved:
        moved = False
        for rank, own in enumerate(actions):
            limit = stopped if rank == 1 else len(own)
            while ended[rank] < limit and is_ready(own[ended[rank]]):
                action = own[ended[rank]]
                done.add(("B" if action.kind == "I" else action.kind, action.stage, action.microbatch))
                ended[rank] += 1
                moved = True
    return ended


@pytest.fixture
def watched(tmp_path: Path) -> tuple[Watch, Whereabouts]:
    """A run of one rank, this process, that may stand still for 10 seconds."""
    where = Whereabouts(path_of(tmp_path, 0))
    recipe = recipe_on("1x1x1", changes={"launch": {"timeout_seconds": 10}})
    return Watch(recipe, tmp_path), where


def test_a_rank_that_stands_still_in_a_step_hangs(watched):
    watch, where = watched
    where.begin("step", 3)
    where.at("F", 0, 2)
    assert not watch.sees_hang(100.0)
    assert not watch.sees_hang(109.9)
    where.at("F", 0, 2, over=True)
    assert not watch.sees_hang(111.0)
    assert not watch.sees_hang(120.9)
    assert watch.sees_hang(121.1)


@pytest.mark.parametrize("phase", ["start", "save", "end"])
def test_data_models_and_checkpoints_may_take_as_long_as_they_want(watched, phase):
    watch, where = watched
    where.begin(phase, 3)
    assert not any(watch.sees_hang(moment) for moment in (100.0, 111.0, 4000.0))


def test_a_stopped_process_hangs_in_any_phase_of_any_attempt(tmp_path):
    """Its state tells, so that it needs no patience; one that goes on in time is none."""
    recipe = recipe_on("1x1x1", changes={"launch": {"timeout_seconds": 10}})
    watch = Watch(recipe, tmp_path)
    for began in (100.0, 200.0):
        with subprocess.Popen(["sleep", "60"]) as process:
            told = {"machine": machine(), "pid": process.pid, "count": 1, "step": 4, "phase": "save"}
            path_of(tmp_path, 0).parent.mkdir(exist_ok=True)
            path_of(tmp_path, 0).write_text(json.dumps(told))
            assert not watch.sees_hang(began)
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            assert not watch.sees_hang(began + 9.0), "first seen to be stopped"
            assert not watch.sees_hang(began + 18.9)
            assert watch.sees_hang(began + 19.1)
            process.kill()
        assert not watch.sees_hang(began + 30.0), "it is gone"


def test_a_hang_over_two_machines_is_told_once_by_what_both_know(tmp_path):
    """Rank 1's machine has said that it is stopped, and rank 0's that it is not; of rank 2's nothing is known."""
    recipe = recipe_on("1x3x1", changes={"train": {"global_batch": 12}})
    for rank in range(3):
        where = Whereabouts(path_of(tmp_path, rank))
        where.begin("step", 3)
        where.at("F", 0, 1 if rank == 1 else 2)
    (tmp_path / "logs").mkdir()
    stack = f"Thread 1 (most recent call first):\n  {COUNT}\nThread 2 (most recent call first):\n  {SUM}"
    path_of(tmp_path, 0).with_suffix(".stacks").write_text(stack)
    tell_hang(recipe, tmp_path, {0: "S", 1: "T"})
    (hang,) = events(tmp_path, "hang")
    assert (hang["rank"], hang["step"], hang["details"]) == (1, 3, "logs/hang-1.txt")
    assert hang["waits"] == [
        "rank 1 hangs in the forward of microbatch 1 on stage 0, stopped by a signal",
        "rank 0 waits in all_reduce for rank 1, which is in the forward of microbatch 1 on stage 0",
        "rank 2 waits in a collective for rank 1, which is in the forward of microbatch 1 on stage 0",
    ]
    told = (tmp_path / hang["details"]).read_text()
    places = re.findall(r"^--- rank \d, (.*): step 3", told, re.MULTILINE)
    assert [re.sub(r"\d+", "N", place) for place in places] == [
        "process N, state S",
        "process N, state T",
        "on another machine",
    ]
    assert stack in told
    (failure,) = events(tmp_path, "rank_error")
    assert failure["cause"].startswith(
        "hung in the forward of microbatch 1 on stage 0 (stopped by a signal; rank 0 waits"
    )


def test_a_rank_that_stays_in_a_save_alone_hangs(tmp_path):
    recipe = recipe_on("1x2x1", changes={"launch": {"timeout_seconds": 10}})
    watch, ranks = Watch(recipe, tmp_path), [Whereabouts(path_of(tmp_path, rank)) for rank in range(2)]
    for where in ranks:
        where.begin("save", 3)
    assert not any(watch.sees_hang(moment) for moment in (100.0, 4000.0))
    ranks[0].begin("batch", 4)
    assert not watch.sees_hang(4001.0)
    assert watch.sees_hang(4011.1)


def test_a_long_evaluation_moves(watched):
    watch, where = watched
    where.begin("evaluation", 3)
    for microbatch in range(9):
        where.at("F", 0, microbatch, evaluating=True)
        assert not watch.sees_hang(100.0 + 8 * microbatch)
    assert watch.sees_hang(100.0 + 8 * 8 + 10.1)


def test_a_full_disk_or_no_folder_stops_no_rank(tmp_path):
    where = Whereabouts(Path("/dev/full"))
    where.at("update")
    Whereabouts(tmp_path / "none" / "deeper" / "rank-0.json").at("update")
    assert sighting_of(tmp_path, 0) is None
