"""What every launcher shares on the driver's side: a host process, the user's signals, the screen, the ending.

The driver is the user's command. It starts one host process in a session of its own, which starts the ranks (`local`,
`ray_cluster`), restarts them as `failures.Judge` says, and reports an `Ending`. Nothing of the session outlives it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path

from cuboid.launch.failures import STOPPED, Ending, shown, step_in_work, stop_reason
from cuboid.launch.progress import Screen
from cuboid.launch.worker import send_output_to
from cuboid.parallel.errors import RunFailed, UserError
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.runlog import STOP_FILE, RunLog, redact

Host = Callable[[], Ending]

HOST_LOG = Path("logs") / "launcher.txt"
_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def drive(recipe: Recipe, folder: Path, host: Host, *, quiet: bool = False) -> int:
    """Run ``host`` in its own process and session until it ends; returns the command's exit code. ``quiet`` shows
    nothing but failures.

    The first Ctrl-C, SIGTERM or SIGUSR1 asks the ranks to save and end, a second Ctrl-C ends everything at once.

    Raises:
        UserError: the run's folder cannot be written.
    """
    log = _open_folder(folder)
    screen = Screen(recipe, folder, quiet=quiet)
    log.event("launch", command_time=_command_time(), launcher=recipe.launch.launcher, name=recipe.name)
    with _signals() as received, _hosted(host, folder) as (process, receiver), screen:
        try:
            ending = _watch(process, receiver, received, screen, log, saves=recipe.checkpoint.every > 0)
        finally:
            end_session(process)
            screen.update()
    ending = _as_asked(replace(ending, words=redact(ending.words)), received, folder, recipe.train.steps)
    log.event("end", code=ending.code, cause=ending.words or None)
    screen.conclude(ending)
    return ending.code


def _open_folder(folder: Path) -> RunLog:
    """The log of a folder that can be written, without the leavings of an earlier launch."""
    log = RunLog(folder)
    try:
        (folder / STOP_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder / "errors", ignore_errors=True)
        for name in ("errors", "logs"):
            (folder / name).mkdir(exist_ok=True)
        (folder / HOST_LOG).open("a").close()
    except OSError as error:
        raise UserError(f"the run's folder {folder} cannot be written: {error.strerror}") from error
    return log


@contextmanager
def _hosted(host: Host, folder: Path) -> Iterator[tuple[ForkProcess, Connection]]:
    """The host's process and the pipe on which it tells its ending. Forked before the screen has a thread."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_host_main, args=(host, folder, sender), name="cuboid-launcher")
    process.start()
    sender.close()
    with receiver:
        yield process, receiver


def _watch(
    process: ForkProcess, receiver: Connection, received: list[int], screen: Screen, log: RunLog, *, saves: bool
) -> Ending:
    """Keep the screen and obey the user until the host has told how it ended, or is gone."""
    obeyed = 0
    while True:
        before = screen.steps_done
        screen.update()
        if screen.steps_done and not before:
            log.event("phase", name="first step")
        if len(received) > obeyed:
            obeyed = len(received)
            no_step_is_lost = screen.steps_done == 0
            if no_step_is_lost or received.count(signal.SIGINT) > 1 or not ask_to_stop(log.folder, _reason(received)):
                return Ending(code=STOPPED[_reason(received)], words="stopped at once")
            checkpoint = ", with a checkpoint" if saves else ""
            screen.say(f"stopping after this step{checkpoint}; Ctrl-C again stops at once")
        ready = wait([receiver, process.sentinel], timeout=_POLL_SECONDS)
        if receiver in ready:
            try:
                return receiver.recv()
            except EOFError:
                process.join()
        if not process.is_alive():
            where = shown(log.folder / HOST_LOG)
            return Ending(code=1, words=f"the launcher's own process died (exit code {process.exitcode}; {where})")


def _reason(received: list[int]) -> str:
    return "interrupt" if received[0] == signal.SIGINT else "signal"


def ask_to_stop(folder: Path, reason: str) -> bool:
    """Whether the ranks could be asked; a full disk takes no request, and no checkpoint either."""
    new = folder / f".{STOP_FILE}.{os.getpid()}"
    try:
        new.write_text(reason)
        os.replace(new, folder / STOP_FILE)
    except OSError:
        return False
    return True


def _as_asked(ending: Ending, received: list[int], folder: Path, steps: int) -> Ending:
    """Ranks that were asked to stop end well; unless that was the last step anyway, the exit code tells. A job system
    may have asked on another node alone."""
    reason = _reason(received) if received else stop_reason(folder)
    (folder / STOP_FILE).unlink(missing_ok=True)
    done = step_in_work(folder) - 1
    if ending.code or not reason or done >= steps:
        return ending
    return Ending(code=STOPPED[reason], words=f"stopped after step {done} of {steps}")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The stop signals that come to this process, collected instead of obeyed."""
    received: list[int] = []

    def note(number: int, frame: types.FrameType | None) -> None:
        received.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _host_main(host: Host, folder: Path, sender: Connection) -> None:
    os.setsid()  # the terminal's Ctrl-C is the driver's alone, and the session holds all that is started from here
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    end_with_driver()
    send_output_to(folder / HOST_LOG)
    try:
        ending = host()
    except UserError as error:
        ending = Ending(code=2, words=str(error))
    except RunFailed as error:
        ending = Ending(code=1, words=str(error))
    except Exception as error:
        traceback.print_exc()
        words = f"the launcher failed: {type(error).__name__}: {error} ({shown(folder / HOST_LOG)})"
        ending = Ending(code=1, words=words)
    sender.send(ending)


def end_with_driver() -> None:
    """End the whole session of this process once the driver is gone. Until then stop signals, which job systems send to
    every process that they see, are the driver's business alone."""

    def end(number: int, frame: types.FrameType | None) -> None:
        kill_session(os.getpid())
        os._exit(1)

    def leave(number: int, frame: types.FrameType | None) -> None:
        """Not SIG_IGN, which programs started from here would inherit."""

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGUSR2, end)
    die_with_parent(signal.SIGUSR2)


def die_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent is gone, however it went. Linux only."""
    parent = parent_process()
    if sys.platform != "linux" or parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent.pid:
        os.kill(os.getpid(), number)


def end_session(leader: ForkProcess) -> None:
    """Kill the host and whatever it has started, also what others have adopted since."""
    leader.kill()
    leader.join()
    assert leader.pid is not None
    kill_session(leader.pid)


def kill_session(session: int) -> None:
    """Kill every process of a session but the caller, and wait until they are gone."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        members = [pid for pid in _session_members(session) if pid != os.getpid()]
        if not members:
            return
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _session_members(session: int) -> Iterator[int]:
    """Live processes of a session, as /proc tells."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            # pid (command) state parent group session ...: a command may hold blanks and brackets
            state, _, _, owner, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(owner) == session and state not in "ZX":
            yield int(entry.name)


def _command_time() -> float:
    """When this command's process was started, in seconds since 1970; now, where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return time.time()
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
