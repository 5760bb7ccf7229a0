"""Room for ranks on a Ray cluster: what each takes, how many find it, when there is more. A Ray door."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray

from cuboid.launch import slurm_ray
from cuboid.launch.failures import RESIZE, step_in_work, stop_reason
from cuboid.launch.placement import rank_bundle, told_resources
from cuboid.launch.supervise import ask_to_stop
from cuboid.parallel.errors import RunFailed, UserError, one_of
from cuboid.parallel.layout import Layout
from cuboid.trainer import elastic
from cuboid.trainer.recipe import Recipe

Bundle = dict[str, float]
"""What Ray reserves for one rank, as ``{"CPU": 1.0, "GPU": 1.0}``."""

_ROOM_SECONDS = 45.0
"""How long nodes may take to join, and other work to end, before a run that has no room is given up."""
_RETURN_SECONDS = 10.0
"""How long an elastic run waits for all its data ranks before it begins with fewer."""
_LOOK_SECONDS = 5.0
"""Between two looks for more room; a node that stays for two of them is worth a restart."""


class Room:
    """Where a run's ranks may be seated.

    Args:
        recipe: resolved and checked.
        is_own: the cluster is this run's own: whole from the beginning, and no node comes or goes.
    """

    def __init__(self, recipe: Recipe, *, is_own: bool) -> None:
        self._sizes = [recipe] if is_own else elastic.sizes(recipe)
        self._patience_seconds = 0.0 if is_own else _ROOM_SECONDS

    @property
    def is_elastic(self) -> bool:
        """Whether there is more than one number of ranks to choose from."""
        return len(self._sizes) > 1

    def find(self) -> tuple[Recipe, Bundle]:
        """The recipe on as many data ranks as find room, and what each rank takes.

        Raises:
            UserError: the cluster is too small for the fewest.
            RunFailed: other work holds their room.
        """
        began = time.monotonic()
        while True:
            waited = time.monotonic() - began
            for recipe in self._sizes:
                bundle = self._bundle(recipe, ray.available_resources())
                # what a group has just left is free in a moment, and a node may come back
                if bundle and (recipe is self._sizes[0] or waited >= _RETURN_SECONDS):
                    return recipe, bundle
            if waited >= self._patience_seconds:
                raise self._missing()
            time.sleep(1)

    @contextmanager
    def asking_for_more(self, seated: Recipe, bundle: Bundle, folder: Path) -> Iterator[None]:
        """Meanwhile the seated ranks are asked to save and end (`RESIZE`) once there is room for more of them."""
        larger = self._sizes[: self._sizes.index(seated)]
        held = {name: amount * seated.layout.world_size for name, amount in bundle.items()}
        is_over, step = threading.Event(), step_in_work(folder)

        def look() -> None:
            looks = 0
            while not is_over.wait(_LOOK_SECONDS):
                free = ray.available_resources()
                with_own = {name: free.get(name, 0) + held.get(name, 0) for name in {*free, *held}}
                # until a step is done, its own room may not be taken yet
                has_more = step_in_work(folder) > step and any(self._bundle(recipe, with_own) for recipe in larger)
                looks = looks + 1 if has_more else 0
                if looks == 2 and stop_reason(folder) is None:
                    ask_to_stop(folder, RESIZE)
                    return

        watch = threading.Thread(target=look, name="room", daemon=True)
        if larger:
            watch.start()
        try:
            yield
        finally:
            is_over.set()
            if larger:
                watch.join()

    def told(self) -> str:
        """What the cluster has, in words."""
        return told_resources(_nodes())

    def _bundle(self, recipe: Recipe, free: Mapping[str, float]) -> Bundle | None:
        """What each rank takes; None where not all of them find room in what is free."""
        layout = recipe.layout
        bundle = self._least_bundle(layout)
        fits = bundle and all(free.get(name, 0) >= amount * layout.world_size for name, amount in bundle.items())
        return bundle if fits else None

    def _least_bundle(self, layout: Layout) -> Bundle | None:
        """As `rank_bundle`. Ranks of an elastic run share no CPU: they would find room on any node that is left."""
        return rank_bundle(
            _nodes(), layout.world_size, tensor=layout.tensor, gpu=self._use_gpu(), share_cpus=not self.is_elastic
        )

    def _use_gpu(self) -> bool:
        device = self._sizes[0].launch.device
        return device == "cuda" or (device == "auto" and any(node.get("GPU") for node in _nodes()))

    def _missing(self) -> UserError | RunFailed:
        layout, use_gpu = self._sizes[-1].layout, self._use_gpu()
        ranks = layout.world_size
        cpus = "CPUs" if self.is_elastic else "CPUs or a share of one each"
        need = f"{ranks} ranks need {ranks} {'GPUs' if use_gpu else cpus}"
        if self._least_bundle(layout) is None:
            return UserError(f"{need}; the Ray cluster has {self.told()}")
        return RunFailed(f"{need}; of {self.told()} only {told_resources([ray.available_resources()])} are free")


def wait_for_nodes(names: Sequence[str]) -> None:
    """Until nodes of these names live. Raises RunFailed with the ones that do not come."""
    seconds = slurm_ray.JOIN_SECONDS
    deadline = time.monotonic() + seconds
    while missing := sorted(set(names) - {node["NodeName"] for node in ray.nodes() if node["Alive"]}):
        if time.monotonic() > deadline:
            raise RunFailed(f"node {one_of(missing)} did not join the Ray cluster within {seconds:.0f} s")
        time.sleep(0.5)


def _nodes() -> list[Mapping[str, float]]:
    """Total resources of each node that lives."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
