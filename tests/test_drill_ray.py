"""A drill through Ray: a killed and a stopped rank cost what was promised, the weights those of a run without Ray."""

import pytest
from runs import events, run
from test_drill import TIMEOUT_SECONDS, drilled, recipe_file

from cuboid.trainer.recipe_file import read_recipe

RECOVER_SECONDS = 60
"""40 are promised; on two idle cores it takes 15 and 20."""


@pytest.mark.full
@pytest.mark.alone
@pytest.mark.timeout(400)
def test_a_killed_and_a_stopped_rank_cost_what_was_promised_under_ray(tmp_path, capfd):
    launch = {"launcher": "ray", "timeout_seconds": TIMEOUT_SECONDS}
    path = recipe_file(tmp_path, "2x1x2", changes={"launch": launch})
    run(read_recipe(path, ()).recipe(), tmp_path / "undisturbed")
    killed, stopped = drilled(capfd, path, "kill@1:5,stop@2:9", against=tmp_path / "undisturbed")["costs"]

    assert killed["cause"] == "rank 1 was killed, most likely by SIGKILL, in step 5"
    assert (killed["steps_repeated"], stopped["steps_repeated"]) == (1, 2)
    assert stopped["cause"].startswith("rank 2 hung in the forward of microbatch")
    assert "(stopped by a signal; rank 0 waits in recv for rank 2) in step 9" in stopped["cause"]
    folder = tmp_path / "runs" / "drilled-drill" / "disturbed"
    (hang,), (_, fault) = events(folder, "hang"), events(folder, "fault")
    assert hang["time"] - fault["time"] < TIMEOUT_SECONDS + 5
    assert len(hang["waits"]) == 4
    assert hang["waits"][0].startswith("rank 2 hangs in the forward of microbatch")
    stacks = (folder / hang["details"]).read_text()
    assert stacks.count("most recent call first") >= 3
    assert stacks.count("state T") == 1
    for cost in (killed, stopped):
        assert cost["recover_seconds"] < RECOVER_SECONDS
