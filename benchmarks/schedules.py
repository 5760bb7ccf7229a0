"""Every pipeline schedule against torch's own, used bare; 1F1B against DeepSpeed's; both engines; and the stages of
SmolLM2-135M, even and balanced by cost.

    python benchmarks/schedules.py [SCHEDULE ...] [--ranks 2 4] [--rounds 9]
    python benchmarks/schedules.py --deepspeed [--ranks 2 4] [--rounds 9]
    python benchmarks/schedules.py --stages

The first measures as step_speed.py does: cuboid, and twice the bare loop with torch's schedule of the same name over
the same stages of equally many layers, step by step in turn; losses and norms are compared first. Memory is of other
processes, some for each contestant: the most that a rank holds within a step above what it held before it built the
model. The second does so with DeepSpeed's `PipelineEngine` as the peer, and then with cuboid's own deepspeed engine
against its native one. The third makes steps with either split in turn, and reads the processor time of each stage
within its actions.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import statistics
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch.distributed as dist
from harness import run_ranks
from load_memory import Peak, pss
from step_speed import (
    Contestant,
    bare,
    cuboid,
    dataset_of,
    figures,
    heads,
    measure,
    print_head,
    recipe_of,
    row,
)

from cuboid.parallel.mesh import connect
from cuboid.parallel.schedules import SCHEDULES
from cuboid.trainer.assemble import assemble, initial_weights, layers_of_stages
from cuboid.trainer.model import draw_blueprint
from cuboid.trainer.model_config import read_checked_config
from cuboid.trainer.recipe import Recipe

MICROBATCHES, LAYERS = 8, 8
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
SPLITS = {"even": [8, 8, 7, 7], "balanced by cost": None}
"""What `parallel.layers` says."""
STEPS = 3
"""With either split, after one that is not counted."""


def recipe_with(schedule: str, ranks: int) -> Recipe:
    stages = ranks * SCHEDULES[schedule].default_virtual_stages
    layers = [LAYERS // stages] * stages
    return recipe_of(f"{ranks}x1x1", 10**6, schedule=schedule, microbatches=MICROBATCHES, layers=layers)


def peak_bytes(recipe: Recipe, contestant: Contestant) -> int:
    """In every rank: the most that it holds in two steps after the first, above what it held at the start."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
    with connect(recipe.layout, timeout_seconds=120) as block:
        start = pss()
        with contestant(recipe, block) as step:
            step(1)
            held, peak = pss(), Peak()
            step(2)
            step(3)
            grown = peak.stop()
            dist.barrier()  # the pages that a rank shares would become its neighbours' when it ended
            return held - start + grown


def smollm2_with(layers: list[int] | None) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "stages",
            "model": {"config": SMOLLM2},
            "data": {"kind": "text", "path": "package:stdlib", "sequence_length": 256},
            "parallel": {"pipeline": 4, "microbatches": 4, "layers": layers},
            "train": {"steps": 1, "global_batch": 4},
        }
    )


def stage_seconds() -> dict[str, tuple[list[int], list[float]]]:
    """For each split its layers and, by stage, the seconds that its thread works in all actions of a step (median)."""
    recipes = {name: smollm2_with(layers) for name, layers in SPLITS.items()}
    first = recipes["even"]
    with connect(first.layout, timeout_seconds=300) as block:
        dataset, engines, splits = dataset_of(first), {}, {}
        for name, recipe in recipes.items():
            blueprint = draw_blueprint(read_checked_config(recipe.model))
            splits[name] = [len(layers) for layers in layers_of_stages(recipe, blueprint)]
            engines[name] = assemble(recipe, block, blueprint, initial_weights(recipe, blueprint))
        spent: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(1, STEPS + 2):
            batch = dataset.batch(first.batch_plan.samples(number, 0))
            for name, engine in engines.items():
                engine.backward(batch)
                spent[name].append(sum(action.thread_seconds for action in engine.pipeline.times))
                for _, parameter in engine.parameters:
                    parameter.grad = None
        medians = {name: statistics.median(seconds[1:]) for name, seconds in spent.items()}
        by_rank: list[dict[str, float]] = [{} for _ in range(block.layout.world_size)]
        dist.all_gather_object(by_rank, medians)
    return {name: (splits[name], [own[name] for own in by_rank]) for name in engines}


def compare(recipe: Recipe, rounds: int, ours: Contestant, theirs: Contestant) -> list[str]:
    """The cells of a row: those of `step_speed.figures`, and MB of the fullest rank of both."""
    size = recipe.layout.world_size
    seconds = run_ranks(measure, size, recipe, rounds, ours, theirs, timeout=580)[0]
    peaks = [max(run_ranks(peak_bytes, size, recipe, each, timeout=300)) for each in (ours, theirs)]
    return [*figures(seconds), *(f"{peak / 1e6:.0f}" for peak in peaks)]


def head(first: list[str], ours: str, theirs: str) -> list[str]:
    return [*first, *heads(ours, theirs), f"{ours} MB/rank", f"{theirs} MB/rank"]


def compare_schedules(schedules: list[str], ranks: list[int], rounds: int) -> None:
    print_head(head(["schedule", "ranks"], "cuboid", "bare"))
    for size in ranks:
        for schedule in schedules:
            print(row([schedule, str(size), *compare(recipe_with(schedule, size), rounds, cuboid, bare)]), flush=True)


def compare_engines(ranks: list[int], rounds: int) -> None:
    from deepspeed_pipeline import deepspeed_pipeline, norms_as_it_comes, zero  # an extra, which takes seconds

    print_head(head(["ranks"], "cuboid", "DeepSpeed"))
    for size in ranks:
        print(row([str(size), *compare(recipe_with("1f1b", size), rounds, cuboid, deepspeed_pipeline)]), flush=True)
    print()
    print_head(["ranks", "norm of each stage", "of all stages", "DeepSpeed clips by"])
    for size in ranks:
        own, clipped_by = zip(*run_ranks(norms_as_it_comes, size, recipe_with("1f1b", size)), strict=True)
        each = ", ".join(f"{norm:.4f}" for norm in own)
        print(row([str(size), each, f"{math.hypot(*own):.4f}", f"{clipped_by[0]:.4f}"]), flush=True)
    print()
    print_head(head(["mesh"], "deepspeed", "native"))
    for size in ranks:
        for data in (1, 2):
            mesh = f"{size}x{data}x1"
            recipe = recipe_of(mesh, 10**6, microbatches=MICROBATCHES // data, layers=[LAYERS // size] * size)
            print(row([mesh, *compare(recipe, rounds, zero, cuboid)]), flush=True)


def compare_splits() -> None:
    print_head(["split", "layers", "seconds of each stage", "slowest : mean"])
    for name, (layers, seconds) in run_ranks(stage_seconds, 4, timeout=900)[0].items():
        slowest = max(seconds) / statistics.mean(seconds)
        each = ", ".join(f"{value:.2f}" for value in seconds)
        print(row([name, ", ".join(map(str, layers)), each, f"{slowest:.2f}"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schedules", nargs="*", default=list(SCHEDULES), metavar="SCHEDULE")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--deepspeed", action="store_true", help="DeepSpeed's pipeline, and both engines")
    parser.add_argument("--stages", action="store_true", help="SmolLM2's stages, even and balanced by cost")
    arguments = parser.parse_args()
    gc.freeze()  # as the local launcher does: what is imported stays shared with the forked ranks
    if arguments.stages:
        compare_splits()
    elif arguments.deepspeed:
        compare_engines(arguments.ranks, arguments.rounds)
    else:
        compare_schedules(arguments.schedules, arguments.ranks, arguments.rounds)


if __name__ == "__main__":
    main()
