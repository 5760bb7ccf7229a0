"""Every other test stands on the harness: a failing rank is found, named first, and nobody waits for ever."""

from __future__ import annotations

import os
import re
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from harness import RanksFailed, _report, run_ranks


def rank() -> int:
    return int(os.environ["RANK"])


def test_every_rank_gives_back_its_own() -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    found = run_ranks(lambda word: (word, *(os.environ[name] for name in names)), 3, "same")
    assert found == [("same", str(number), str(number), "3") for number in range(3)]


def fail_one_after_the_other() -> None:
    if rank() != 2:
        time.sleep(1 + rank() / 2)
        raise ConnectionError(f"rank {rank()} lost its neighbour")
    raise ValueError("the cause")


def test_the_rank_that_failed_first_stands_first_and_the_echo_after_it() -> None:
    with pytest.raises(RanksFailed) as error:
        run_ranks(fail_one_after_the_other, 3)
    report = str(error.value)
    assert re.findall(r"^rank (\d) failed:$", report, re.MULTILINE) == ["2", "0", "1"]
    first, _, echo = report.partition("rank 0 failed:")
    assert "in fail_one_after_the_other" in first, "where it failed is said"
    assert "ValueError: the cause" in first
    assert "ConnectionError: rank 0 lost its neighbour" in echo
    assert "ConnectionError: rank 1 lost its neighbour" in echo


def hang_alone(which: int) -> str:
    while rank() == which:
        time.sleep(0.1)
    return "done"


def hang() -> None:
    time.sleep(60)


def test_ranks_that_hang_end_with_the_stacks_of_every_one() -> None:
    began = time.monotonic()
    with pytest.raises(RanksFailed) as error:
        run_ranks(hang, 2, timeout=3)
    assert time.monotonic() - began < 30
    report = str(error.value)
    assert "failed:" not in report
    for number in range(2):
        assert re.search(rf"rank {number} stood here:\n.*(\n  File .*)*in hang\n(  File .*\n)*.*in _rank_main", report)


def test_a_rank_that_hangs_alone_is_named() -> None:
    with pytest.raises(RanksFailed) as error:
        run_ranks(hang_alone, 3, 1, timeout=3)
    assert re.findall(r"^rank (\d) stood here:$", str(error.value), re.MULTILINE) == ["1"]
    assert "in hang_alone" in str(error.value)


def die_in_silence() -> None:
    if rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_dies_without_a_word_is_named_with_its_exit_code() -> None:
    with pytest.raises(RanksFailed, match=r"^rank 0 failed:\ndied with exit code -9$"):
        run_ranks(die_in_silence, 2)


def test_a_result_that_cannot_travel_is_a_failure() -> None:
    with pytest.raises(RanksFailed, match=r"rank 0 failed:\n(.*\n)*.*pickle"):
        run_ranks(lambda: lambda: None, 1)


def test_a_rank_that_has_not_begun_is_not_killed_by_the_question_where_it_stands(tmp_path: Path) -> None:
    process = get_context("fork").Process(target=hang)
    process.start()
    try:
        assert _report([], [0], [process], tmp_path) == "rank 0 stood here:\nit had not begun"
        time.sleep(0.2)
        assert process.is_alive()
    finally:
        process.kill()
        process.join()
