"""What foreign code may cost, such as a chat template: time of the processor and memory. Imports no torch."""

from __future__ import annotations

import os
import resource
import signal
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AGAIN_SECONDS = 0.1
"""A raised error can fall into a destructor, which swallows it."""


class _Late(BaseException):
    """Not an Exception, which Jinja's compiler swallows where it tries what a constant expression gives."""


@contextmanager
def limited(*, seconds: float, megabytes: int) -> Iterator[None]:
    """Raise TimeoutError in the block after ``seconds`` of the processor, and MemoryError where this process grows by
    more than ``megabytes``. Signals come to the main thread alone; in another one nothing is limited.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: types.FrameType | None) -> None:
        raise _Late

    before, (soft, hard) = signal.signal(signal.SIGVTALRM, end), resource.getrlimit(resource.RLIMIT_AS)
    room = _address_bytes() + megabytes * 10**6
    resource.setrlimit(resource.RLIMIT_AS, (room if soft == resource.RLIM_INFINITY else min(room, soft), hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _AGAIN_SECONDS)
    try:
        yield
    except _Late:
        raise TimeoutError(f"not done after {seconds} s") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


def _address_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
