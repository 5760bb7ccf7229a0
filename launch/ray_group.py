"""The group of ranks within Ray: the cluster, its room, the seats of the ranks, their restarts. The Ray door.

Ray Train starts and restarts the workers, one a rank. What is ours: which worker is which rank (`RankBackend`), and
whether a failed group starts again (`Restarts`); both run in Ray Train's controller.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.backend import Backend, BackendConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError

from cuboid.launch import fence, watch, worker
from cuboid.launch.failures import RESIZE, Ending, Failure, Judge, stop_reason
from cuboid.launch.placement import rank_order
from cuboid.launch.ray_room import Bundle, Room, wait_for_nodes
from cuboid.launch.supervise import end_with_driver
from cuboid.launch.worker import Place, Train
from cuboid.parallel.errors import RunFailed, UserError
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.runlog import STOP_FILE, RunLog, read_events
from cuboid.trainer.version import version

_OBJECT_STORE_BYTES = 80 * 2**20  # no data travels through it; Ray's least is 75 MiB
_START_FAILURES = 3
_SETTLE_SECONDS = 1.0
"""How long ranks have to write down their own cause once one has failed."""


class Group:
    """The ranks of one launch on a Ray cluster."""

    def __init__(self, recipe: Recipe, folder: Path, *, storage: Path) -> None:
        self.recipe, self.folder, self.storage = recipe, folder, storage
        self.size = recipe.layout.world_size

    def run(self, address: str | None, train: Train | None, nodes: Sequence[str] = ()) -> Ending:
        """Until the run has ended; Ray is left behind as it was found. ``nodes`` are those that must have joined.

        Raises:
            UserError: no cluster at the address, or one without room.
            RunFailed: the room is taken by other work; a node has not joined.
        """
        log = RunLog(self.folder)
        judge = Judge(self.folder, max_failures=self.recipe.launch.max_failures, world_size=self.size)
        self._connect(address)
        try:
            end_with_driver()  # ray.init has taken SIGTERM over
            wait_for_nodes(nodes)
            room = Room(self.recipe, is_own=address is None)
            recipe, bundle = room.find()
            log.event("phase", name="cluster")
            # The user's own threads a rank; on other machines there may be other numbers of cores and ranks.
            threads = None if address else os.environ.get("OMP_NUM_THREADS")
            while True:
                if room.is_elastic:
                    log.event("seated", data=recipe.layout.data, asked=self.recipe.layout.data, cluster=room.told())
                judge.world_size = recipe.layout.world_size
                try:
                    with room.asking_for_more(recipe, bundle, self.folder):
                        restarts = Restarts(self.folder, judge, is_elastic=room.is_elastic)
                        ending = self._fit(recipe, bundle, restarts, train, threads)
                except Unseated as unseated:
                    judge = unseated.judge
                else:
                    if stop_reason(self.folder) != RESIZE:
                        return ending
                if stop_reason(self.folder) == RESIZE:
                    (self.folder / STOP_FILE).unlink()
                recipe, bundle = room.find()
        finally:
            ray.shutdown()

    def _connect(self, address: str | None) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            _start_own(self.size, quiet)
            return
        _probe(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}") from error

    def _fit(
        self, recipe: Recipe, bundle: Bundle, restarts: Restarts, train: Train | None, threads: str | None
    ) -> Ending:
        """The ranks of the recipe, in this number, until they have ended.

        Raises:
            Unseated: a rank of an elastic run has failed, maybe with its node: the ranks look for room anew.
        """
        # Ray Train resumes what it finds under a name; our checkpoints are the truth, so no name comes twice.
        storage = self.storage / uuid.uuid4().hex
        storage.mkdir(parents=True)
        trainer = DataParallelTrainer(
            partial(worker.run, recipe.model_dump(), str(self.folder), train=train),
            backend_config=RankConfig(self.folder, storage, tensor=recipe.layout.tensor, threads=threads),
            scaling_config=ScalingConfig(
                num_workers=recipe.layout.world_size,
                use_gpu="GPU" in bundle,
                resources_per_worker=bundle,
                placement_strategy="PACK",
            ),
            run_config=RunConfig(
                name=storage.name,
                storage_path=str(self.storage),
                failure_config=FailureConfig(max_failures=-1, controller_failure_limit=_START_FAILURES),
                callbacks=[restarts],
            ),
        )
        try:
            with watch.watching(recipe, self.folder):
                trainer.fit()
        except ControllerError as error:
            cause = error.controller_failure
            if isinstance(cause, Unseated):
                raise cause from None
            if isinstance(cause, Ended):
                return cause.ending
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
            raise RunFailed(f"Ray could not keep the ranks running: {' '.join(str(cause).split())[:300]}") from error
        return Ending(code=0)


def _start_own(ranks: int, quiet: dict[str, Any]) -> None:
    """A cluster of this machine alone. On a machine under load its parts may miss one another; so it is tried twice."""
    for last in (False, True):
        try:
            # Ranks may outnumber cores: what Ray counts as a CPU here is room for a rank.
            ray.init(address="local", num_cpus=ranks, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
            return
        except Exception as error:  # Ray's own raise is as bare
            ray.shutdown()
            if last:
                raise RunFailed(f"Ray's local cluster does not start: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class Seat:
    """What a worker tells of itself."""

    node: str
    address: str
    host: str
    pid: int
    version: str
    sees_folder: bool


@dataclass
class RankConfig(BackendConfig):
    """Only environment variables; process groups are made by `cuboid.parallel.mesh` alone."""

    folder: Path
    probe: Path
    """A file that every node must see."""
    tensor: int
    threads: str | None
    """OMP_NUM_THREADS; None: each machine's cores shared out among its ranks."""

    @property
    def backend_cls(self) -> type[Backend]:
        return RankBackend


class RankBackend(Backend):
    """Gives each worker its rank before training starts there, at every start of the group."""

    share_cuda_visible_devices = True  # LOCAL_RANK chooses among the GPUs of the node, as under any launcher

    def on_start(self, worker_group: Any, backend_config: RankConfig) -> None:
        """Called by Ray Train in its controller once all workers are up.

        Raises:
            UserError: a node does not see the run's folder, has another version, or tensor ranks would not share one.
        """
        seats: list[Seat] = worker_group.execute(_describe, backend_config.probe)
        _check(seats, backend_config)
        watch.forget(backend_config.folder, range(len(seats)))
        group = fence.begin(backend_config.folder)
        ranks = rank_order([seat.node for seat in seats], backend_config.tensor)
        first = ranks.index(0)
        port = worker_group.execute_single(first, worker.free_port)
        placed: dict[str, dict[str, Any]] = {}
        settled = []
        for index, (rank, seat) in enumerate(zip(ranks, seats, strict=True)):
            neighbours = sorted(r for r, other in zip(ranks, seats, strict=True) if other.node == seat.node)
            place = Place(
                rank=rank,
                world_size=len(ranks),
                local_rank=neighbours.index(rank),
                local_size=len(neighbours),
                host=seats[first].address,
                port=port,
            )
            settled.append(worker_group.execute_single_async(index, _settle, place, backend_config, os.getcwd(), group))
            placed[str(rank)] = {"host": seat.host, "pid": seat.pid, "worker": index, "cuboid": seat.version}
        ray.get(settled)
        log = RunLog(backend_config.folder)
        log.event("phase", name="workers")
        log.event("workers", ranks=placed)


def _describe(probe: Path) -> Seat:
    return Seat(
        node=ray.get_runtime_context().get_node_id(),
        address=ray.util.get_node_ip_address(),
        host=socket.gethostname(),
        pid=os.getpid(),
        version=version(),
        sees_folder=probe.exists(),
    )


def _check(seats: Sequence[Seat], config: RankConfig) -> None:
    for seat in seats:
        if not seat.sees_folder:
            remedy = "give `runs` as an absolute path that every node sees"
            raise UserError(f"node {seat.host} does not see the run's folder {config.folder}; {remedy}")
        if seat.version != version():
            raise UserError(
                f"node {seat.host} has cuboid {seat.version}, this command is {version()}; install the same"
            )


def _settle(place: Place, config: RankConfig, directory: str, group: str) -> None:
    """In a worker: its environment, before torch is imported there."""
    fence.join(config.folder, group)
    os.environ.pop("OMP_NUM_THREADS", None)  # Ray's guess
    os.environ["OMP_NUM_THREADS"] = config.threads or worker.threads(place.local_size)
    os.environ.update(worker.environment(place))
    if os.path.isdir(directory):
        os.chdir(directory)  # where a recipe's relative paths begin


class Ended(Exception):
    """Carries an ending out of Ray Train's controller, which starts the group again after anything that it knows."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending)
        self.ending = ending


class Unseated(Exception):
    """Carries the judge, who lives in the controller, out of it to the next number of ranks."""

    def __init__(self, judge: Judge) -> None:
        super().__init__(judge)
        self.judge = judge


class Restarts(UserCallback):
    """Asked by Ray Train's controller after each failure of the group; says no by raising."""

    def __init__(self, folder: Path, judge: Judge, *, is_elastic: bool) -> None:
        self._folder, self._judge, self._is_elastic = folder, judge, is_elastic

    def after_exception(self, run_context: object, worker_exceptions: Mapping[int, BaseException]) -> None:
        """Raises `Ended` where the group shall not start again, `Unseated` where it looks for room first."""
        time.sleep(_SETTLE_SECONDS)
        ending = self._judge.verdict(self._silent(worker_exceptions))
        if ending is not None:
            raise Ended(ending)
        if self._is_elastic:
            raise Unseated(self._judge)

    def _silent(self, errors: Mapping[int, BaseException]) -> list[Failure]:
        """The ranks that Ray has found dead, and those whose process is gone without Ray having noticed yet."""
        starts = [event for event in read_events(self._folder) if event["kind"] == "workers"]
        return [
            Failure(rank=int(rank), cause=self._end(rank, errors.get(place["worker"])), silent=True, time=time.time())
            for rank, place in starts[-1]["ranks"].items()
            if place["worker"] in errors or _is_gone(place)
        ]

    def _end(self, rank: str, error: BaseException | None) -> str:
        if isinstance(error, SystemExit):
            return f"ended with exit code {error.code}"
        if "low on memory" in str(error):
            return "was killed by Ray, since its node ran low on memory,"
        crash = crash_words(self._folder / "logs" / f"rank-{rank}.txt")
        return f"crashed with {crash}" if crash else "was killed, most likely by SIGKILL,"


def crash_words(log: Path) -> str | None:
    """What Python's fault handler wrote last for the newest process of a log: ``Segmentation fault``."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return None
    found = re.findall(r"^Fatal Python error: (.*)$", text.rpartition(worker.NEW_PROCESS)[2], re.MULTILINE)
    return found[-1] if found else None


def _is_gone(place: Mapping[str, Any]) -> bool:
    return place["host"] == socket.gethostname() and not os.path.exists(f"/proc/{place['pid']}")


def _probe(address: str) -> None:
    """Raises UserError where no head can be; Ray itself would wait for minutes."""
    if "://" in address:
        remedy = "give HOST:PORT of the head node, and start the command on a node of the cluster"
        raise UserError(f"launch.address={address} is not the address of a cluster's head; {remedy}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(f"no Ray cluster answers at launch.address={address}: {error}") from error
