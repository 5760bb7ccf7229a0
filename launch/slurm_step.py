"""Ranks on all nodes of a Slurm job, without Ray: `srun` starts an agent on each node, which forks the node's ranks.

The driver's side; it runs on the job's first node, within the batch script (`slurm`), and starts the step again after a
failure as `failures.Judge` says. `slurm_node` is the agent. Agents speak through their standard output, which srun
brings here whatever the nodes' network and storage are like, one JSON object a line; and they end with their standard
input, which is open as long as this process lives.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from cuboid.launch import worker
from cuboid.launch.failures import STOPPED, Ending, Failure, Judge, shown
from cuboid.launch.placement import ranks_per_node
from cuboid.launch.supervise import HOST_LOG, drive
from cuboid.launch.watch import forget, tell_hang
from cuboid.parallel.errors import FieldError, RunFailed, UserError, one_of
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.version import version

_START_SECONDS = 60.0
"""Within which every node must have begun."""
_SETTLE_SECONDS = 5.0
"""How long the other nodes have to say what they saw once one has failed."""


_END_SECONDS = 20.0
"""For srun to end a step on nodes that answer."""


class NodesMissing(RunFailed):
    """Some nodes of the job did not begin."""


def launch(recipe: Recipe, folder: Path) -> int:
    """Run the recipe on the nodes of this Slurm job; returns the command's exit code.

    Args:
        recipe: resolved.
        folder: the run's folder, on storage that every node sees.

    Raises:
        UserError: this is no Slurm job; its nodes cannot share the ranks evenly; the run's folder cannot be written.
    """
    folder, nodes = folder.absolute(), job_nodes()
    size = ranks_per_node(recipe.layout, len(nodes))
    return drive(recipe, folder, partial(_host, recipe, folder, nodes, size))


def job_nodes(field: str = "launch.launcher") -> list[str]:
    """Names of the job's nodes, as Slurm orders them. Raises FieldError outside of a job, about the ``field`` that asks
    for one."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        constraint, remedy = "runs within a Slurm job, and this is none", "write a job with `cuboid slurm`"
        raise FieldError(field, "slurm", constraint, remedy)
    command = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def _host(recipe: Recipe, folder: Path, nodes: Sequence[str], size: int) -> Ending:
    judge = Judge(folder, max_failures=recipe.launch.max_failures, world_size=recipe.layout.world_size)
    attempt = 0
    while True:
        attempt += 1
        try:
            failed = run_step(folder, nodes, size)
        except NodesMissing as error:
            if attempt == 1:
                raise
            # the failure before was that of a node: in the queue the job gets another one
            return Ending(code=STOPPED["signal"], words=str(error))
        if not failed.nodes:
            return Ending(code=0)
        if failed.hang:
            tell_hang(recipe, folder, failed.hang)
        ending = judge.verdict(failed.failures)
        if ending is not None:
            return ending


@dataclass
class Failed:
    """What went wrong in a step."""

    nodes: set[str] = field(default_factory=set)
    """Those that did not end well."""
    failures: list[Failure] = field(default_factory=list)
    """What nobody else has written down."""
    hang: dict[int, str] = field(default_factory=dict)
    """The state of each rank in a hang, of the nodes that have seen it."""


def run_step(folder: Path, nodes: Sequence[str], size: int) -> Failed:
    """One attempt: an agent on each node with ``size`` ranks; none of them is left afterwards.

    Raises:
        NodesMissing: some do not begin.
        UserError: a node does not see the folder, or has another version.
    """
    forget(folder, range(len(nodes) * size))
    # rank 0's node is this one: Slurm runs a batch script on the job's first node
    where = [socket.gethostname(), str(worker.free_port()), str(size)]
    agent = [sys.executable, "-m", "cuboid.launch.slurm_node", str(folder), *where]
    # the agent's ranks share the node's cores among themselves
    flags = [f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1", "--cpu-bind=none"]
    command = ["srun", *flags, "--quit-on-interrupt", *agent]
    # in a session of its own: killed with this one, srun could not end its agents
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as step:
        assert step.stdout is not None
        try:
            return _follow(step.stdout, folder, nodes, size)
        finally:
            end_step(step)


def _follow(agents: IO[str], folder: Path, nodes: Sequence[str], size: int) -> Failed:
    """Hear what the agents say until srun has ended, or they have had the time to say why they fail."""
    words: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(agents, words), daemon=True).start()
    missing, running, failed = list(nodes), list(nodes), Failed()
    deadline: float | None = time.monotonic() + _START_SECONDS
    srun_ended = False
    while not srun_ended and failed.nodes != set(nodes):
        try:
            word = words.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if word is None:
            srun_ended = True
            continue
        if "hang" in word:  # its ranks are left as they are, for the other nodes to see it too
            failed.nodes.add(word["node"])
            failed.hang |= {int(rank): state for rank, state in word["hang"].items()}
            deadline = deadline or time.monotonic() + _SETTLE_SECONDS
            continue
        if "failures" not in word:
            _check(word, folder)
            missing.remove(word["node"])
            deadline = deadline if missing or failed.nodes else None
            continue
        running.remove(word["node"])
        if word["failures"]:
            failed.nodes.add(word["node"])
            failed.failures += [Failure(**failure) for failure in word["failures"]]
            deadline = time.monotonic() + _SETTLE_SECONDS
    if missing and not failed.nodes:
        when = "before srun ended" if srun_ended else f"within {_START_SECONDS:.0f} s"
        raise NodesMissing(f"node {one_of(missing)} did not begin {when} ({shown(folder / HOST_LOG)})")
    if srun_ended:
        failed.nodes.update(running)
        failed.failures += [_lost(nodes.index(node) * size, node) for node in running]
    return failed


def _read(agents: IO[str], words: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """What each line of the agents says, and None at their end; what else nodes print there goes to the log."""
    for line in agents:
        try:
            words.put(json.loads(line))
        except ValueError:
            print(line, end="")
    words.put(None)


def _check(seat: dict[str, Any], folder: Path) -> None:
    """Raises UserError where a node could not train what this one does."""
    node = seat["node"]
    if not seat["sees_folder"]:
        remedy = "give `runs` as an absolute path that every node sees"
        raise UserError(f"node {node} does not see the run's folder {folder}; {remedy}")
    if seat["version"] != version():
        raise UserError(f"node {node} has cuboid {seat['version']}, this command is {version()}; install the same")


def _lost(rank: int, node: str) -> Failure:
    """Of a node whose agent is gone without a word; its first rank stands for all."""
    return Failure(rank=rank, cause=f"was lost with its node {node}", silent=True, time=time.time())


def end_step(step: subprocess.Popen[Any]) -> None:
    """Nothing of it is left: the end of srun's standard input is that of its agents."""
    assert step.stdin is not None
    step.stdin.close()
    if step.poll() is None:
        step.send_signal(signal.SIGINT)
    try:
        step.wait(timeout=_END_SECONDS)
    except subprocess.TimeoutExpired:
        step.kill()
