"""A disk with errors: the C library's own write and fsync fail with EIO under a real run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import events, recipe_on

from cuboid.trainer.inspection import listing, verify
from cuboid.trainer.runlog import read_metrics


def broken_disk(folder: Path) -> Path:
    library = folder / "io_error.so"
    source = Path(__file__).with_name("io_error.c")
    # g++ is what CI has; -x c, since the file is C
    command = ["g++", "-x", "c", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return library


@pytest.mark.full
def test_a_run_outlives_io_errors_while_it_saves(tmp_path: Path) -> None:
    changes = {
        "train": {"steps": 8},
        "checkpoint": {"every": 2, "keep": 10, "asynchronous": False},
        "launch": {"launcher": "local"},
    }
    recipe, file = recipe_on("1x2x1", changes=changes), tmp_path / "recipe.yaml"
    file.write_text(recipe.model_dump_json())
    broken = {
        "LD_PRELOAD": str(broken_disk(tmp_path)),
        "EIO_WRITE": ".partial-00000004",
        "EIO_FSYNC": ".partial-00000006",
    }
    command = [sys.executable, "-m", "cuboid.launch.cli", "train", str(file)]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | broken, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / recipe.name
    assert [record["step"] for record in read_metrics(folder)] == list(range(1, 9)), "no step was done twice"
    assert not events(folder, "failure"), "no rank was started again"
    failed = events(folder, "checkpoint_failed")
    assert [event["step"] for event in failed] == [4, 6]
    for event in failed:
        assert "Input/output error" in event["cause"]
        assert event["newest"] == str(folder / "checkpoints" / "step-00000002")
    assert done.stdout.count("checkpoint failed: ") == 2
    saved = {row["step"]: Path(row["path"]) for row in listing(folder)}
    assert saved.keys() == {2, 8}
    assert not any(verify(path) for path in saved.values()), "every byte is as its manifest says"
