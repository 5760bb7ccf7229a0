"""Peak memory while every rank reads its part of a pretrained model, against the bytes that the ranks own.

    make smollm2
    python benchmarks/load_memory.py [--model models/smollm2] [MESH ...]     # pipeline x data x tensor, such as 2x2x1

Memory is PSS (what several processes share counts once) above what the process held before it built the model,
sampled every 2 ms; the ranks' peaks are added up, whenever each came. Owned bytes are those of all ranks' shards, with
replicas and tied copies.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from pathlib import Path
from threading import Event, Thread

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch.distributed as dist
from harness import run_ranks

from cuboid.parallel.gradients import local
from cuboid.parallel.mesh import Block, connect
from cuboid.trainer.assemble import build_stages, initial_weights, named_parameters
from cuboid.trainer.model import draw_blueprint
from cuboid.trainer.model_config import read_checked_config
from cuboid.trainer.recipe import ModelSettings, Recipe

MESHES = ("1x1x1", "1x2x1", "2x1x1", "2x2x1", "2x1x3")


def recipe_of(mesh: str, model: str) -> Recipe:
    pipeline, data, tensor = (int(size) for size in mesh.split("x"))
    return Recipe.model_validate(
        {
            "name": "load",
            "model": {"pretrained": model},
            "data": {"kind": "text", "path": "package:stdlib", "sequence_length": 126},
            "parallel": {"pipeline": pipeline, "data": data, "tensor": tensor, "microbatches": 2},
            "train": {"steps": 1, "global_batch": 4},
        }
    )


def measure(mesh: str, model: str) -> tuple[int, int, float]:
    """In every rank: owned bytes, peak bytes above the start, seconds."""
    recipe = recipe_of(mesh, model)
    with connect(recipe.layout, timeout_seconds=120) as block:
        warm_up(recipe, block)
        blueprint = draw_blueprint(read_checked_config(recipe.model))
        weights = initial_weights(recipe, blueprint)
        peak = Peak()
        began = time.monotonic()
        stages = build_stages(recipe, block, blueprint, weights)
        seconds = time.monotonic() - began
        grown = peak.stop()
        dist.barrier()  # the pages that a rank shares would become its neighbours' when it ended
        parameters = [local(parameter.detach()) for _, parameter in named_parameters(stages)]
        return sum(tensor.numel() * tensor.element_size() for tensor in parameters), grown, seconds


def warm_up(recipe: Recipe, block: Block) -> None:
    """Build a tiny model once: what the interpreter loads for the first one is not the weights'."""
    config = {"model_type": "llama", "hidden_size": 36, "intermediate_size": 36, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 36}
    tiny = recipe.model_copy(update={"model": ModelSettings(config=config | heads)})
    blueprint = draw_blueprint(read_checked_config(tiny.model))
    build_stages(tiny, block, blueprint, initial_weights(tiny, blueprint))


class Peak:
    """Samples this process's PSS until `stop`."""

    def __init__(self) -> None:
        self._start = self._peak = pss()
        self._done = Event()
        self._thread = Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self._peak = max(self._peak, pss())

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self._peak, pss()) - self._start


def pss() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("no Pss in smaps_rollup")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meshes", nargs="*", default=MESHES, metavar="MESH")
    parser.add_argument("--model", default="models/smollm2")
    arguments = parser.parse_args()
    gc.freeze()  # as the local launcher does: what is imported stays shared with the forked ranks
    print("| mesh | owned MB | peak MB | peak : owned | seconds |\n|---|---|---|---|---|")
    for mesh in arguments.meshes:
        ranks = run_ranks(
            measure, recipe_of(mesh, arguments.model).layout.world_size, mesh, arguments.model, timeout=300
        )
        owned, peak = sum(rank[0] for rank in ranks), sum(rank[1] for rank in ranks)
        seconds = max(rank[2] for rank in ranks)
        print(f"| {mesh} | {owned / 1e6:.0f} | {peak / 1e6:.0f} | {peak / owned:.3f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
