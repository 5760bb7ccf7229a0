"""A real Slurm of two nodes on this machine: munge, slurmctld and two slurmd with a folder of their own.

The second node is as another machine to those who ask: it has a hostname and numbers of processes of its own
(namespaces, for which one must be root).
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from cuboid.launch.worker import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2")
_APART = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]

_CONF = """\
ClusterName=cuboid
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it starts again; 120 s by default
AuthInfo=socket={folder}/munge.socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
ReturnToService=1
SlurmdTimeout=60
KillWait=20
MinJobAge=600
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,sched_interval=1,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=8000
NodeName=n2 NodeHostname=n2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=8000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=60 State=UP PriorityTier=1
PartitionName=urgent Nodes=n[1-2] MaxTime=60 State=UP PriorityTier=2
"""


class Cluster:
    """The running cluster: its client programs, with SLURM_CONF in the environment."""

    def __init__(self, folder: Path, commands: Mapping[str, list[str]], stack: ExitStack) -> None:
        self.folder, self._commands, self._stack = folder, commands, stack
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        """Start a daemon, or start it again."""
        self.daemons[name] = self._stack.enter_context(_daemon(self.folder, name, self._commands[name]))

    def second_node(self) -> list[psutil.Process]:
        """All that runs there."""
        return psutil.Process(self.daemons["n2"].pid).children(recursive=True)

    def process(self, host: str, pid: int) -> psutil.Process:
        """By the number that it has on its machine."""
        return next(p for p in self.second_node() if _own_pid(p) == pid) if host == "n2" else psutil.Process(pid)

    def ask(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """``RUNNING``, ``COMPLETED``, ... of a job, also one that has ended."""
        return self.job(job)["JobState"]

    def job(self, job: str) -> dict[str, str]:
        words = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def cancel(self) -> None:
        """End every job, as a user does."""
        self.ask("scancel", "--user", getpass.getuser())
        self.wait(lambda: not self.ask("squeue", "--noheader"))

    def wait(self, holds: Callable[[], object], *, seconds: float = 60) -> None:
        wait_until(holds, seconds=seconds, log=self.folder / "slurmctld.log")


def wait_until(holds: Callable[[], object], *, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"nothing came of it\n{log.read_text()[-3000:] if log.exists() else ''}"
        time.sleep(0.1)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster in ``folder``, which ends with the block. The path must be short, since sockets lie there; SLURM_CONF
    must name its ``slurm.conf``."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]:
        raise FileNotFoundError(f"no {', '.join(missing)} here: apt-get install munge slurmctld slurmd slurm-client")
    tried = subprocess.run([*_APART, "hostname", "n2"], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise PermissionError(f"no second machine can be made of this one, which only root can: {tried.stderr.strip()}")
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    host, ports = socket.gethostname().partition(".")[0], _free_ports(3)
    conf = folder / "slurm.conf"
    conf.write_text(_CONF.format(folder=folder, host=host, ports=ports, user=getpass.getuser()))
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    places = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    munge = [f"--{name}={folder / file}" for name, file in (places | {"log-file": "munge.log"}).items()]
    commands = {
        "munged": ["munged", "--foreground", "--force", *munge],
        "slurmctld": ["slurmctld", "-D", "-f", str(conf)],
        "n1": ["slurmd", "-D", "-f", str(conf), "-N", "n1"],
        "n2": [*_APART, "sh", "-c", f"hostname n2 && slurmd -D -f {conf} -N n2; exit"],
    }
    with ExitStack() as stack:
        running = Cluster(folder, commands, stack)
        for name in commands:
            running.start(name)
            if name == "munged":
                wait_until((folder / "munge.socket").exists, seconds=20, log=folder / "munged.out")
        running.wait(lambda: _idle_nodes() == len(NODES))
        yield running


def _own_pid(process: psutil.Process) -> int | None:
    """As its own machine counts; None where it has just ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return None
    return int(status.partition("\nNSpid:")[2].partition("\n")[0].split()[-1])


def _idle_nodes() -> int:
    done = subprocess.run(["sinfo", "-hN", "-p", "main", "-o", "%T"], capture_output=True, text=True, check=False)
    return done.stdout.split().count("idle")


def _free_ports(number: int) -> list[int]:
    found: list[int] = []
    while len(found) < number:
        port = free_port()
        if port not in found:
            found.append(port)
    return found


def _path() -> str:
    """Debian puts daemons where only root looks."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])


@contextmanager
def _daemon(folder: Path, name: str, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / f"{name}.out").open("ab") as out:
        environment = os.environ | {"PATH": _path()}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
        )
        try:
            yield process
        finally:
            signal_daemon(process, signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def signal_daemon(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Tell the daemon, and who started it; no job, since these have groups of their own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
