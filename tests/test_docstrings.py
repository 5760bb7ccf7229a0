"""`make docstrings`: enough pairs, nothing held out that is trained on, readable as chat."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from samples import prepared

SCRIPT = Path(__file__).parents[1] / "recipes" / "prepare_docstrings.py"
NAMES = ("train", "heldout")


def make(out: Path) -> str:
    done = subprocess.run([sys.executable, SCRIPT, out], check=True, capture_output=True, text=True, timeout=100)
    return done.stdout


def test_docstrings_of_the_standard_library_are_conversations(tmp_path: Path) -> None:
    printed = make(tmp_path / "made" / "docstrings")
    files = {name: tmp_path / "made" / "docstrings" / f"{name}.jsonl" for name in NAMES}
    rows = {name: [json.loads(line) for line in file.read_text().splitlines()] for name, file in files.items()}
    assert len(rows["train"]) >= 2000
    assert len(rows["heldout"]) >= 200
    assert f"{len(rows['train'])} pairs" in printed
    for said in (
        lambda row: row["module"],
        lambda row: row["messages"][0]["content"],
        lambda row: row["messages"][1]["content"],
    ):
        trained, held_out = ({said(row) for row in rows[name]} for name in NAMES)
        assert not trained & held_out, "what is held out is not trained on"
    for row in rows["train"]:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert assistant["content"] not in user["content"]
    for name, file in files.items():
        pairs = [json.loads(line) for line in file.with_name(f"preferences-{name}.jsonl").read_text().splitlines()]
        asked = [([*pair["prompt"], *pair["chosen"]], pair["module"]) for pair in pairs]
        assert asked == [(row["messages"], row["module"]) for row in rows[name]]
        assert [pair["rejected"] for pair in pairs] == [pair["chosen"] for pair in [*pairs[1:], pairs[0]]]
    for file in files.values():
        data = prepared(str(file), tmp_path / "cache", kind="chat", chat_template="chatml", sequence_length=2048)
        assert data.num_documents == len(rows[file.stem])
        assert data.packs is not None
        assert data.packs.dropped == 0


@pytest.mark.full
def test_the_same_files_each_time(tmp_path: Path) -> None:
    made = []
    for name in ("once", "twice"):
        make(tmp_path / name)
        made.append([hashlib.sha256((tmp_path / name / f"{part}.jsonl").read_bytes()).hexdigest() for part in NAMES])
    assert made[0] == made[1]
