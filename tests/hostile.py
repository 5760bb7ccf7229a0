"""What a hostile input costs, measured in a process of its own; and what makes an input hostile."""

from __future__ import annotations

import json
import os
import resource
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from cuboid.parallel.errors import UserError

MEGABYTES, SECONDS = 200, 1.0
_HANG_SECONDS = 60.0
ALWAYS = settings(deadline=None, derandomize=True, max_examples=60, database=None)
"""Of a fuzz test: the same inputs each time."""
BOMBS = {
    "lists": b'{"a": [' + b"[]," * 3_000_000 + b"[]]}",
    "lists within bounds": b'{"a": [' + b"[]," * 245_000 + b"[]]}",
    "mappings within bounds": b'{"a": [' + b'{"":0},' * 165_000 + b"{}]}",
    "keys within bounds": b"{" + b",".join(b'"%x":0' % number for number in range(245_000)) + b"}",
    "text within bounds": b'{"a": "' + b"x" * (15 << 20) + "\U0001f600".encode() + b'"}',
    "text": b" " * (20 << 20) + b"{}",
    "depth": b'{"a": ' + b"[" * 2_000_000,
    "shallower": b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}",
    "number": b'{"a": ' + b"9" * 1_000_000 + b"}",
    "twice": b'{"a": 1, "a": 2}',
    "text that is none": b"\xff\xfe",
}


def refusal(work: Callable[..., Any], *args: Any) -> str:
    """The words with which ``work(*args)`` refuses. It must cost less than `SECONDS` of the processor and `MEGABYTES`
    beyond what the process held before, which has all imports done."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measured, args=(sender, work, args))
    child.start()
    sender.close()
    answered = receiver.poll(_HANG_SECONDS)
    told = receiver.recv() if answered else ("", 0.0, 0.0, "")
    child.kill()
    child.join()
    assert answered, f"not refused within {_HANG_SECONDS:.0f} s"
    words, seconds, megabytes, trouble = told
    assert not trouble, trouble
    assert words, "not refused"
    assert seconds < SECONDS, f"{seconds:.2f} s: {words[:200]}"
    assert megabytes < MEGABYTES, f"{megabytes:.0f} MB: {words[:200]}"
    return words


def _measured(sender: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    words = trouble = ""
    before, started = _held_bytes(), time.process_time()
    try:
        work(*args)
    except UserError as error:
        words = str(error)
    except BaseException:
        trouble = traceback.format_exc()
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of this process alone: a fork begins anew
    sender.send((words, seconds, (peak - before) / 1e6, trouble))
    sender.close()
    os._exit(0)


def _held_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def header_of_many(count: int) -> bytes:
    """Valid, and of tensors that hold nothing."""
    text = b"{%s}" % b",".join(b'"%x":{"dtype":"U8","shape":[],"data_offsets":[0,0]}' % i for i in range(count))
    return len(text).to_bytes(8, "little") + text


@contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    good = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(good)


@st.composite
def mutations(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with a few pieces replaced, moved, repeated, or left out."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(found)))
        stop = min(len(found), start + draw(st.integers(0, 12)))
        words = st.sampled_from(
            [b"[", b"{", b'"', b"-1", b"1e999", b"NaN", b"null", b"true", b"../x", b"\xff", b",", b""]
        )
        found[start:stop] = draw(words | st.binary(max_size=8) | st.just(bytes(found[start:stop] * 2)))
    return bytes(found)
