"""Ranks of an earlier start: they end once a newer one has begun, and write nothing into its log."""

import os
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import standin

from cuboid.launch import fence, worker

JOINED = """
import sys, time
from pathlib import Path
from cuboid.launch import fence
fence.join(Path(sys.argv[1]), sys.argv[2])
print("joined", flush=True)
time.sleep(600)
"""


def test_a_rank_ends_once_a_newer_start_has_begun(tmp_path):
    command = [sys.executable, "-c", JOINED, str(tmp_path), fence.begin(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as rank:
        try:
            assert rank.stdout.readline() == "joined\n"
            assert rank.poll() is None
            fence.begin(tmp_path)
            _, said = rank.communicate(timeout=60)
        finally:
            rank.kill()
    assert (rank.returncode, said) == (1, "a newer start of this run has begun: this rank ends\n")


def overtaken(recipe: object, folder: Path) -> None:
    """A rank whose peers have ended before it looked."""
    fence.begin(folder)
    raise ConnectionError("connection closed by peer")


def rank(folder: Path, *, joined: bool) -> None:
    os.environ["RANK"] = "0"
    if joined:
        os.environ[fence.NAME] = fence.begin(folder)
    worker.run(standin.recipe().model_dump(), str(folder), train=overtaken)


def test_what_befalls_an_overtaken_rank_is_no_event_of_the_newer_ones(tmp_path):
    for joined, told in ((True, 0), (False, 1)):
        folder = tmp_path / f"joined-{joined}"
        folder.mkdir()
        process = get_context("fork").Process(target=rank, args=(folder,), kwargs={"joined": joined})
        process.start()
        process.join(60)
        assert process.exitcode == 70
        assert len(standin.events(folder, "rank_error")) == told
