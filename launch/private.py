"""What a process writes is its owner's alone: modes of files, and no secret in what it prints. Imports no torch."""

from __future__ import annotations

import logging
import os
import re
import sys
from typing import Any

from cuboid.parallel.errors import FieldError
from cuboid.trainer.runlog import redact

UMASK = "CUBOID_UMASK"
_OWNER_ONLY = 0o077


def keep_files_private() -> None:
    """Files and folders made from now on, here and in processes started from here: 0600 and 0700, or what `UMASK` in
    the environment leaves, such as 027 for a group that shares its runs.

    Raises:
        FieldError: the variable holds something else.
    """
    chosen = os.environ.get(UMASK)
    if chosen is None:
        os.umask(os.umask(_OWNER_ONLY) | _OWNER_ONLY)
    elif re.fullmatch(r"0?0[0-7]{2}", chosen):  # the owner's own digit takes nothing away
        os.umask(int(chosen, 8))
    else:
        raise FieldError(UMASK, chosen, "is no umask that leaves the owner his files", "use 077, 027 or 007")


def redact_output() -> None:
    """Take secrets out of what Python prints to standard output and error from now on; loggers that hold these streams
    are given the new ones. What libraries in C write by themselves is not seen."""
    streams = {sys.stdout: Redacted(sys.stdout), sys.stderr: Redacted(sys.stderr)}
    loggers = [logging.root, *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict))]
    for handler in (handler for logger in loggers for handler in logger.handlers):
        held = vars(handler).get("stream")  # not those that look for the stream each time
        if isinstance(handler, logging.StreamHandler) and held in streams:
            handler.setStream(streams[held])
    sys.stdout, sys.stderr = streams[sys.stdout], streams[sys.stderr]


class Redacted:
    """A text stream whose every write passes `redact`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
