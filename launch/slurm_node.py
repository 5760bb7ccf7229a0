"""One node's ranks of a Slurm step: python -m cuboid.launch.slurm_node FOLDER HOST PORT RANKS, a task a node by `srun`.

The ranks are forked as `local` does it. What `slurm_step` must know goes to standard output, a JSON object a line: at
the beginning what this node is, in a hang how its ranks are, at the end what went wrong with them; what anybody prints,
to ``logs/node-N.txt``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import types
from dataclasses import asdict
from pathlib import Path

from cuboid.launch import worker
from cuboid.launch.local import run_ranks, shared_imports
from cuboid.launch.run_folder import RECIPE
from cuboid.launch.supervise import HOST_LOG, ask_to_stop
from cuboid.launch.worker import Place
from cuboid.trainer.recipe_file import load_recipe
from cuboid.trainer.version import version


def main() -> None:
    """The agent of one node."""
    folder, (host, port, size) = Path(sys.argv[1]), sys.argv[2:]
    name, index, nodes = os.environ["SLURMD_NODENAME"], int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    stop_when_told(folder)
    threading.Thread(target=_end_with_driver, daemon=True).start()
    sees_folder = (folder / RECIPE).exists()
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1) as driver:

        def say(**words: object) -> None:
            print(json.dumps({"node": name, **words}), file=driver)

        say(version=version(), sees_folder=sees_folder)
        if not sees_folder:
            return
        worker.send_output_to(folder / HOST_LOG.with_name(f"node-{index}.txt"))
        places = [
            Place(
                rank=index * int(size) + local,
                world_size=nodes * int(size),
                local_rank=local,
                local_size=int(size),
                host=host,
                port=int(port),
            )
            for local in range(int(size))
        ]
        train = shared_imports(folder, len(places))
        recipe = load_recipe(folder / RECIPE)
        failed = run_ranks(places, recipe, folder, train, tell=lambda states: say(hang=states))
        say(failures=[asdict(failure) for failure in failed])


def stop_when_told(folder: Path) -> None:
    """A signal asks for a checkpoint and the run's end. Slurm tells whom it likes: every process, those of the first
    node, or one, be it a rank."""

    def stop(number: int, frame: types.FrameType | None) -> None:
        ask_to_stop(folder, "signal")

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_with_driver() -> None:
    """The end of standard input is that of the driver, however it went; the ranks end with this process."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
