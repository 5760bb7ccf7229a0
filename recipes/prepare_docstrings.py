"""make docstrings: conversations that ask for the docstring of a function, out of Python's own standard library.

Each line of the files is {"module": ..., "messages": [user, assistant]}: the user shows the source of a function or
method without its docstring, the assistant answers with the docstring. The files of preferences have {"module": ...,
"prompt": [user], "chosen": [assistant], "rejected": [assistant]}: the worse answer is the next function's docstring.
No download; the same for one Python release.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NOT_READ = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
MAX_SOURCE, MIN_ANSWER, MAX_ANSWER = 1200, 20, 600
"""Characters: what is longer would be cut in short sequences, what is shorter says nothing."""
HELD_OUT_IN = 8
"""One of so many modules is held out."""


@dataclass(frozen=True)
class Pair:
    """A function's source without its docstring, and the docstring."""

    module: str
    """Top-level module or package: what is held out is held out whole."""
    source: str
    docstring: str


def pairs() -> list[Pair]:
    """Of every module, in the order of paths; what occurs twice, anywhere, is taken once."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    seen: set[str] = set()
    found = []
    for file in files:
        if NOT_READ & set(file.parts):
            continue
        for pair in read(root / file, module=file.parts[0].removesuffix(".py")):
            if not seen & {pair.source, pair.docstring}:
                found.append(pair)
            seen |= {pair.source, pair.docstring}
    return found


def read(path: Path, *, module: str) -> Iterator[Pair]:
    """The documented functions and methods of a file."""
    try:
        text = path.read_text("utf-8")
        tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):  # a few sources are so on purpose
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        first = node.body[0]
        if docstring is None or first.end_lineno is None or first.lineno <= node.lineno:
            continue
        kept = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
        source = inspect.cleandoc("\n" + "\n".join(kept))
        if len(source) <= MAX_SOURCE and MIN_ANSWER <= len(docstring) <= MAX_ANSWER:
            yield Pair(module, source, docstring)


def is_held_out(module: str) -> bool:
    return int(hashlib.sha256(module.encode()).hexdigest(), 16) % HELD_OUT_IN == 0


def line(pair: Pair) -> str:
    return _line(pair, messages=[_asked(pair), _answered(pair)])


def line_of_preference(pair: Pair, other: Pair) -> str:
    return _line(pair, prompt=[_asked(pair)], chosen=[_answered(pair)], rejected=[_answered(other)])


def _asked(pair: Pair) -> dict[str, str]:
    question = f"Write the docstring of this Python function.\n\n```python\n{pair.source}\n```"
    return {"role": "user", "content": question}


def _answered(pair: Pair) -> dict[str, str]:
    return {"role": "assistant", "content": pair.docstring}


def _line(pair: Pair, **columns: object) -> str:
    return json.dumps({"module": pair.module, **columns}, ensure_ascii=False) + "\n"


def prepare(out: Path) -> None:
    """Write train.jsonl, heldout.jsonl and the same of preferences to ``out``, which appears when all are whole."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    found = pairs()
    for name, held_out in (("train", False), ("heldout", True)):
        chosen = [pair for pair in found if is_held_out(pair.module) == held_out]
        (partial / f"{name}.jsonl").write_text("".join(map(line, chosen)), "utf-8")
        beside = map(line_of_preference, chosen, [*chosen[1:], *chosen[:1]])
        (partial / f"preferences-{name}.jsonl").write_text("".join(beside), "utf-8")
        print(f"{out / name}.jsonl: {len(chosen)} pairs of {len({pair.module for pair in chosen})} modules")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
