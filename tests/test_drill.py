"""`cuboid drill`: real faults in real runs, every one paid for within its promise; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import EVERY, events, recipe_on

from cuboid.launch.drill import drill
from cuboid.launch.drill_options import DrillOptions
from cuboid.launch.faults import KINDS, parse
from cuboid.parallel.errors import FieldError, UserError
from cuboid.trainer.recipe_file import dump_recipe

STEPS, TIMEOUT_SECONDS = 12, 5


def recipe_file(folder: Path, mesh: str, *, changes: dict[str, dict[str, Any]] | None = None, **parallel: Any) -> str:
    """A small run with a checkpoint every third step, which stands when its step is over."""
    settings: dict[str, dict[str, Any]] = {
        "train": {"steps": STEPS},
        "checkpoint": {"asynchronous": False},
        "launch": {"launcher": "local", "timeout_seconds": TIMEOUT_SECONDS},
    }
    settings |= changes or {}
    recipe = recipe_on(mesh, changes=settings, microbatches=2, **parallel)
    path = folder / "drilled.yaml"
    path.write_text(dump_recipe(recipe.model_copy(update={"name": "drilled", "runs": str(folder / "runs")})))
    return str(path)


def drilled(capfd: pytest.CaptureFixture[str], path: str, faults: str, **options: Any) -> dict[str, Any]:
    """What a drill reports; its own verdict is that every promise was kept."""
    code = drill(DrillOptions(recipe=path, faults=faults, as_json=True, **options))
    out, err = capfd.readouterr()
    report = json.loads(out.splitlines()[-1])
    assert (code, report["broken"]) == (0, []), (report, err)
    assert report["bit_equal"]
    assert report["samples_lost"] == 0
    for cost in report["costs"]:
        assert cost["steps_repeated"] <= EVERY
        assert cost["cause"], cost
    return report


@pytest.mark.timeout(240)
def test_an_exception_a_stopped_rank_and_a_slow_one_cost_what_was_promised(tmp_path, capfd):
    report = drilled(capfd, recipe_file(tmp_path, "2x1x2"), "raise@3:3,stop@1:6,slow@2:7")
    error, stopped, slow = report["costs"]
    assert error["cause"].startswith("rank 3 failed in step 3: ValueError: a fault of the drill")
    assert stopped["cause"].startswith("rank 1 hung in the forward of microbatch")
    assert "(stopped by a signal; rank 0 waits in" in stopped["cause"]
    # from the moment the fault was written down, a little before or after the last change that the watch saw
    assert TIMEOUT_SECONDS - 1 < stopped["detect_seconds"] < TIMEOUT_SECONDS + 5
    (hang,) = events(tmp_path / "runs" / "drilled-drill" / "disturbed", "hang")
    stacks = (tmp_path / "runs" / "drilled-drill" / "disturbed" / hang["details"]).read_text()
    assert stacks.count("most recent call first") >= 3
    assert "rank 1, process" in stacks
    assert "state T" in stacks
    assert slow["cause"].startswith("told after step")
    (told,) = events(tmp_path / "runs" / "drilled-drill" / "disturbed", "slow_rank")
    assert (told["rank"], told["stages"]) == (2, [1])
    assert told["step"] - slow["step"] < 10
    assert not events(tmp_path / "runs" / "drilled-drill" / "undisturbed", "slow_rank"), "an ordinary run"


def test_what_is_drawn_is_drawn_again():
    recipe = recipe_on()
    drawn = parse("kill,stop@3,exit@2:5", recipe, seed=7, rate=None)
    assert drawn == parse("kill,stop@3,exit@2:5", recipe, seed=7, rate=None)
    assert drawn != parse("kill,stop@3,exit@2:5", recipe, seed=8, rate=None)
    assert [fault.kind for fault in drawn] == ["kill", "stop", "exit"]
    assert (drawn[1].rank, drawn[2].rank, drawn[2].step) == (3, 2, 5)
    soak = parse("kill,exit", recipe, seed=7, rate=2.0)
    moments = [fault.seconds for fault in soak]
    assert moments == sorted(moments)
    assert moments[-1] / len(moments) == pytest.approx(30, rel=0.1)
    assert {fault.kind for fault in soak} == {"kill", "exit"}
    assert {fault.rank for fault in soak} == set(range(8))


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ("boom", f"--faults: boom is no fault; use {', '.join(KINDS[:-1])} or slow"),
        ("kill@8", "--faults: kill@8 names rank 8; the recipe has ranks 0 to 7"),
        ("kill@1:0", "--faults: kill@1:0 names step 0; the recipe has steps 1 to 9"),
        ("kill,,stop", "--faults: nothing is no fault"),
    ],
)
def test_what_is_no_fault_is_told(faults, words):
    with pytest.raises(UserError) as refused:
        parse(faults, recipe_on(), seed=0, rate=None)
    assert str(refused.value).startswith(words)


def test_a_drill_needs_checkpoints_and_something_to_compare_with(tmp_path):
    path = recipe_file(tmp_path, "1x1x1")
    with pytest.raises(FieldError, match=r"checkpoint.every=0 leaves nothing to go on from"):
        drill(DrillOptions(recipe=path, overrides=["checkpoint.every=0"]))
    with pytest.raises(UserError, match=r"--against .*nowhere: there is no checkpoint of step 12"):
        drill(DrillOptions(recipe=path, against=tmp_path / "nowhere"))


@pytest.mark.full
@pytest.mark.alone
@pytest.mark.timeout(400)
def test_a_fault_at_every_position_of_the_mesh_costs_seconds_and_no_bit(tmp_path, capfd):
    """Each way to die at two ranks, and a rank that holds its interpreter; the step varies within the interval."""
    ways = ["kill", "segv", "exit", "raise"]
    faults = [f"{ways[rank % 4]}@{rank}:{3 * rank + 2 + rank % 3}" for rank in range(8)]
    steps = 30
    path = recipe_file(tmp_path, "2x2x2", changes={"train": {"steps": steps}})
    *deaths, hang = drilled(capfd, path, ",".join([*faults, f"hang@5:{steps - 2}"]))["costs"]
    for rank, cost in enumerate(deaths):
        assert (cost["fault"], cost["rank"]) == (ways[rank % 4], rank)
        assert cost["recover_seconds"] < 12
        assert cost["cause"].startswith(f"rank {rank} ")
        assert cost["cause"].endswith((f"in step {cost['step']}", "a fault of the drill"))
    assert hang["cause"].startswith("rank 5 hung in the forward of microbatch")
    assert "waits in recv for rank 5" in hang["cause"]
    assert hang["detect_seconds"] < TIMEOUT_SECONDS + 5


@pytest.mark.full
@pytest.mark.timeout(400)
def test_a_soak_ends_in_the_same_weights(tmp_path, capfd):
    """Faults at random moments; by the seed the first ones come after 2, 12 and 47 seconds."""
    path = recipe_file(tmp_path, "2x1x1", changes={"train": {"steps": 300}})
    report = drilled(capfd, path, "kill,segv,exit,raise", rate=6.0, seed=82)
    assert report["costs"]
    assert 0 < report["goodput"] < 1
