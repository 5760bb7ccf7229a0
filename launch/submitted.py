"""Within a job of a Ray cluster: which cuboid runs, and whether it is the one that was sent. Imports no torch."""

from __future__ import annotations

import os
import socket

from cuboid.parallel.errors import UserError
from cuboid.trainer.version import version

SENT = "CUBOID_SENT_VERSION"
"""The variable in which `cuboid submit` tells the job what it has sent."""


def was_sent() -> bool:
    """Whether this process belongs to a job of `cuboid submit`."""
    return SENT in os.environ


def tell_version() -> None:
    """Say in a job's log which cuboid runs. Raises UserError where another one was sent."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # set by Ray for the command of a job
        return
    print(f"cuboid {version()} on {socket.gethostname()}", flush=True)
    sent = os.environ.get(SENT, version())
    if sent != version():
        remedy = "see that nothing stands before the job's working directory on PYTHONPATH there"
        raise UserError(f"the job was sent with cuboid {sent}, and {version()} runs; {remedy}")
