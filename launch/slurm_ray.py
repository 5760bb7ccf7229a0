"""A Ray cluster on the nodes of a Slurm job, for one run: `srun` starts a raylet on each, and it ends with the command.

Python's own view of it: `cluster` is the command's side, ``python -m cuboid.launch.slurm_ray`` a node's. It has a token
of its own, and ports that are free, so that jobs which share a node do not meet. `ray stop` and `ray symmetric-run` are
not used: they end every Ray process of the user on a node. Imports no Ray.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cuboid.launch.failures import shown
from cuboid.launch.slurm_node import stop_when_told
from cuboid.launch.slurm_step import end_step, job_nodes
from cuboid.launch.supervise import HOST_LOG, kill_session
from cuboid.launch.worker import free_port, send_output_to
from cuboid.parallel.errors import RunFailed

_HEAD_SECONDS = 60.0
"""For the head to listen."""
JOIN_SECONDS = 60.0
"""For the nodes to join it."""
_END_SECONDS = 15.0
"""For Ray's processes to end, and for agents to clean up."""
_OBJECT_STORE_BYTES = 80 * 2**20  # no data travels through it; Ray's least is 75 MiB


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Within: HOST:PORT of the head, and the names of the nodes that join it. The environment holds the token, for this
    process and those that it starts.

    Raises:
        FieldError: this is no Slurm job.
        RunFailed: the head does not begin.
    """
    nodes = job_nodes("launch.address")
    token = folder / ".ray" / "token"
    token.parent.mkdir(exist_ok=True)
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    os.environ.pop("RAY_AUTH_TOKEN", None)
    head = f"{_own_address()}:{free_port()}"
    agent = [sys.executable, "-m", "cuboid.launch.slurm_ray", str(folder), head]
    flags = [f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1", "--cpu-bind=none"]
    # in a session of its own: killed with this one, srun could not end its agents
    with subprocess.Popen(
        ["srun", *flags, "--quit-on-interrupt", *agent], stdin=subprocess.PIPE, start_new_session=True
    ) as step:
        try:
            if not _listens(head):
                raise RunFailed(f"Ray's head did not begin on {nodes[0]} ({shown(folder / _log(0))})")
            yield head, nodes
        finally:
            assert step.stdin is not None
            step.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                step.wait(_END_SECONDS)
            end_step(step)


def _own_address() -> str:
    """By which other machines reach this one: that of the interface which leads out. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of RFC 5737, nobody's
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def main() -> None:
    """A node's side: its raylet, and on the first node the head, until standard input ends."""
    folder, head = Path(sys.argv[1]), sys.argv[2]
    name, index = os.environ["SLURMD_NODENAME"], int(os.environ["SLURM_PROCID"])
    send_output_to(folder / _log(index))
    # short, since sockets lie there; and this user's and job's own, as /tmp/ray is of whoever came first
    place = Path("/tmp") / f"cuboid-{os.getuid()}-{os.environ['SLURM_JOB_ID']}"
    stop_when_told(folder)
    # What Slurm sends to every process would end Ray's before the ranks have saved: so they begin with these signals
    # blocked, which fork and exec pass on, and which Ray leaves as it is.
    told = (signal.SIGTERM, signal.SIGUSR1)
    signal.pthread_sigmask(signal.SIG_BLOCK, told)
    command = _raylet(name, index, head, place)
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True) as raylet:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, told)
        threading.Thread(target=_end_with_driver, args=(raylet,), daemon=True).start()
        raylet.wait()
    kill_session(raylet.pid)
    shutil.rmtree(place, ignore_errors=True)


def _raylet(name: str, index: int, head: str, place: Path) -> list[str]:
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    words += [f"--node-name={name}", f"--num-cpus={os.environ['SLURM_CPUS_ON_NODE']}"]
    words += [f"--object-store-memory={_OBJECT_STORE_BYTES}", f"--dashboard-agent-listen-port={free_port()}"]
    words += ["--min-worker-port=0", "--max-worker-port=0"]  # whatever is free
    if index == 0:
        host, _, port = head.rpartition(":")
        words += ["--head", f"--node-ip-address={host}", f"--port={port}", f"--temp-dir={place}"]
        return [*words, "--dashboard-host=127.0.0.1", f"--dashboard-port={free_port()}"]
    _listens(head)  # Ray itself says why where it does not
    return [*words, f"--address={head}"]


def _log(index: int) -> Path:
    """Of a node, within the run's folder."""
    return HOST_LOG.with_name(f"node-{index}.txt")


def _listens(head: str) -> bool:
    """Once it does; whether it does in time."""
    host, _, port = head.rpartition(":")
    deadline = time.monotonic() + _HEAD_SECONDS
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError:
            time.sleep(0.5)
        else:
            return True
    return False


def _end_with_driver(raylet: subprocess.Popen[bytes]) -> None:
    """The end of standard input is that of the command, however it went."""
    while os.read(0, 1):
        pass
    kill_session(raylet.pid)  # what Ray has started listens to nothing milder


if __name__ == "__main__":
    main()
