"""Orders against torch's own, the simulator against closed forms and by hand, refusals with the values that work."""

import itertools

import pytest

from cuboid.parallel.schedules import SCHEDULES, Action, order, stage_indices
from cuboid.parallel.simulation import ideal_bubble, in_flight, simulate

STAGES = {
    "interleaved_1f1b": (2, 3),
    "looped_bfs": (2, 3),
    "interleaved_zero_bubble": (2, 3),
    "zbv": (2,),
    "dualpipe_v": (2,),
}
SIZES = [
    (name, {"pipeline": p, "virtual_stages": v, "microbatches": m})
    for name in SCHEDULES
    for v in STAGES.get(name, (1,))
    for p, m in itertools.product(range(1, 7), range(1, 20))
]
POSSIBLE = [(name, sizes) for name, sizes in SIZES if not SCHEDULES[name].check(**sizes)]


def test_orders_and_refusals_are_torchs():
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    for name, sizes in SIZES:
        if sizes["pipeline"] not in (1, 2, 4, 5) or sizes["microbatches"] not in (1, 2, 3, 4, 8, 9, 11, 15):
            continue  # torch takes its time
        arguments = (SCHEDULES[name].torch_name, sizes["pipeline"], sizes["microbatches"], sizes["virtual_stages"])
        refused = SCHEDULES[name].check(**sizes)
        if refused and name == "1f1b":
            continue  # torch refuses it in the schedule's constructor, with a message that starts like this one
        if refused:
            with pytest.raises(ValueError, match=r"multiple of the number of rounds|as many microbatches as stages"):
                get_schedule_ops(*arguments)
            continue
        ours = [
            [f"{a.stage}{a.kind}{a.microbatch}" for a in actions if a.kind != "R"] for actions in order(name, **sizes)
        ]
        theirs = [[repr(a) for a in plain_actions(own)] for own in get_schedule_ops(*arguments)]
        if name == "1f1b":  # torch draws the last rank wrongly: without the forward of its first microbatch
            assert ours.pop() == [f"{sizes['pipeline'] - 1}{k}{m}" for m in range(sizes["microbatches"]) for k in "FB"]
            theirs.pop()
        assert ours == theirs, (name, sizes)


def plain_actions(actions):
    """Torch's actions without the gaps it draws, overlapping pairs one after the other as it runs them."""
    for action in actions:
        if action is not None and action.sub_actions:
            yield from action.sub_actions
        elif action is not None and action.microbatch_index is not None:
            yield action


def test_a_forward_that_overlaps_is_held_until_its_backward_is_done():
    for actions in order("dualpipe_v", pipeline=4, virtual_stages=2, microbatches=8):
        for action, following in itertools.pairwise(actions):
            assert not action.held or (action.kind, following.kind) == ("F", "B")
    held = [[Action("F", 0, 0, True), Action("B", 0, 7)], [Action("F", 1, 0), Action("B", 1, 7)]]
    simulation = simulate([held[0], held[1][::-1]], lambda action: 1.0)
    assert simulation.starts == [[0, 1], [0, 2]]


def test_every_action_happens_once():
    for name, sizes in POSSIBLE:
        stages = range(sizes["pipeline"] * sizes["virtual_stages"])
        for kinds in ("F", "BI", "BW"):
            found = [(a.stage, a.microbatch) for own in order(name, **sizes) for a in own if a.kind in kinds]
            assert sorted(found) == list(itertools.product(stages, range(sizes["microbatches"]))), (name, sizes, kinds)


def test_each_stage_reduces_its_gradients_once_after_its_last_backward():
    for actions in order("interleaved_1f1b", pipeline=2, virtual_stages=2, microbatches=4):
        for stage in {action.stage for action in actions}:
            own = [action for action in actions if action.stage == stage]
            assert [action.kind for action in own].count("R") == 1
            assert own[-1] == Action("R", stage, -1)


@pytest.mark.parametrize(("forward", "backward"), [(1.0, 1.0), (1.0, 2.0)])
def test_simulated_bubble_of_equal_stages_is_the_closed_form(forward, backward):
    """(p - 1) / (v m + p - 1); with fewer microbatches than ranks the first one has to come round again."""
    seconds = {"F": forward, "B": backward, "R": 0.0}
    for name, sizes in POSSIBLE:
        if SCHEDULES[name].splits_backward:
            continue
        p, v, m = sizes["pipeline"], sizes["virtual_stages"], sizes["microbatches"]
        expected = 1 - v * m / (v * max(m, p) + min(m, p) - 1)
        simulation = simulate(order(name, **sizes), lambda action: seconds[action.kind])
        assert simulation.bubble == pytest.approx(expected, abs=1e-12), (name, sizes)
        assert ideal_bubble(name, **sizes) == pytest.approx(expected, abs=1e-12), (name, sizes)


def test_known_bubbles():
    assert ideal_bubble("gpipe", pipeline=4, virtual_stages=1, microbatches=8) == pytest.approx(3 / 11)
    assert ideal_bubble("1f1b", pipeline=4, virtual_stages=1, microbatches=8) == pytest.approx(3 / 11)
    assert ideal_bubble("interleaved_1f1b", pipeline=4, virtual_stages=2, microbatches=8) == pytest.approx(3 / 19)
    assert ideal_bubble("1f1b", pipeline=1, virtual_stages=1, microbatches=8) == 0
    # no gap within a rank's own span; what is left is the way down: Qi et al. 2023, section 6
    assert ideal_bubble("zbv", pipeline=4, virtual_stages=2, microbatches=8) == pytest.approx(3 / (6 * 8 + 3))
    assert ideal_bubble("interleaved_zero_bubble", pipeline=4, virtual_stages=2, microbatches=8) == pytest.approx(
        3 / 51
    )
    assert ideal_bubble("dualpipe_v", pipeline=4, virtual_stages=2, microbatches=8) == pytest.approx(1 / 9)


def test_simulation_by_hand():
    """Two stages, two microbatches, the second stage twice as slow, its rank free only after 2.5 seconds."""
    actions = order("1f1b", pipeline=2, virtual_stages=1, microbatches=2)
    seconds = {("F", 0): 1.0, ("B", 0): 1.0, ("F", 1): 2.0, ("B", 1): 2.0, ("R", 0): 0.5, ("R", 1): 0.0}
    simulation = simulate(actions, lambda action: seconds[action.kind, action.stage])
    assert [(a.kind, a.microbatch) for a in actions[0]] == [("F", 0), ("F", 1), ("B", 0), ("B", 1), ("R", -1)]
    assert simulation.starts == [[0, 1, 5, 9, 10], [1, 3, 5, 7, 9]]
    assert simulation.wall == 10.5
    assert simulation.busy == [4.5, 8]
    assert simulation.bubble == pytest.approx(1 - 12.5 / 21)
    late = simulate(actions, lambda action: seconds[action.kind, action.stage], ready=[0, 2.5])
    assert late.starts[1] == [2.5, 4.5, 6.5, 8.5, 10.5]
    assert late.wall == 12


def test_split_backward_waits_for_input_gradients_only():
    actions = [
        [Action("F", 0, 0), Action("I", 0, 0), Action("W", 0, 0)],
        [Action("F", 1, 0), Action("I", 1, 0), Action("W", 1, 0)],
    ]
    simulation = simulate(actions, lambda action: 1.0)
    assert simulation.starts == [[0, 3, 4], [1, 2, 3]]
    assert in_flight(actions) == [1, 1]


def test_an_order_that_waits_for_itself_is_refused():
    actions = [[Action("B", 0, 0), Action("F", 0, 0)], [Action("F", 1, 0), Action("B", 1, 0)]]
    with pytest.raises(ValueError, match="waits for itself"):
        simulate(actions, lambda action: 1.0)


def test_microbatches_in_flight():
    assert in_flight(order("gpipe", pipeline=4, virtual_stages=1, microbatches=8)) == [8, 8, 8, 8]
    assert in_flight(order("1f1b", pipeline=4, virtual_stages=1, microbatches=8)) == [4, 3, 2, 1]
    assert in_flight(order("interleaved_1f1b", pipeline=4, virtual_stages=2, microbatches=8)) == [11, 9, 7, 5]
    assert in_flight(order("looped_bfs", pipeline=4, virtual_stages=2, microbatches=8)) == [16] * 4
    assert in_flight(order("zbv", pipeline=4, virtual_stages=2, microbatches=8)) == [8] * 4
    assert in_flight(order("dualpipe_v", pipeline=4, virtual_stages=2, microbatches=8)) == [9] * 4


def test_stages_stand_in_loops_or_in_a_v():
    assert stage_indices("1f1b", pipeline=4, rank=3, virtual_stages=1) == (3,)
    assert stage_indices("interleaved_1f1b", pipeline=4, rank=1, virtual_stages=3) == (1, 5, 9)
    assert stage_indices("zbv", pipeline=4, rank=0, virtual_stages=2) == (0, 7)


@pytest.mark.parametrize(
    ("name", "pipeline", "virtual_stages", "microbatches", "words"),
    [
        ("1f1b", 4, 1, 3, "parallel.microbatches=3 is fewer than the 4 stages that 1f1b keeps busy; use 4 or more"),
        ("gpipe", 4, 2, 8, "parallel.virtual_stages=2 is too many for gpipe"),
        ("interleaved_1f1b", 4, 1, 8, "parallel.virtual_stages=1 is too few for interleaved_1f1b"),
        ("interleaved_1f1b", 4, 2, 9, "use 8 or 10; any multiple of 4 works"),
        ("gpipe", 4, 1, 0, "parallel.microbatches=0"),
        ("zbv", 4, 3, 8, "parallel.virtual_stages=3 is not the 2 that zbv lays in a V; use 2 or null"),
        ("dualpipe_v", 4, 2, 7, "parallel.microbatches=7 is fewer than the 8 stages that dualpipe_v keeps busy"),
        ("interleaved_zero_bubble", 4, 2, 9, "use 8 or 10; any multiple of 4 works"),
    ],
)
def test_refusals_name_what_works(name, pipeline, virtual_stages, microbatches, words):
    errors = SCHEDULES[name].check(pipeline=pipeline, virtual_stages=virtual_stages, microbatches=microbatches)
    assert len(errors) == 1
    assert words in str(errors[0])
