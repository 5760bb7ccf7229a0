"""Tokens/s and CPU seconds a token of cuboid against a hand-written torch loop, step by step in one process tree.

    python benchmarks/step_speed.py [--rounds 12] [MESH ...]        # a mesh is pipeline x data x tensor, such as 2x2x2

In every round each contestant makes one step from the same batch; the order turns round by round. The bare loop runs
twice, as A and A', so that their ratio shows what the machine's noise alone makes of equal code. A cuboid step is the
product's own `train_step`: loss, clipping, update, measured bubble, metrics.jsonl. Losses and norms are compared first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import torch.distributed as dist
from bare_loop import BareLoop
from harness import run_ranks
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from cuboid.parallel.mesh import Block, connect
from cuboid.parallel.schedules import SCHEDULES
from cuboid.trainer.loop import set_up, train_step
from cuboid.trainer.model import draw_blueprint, seeded_tensors
from cuboid.trainer.model_config import read_checked_config
from cuboid.trainer.recipe import Recipe

MESHES = ("1x2x1", "1x1x2", "2x1x1", "2x2x1", "2x2x2")
CONTESTANTS = ("cuboid", "bare A", "bare A'")
HEADS = (
    *(f"{who} {what}" for who in ("cuboid", "bare") for what in ("tokens/s", "CPU ms/token")),
    "tokens/s, cuboid : bare",
    "A : A'",
    "CPU, bare : cuboid",
    "A : A'",
)
WARM_UP = 3
"""Steps of each contestant whose losses and norms are compared, before any is timed."""


def recipe_of(mesh: str, steps: int, **parallel: object) -> Recipe:
    """``parallel`` has further keys of this part."""
    pipeline, data, tensor = (int(size) for size in mesh.split("x"))
    config = {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 320,
    }
    return Recipe.model_validate(
        {
            "name": "speed",
            "model": {"config": config},
            "data": {"kind": "text", "path": "package:stdlib", "sequence_length": 256},
            "parallel": {"pipeline": pipeline, "data": data, "tensor": tensor, "microbatches": 4, **parallel},
            "optimizer": {"learning_rate": 3e-4, "schedule": "constant"},
            "train": {"steps": steps, "global_batch": 8},
            "checkpoint": {"every": 0},
            "track": {"to": "none", "timeline_every": 0},
            "launch": {"device": "cpu"},
        }
    )


def bare_loop(recipe: Recipe, block: Block) -> BareLoop:
    blueprint = draw_blueprint(read_checked_config(recipe.model))
    read = seeded_tensors(blueprint, seed=recipe.seed)
    model = AutoModelForCausalLM.from_config(blueprint.config, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    model.load_state_dict({name: read(name) for name, _ in model.named_parameters()})
    shape = (recipe.batch_plan.microbatch_size, recipe.data.sequence_length)
    schedule = SCHEDULES[recipe.parallel.schedule].torch_name
    return BareLoop(
        model.train(), block.mesh, microbatches=recipe.parallel.microbatches, shape=shape, schedule=schedule
    )


def measure(recipe: Recipe, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """In every rank: (wall, CPU) seconds of each step of each contestant; CPU is summed over ranks."""
    folder = Path(tempfile.mkdtemp()) if os.environ["RANK"] == "0" else Path(tempfile.gettempdir())
    with connect(recipe.layout, timeout_seconds=120) as block, set_up(recipe, folder, block) as run:
        bare = {name: bare_loop(recipe, block) for name in CONTESTANTS[1:]}

        def step(name: str, number: int) -> tuple[float | None, float]:
            """Step ``number`` by one contestant: loss where it is known, and gradient norm."""
            if name == "cuboid":
                run.step = number - 1
                result = train_step(run)
                return result.loss, result.grad_norm
            batch = run.dataset.batch(recipe.batch_plan.samples(number, block.coordinate.data))
            return bare[name].step(batch.input_ids, batch.labels, batch.position_ids)

        compare_numbers(step)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTESTANTS}
        for turn in range(rounds):
            for name in CONTESTANTS[turn % 3 :] + CONTESTANTS[: turn % 3]:
                seconds[name].append(timed(lambda name=name, number=WARM_UP + turn + 1: step(name, number)))
    return seconds


def timed(call: Callable[[], object]) -> tuple[float, float]:
    dist.barrier()
    wall, cpu = time.monotonic(), time.process_time()
    call()
    spent = torch.tensor([time.process_time() - cpu], dtype=torch.float64)
    dist.barrier()
    wall = time.monotonic() - wall
    dist.all_reduce(spent)
    return wall, spent.item()


def compare_numbers(step: Callable[[str, int], tuple[float | None, float]]) -> None:
    """The contestants make the same updates, or there is nothing to compare; this warms them up too."""
    for number in range(1, WARM_UP + 1):
        loss, norm = step("cuboid", number)
        assert loss is not None
        for name in CONTESTANTS[1:]:
            bare_loss, bare_norm = step(name, number)
            assert bare_loss is None or abs(bare_loss - loss) < 2e-5 * loss, (name, bare_loss, loss)
            assert abs(bare_norm - norm) < 2e-4 * norm, (name, bare_norm, norm)


def figures(seconds: dict[str, list[tuple[float, float]]]) -> list[str]:
    """The cells of a row: tokens/s and CPU ms a token of cuboid and of the bare loop, and the ratios."""
    tokens = 8 * 256

    def ratio(first: str, second: str, column: int) -> float:
        pairs = zip(seconds[first], seconds[second], strict=True)
        return statistics.median(a[column] / b[column] for a, b in pairs)

    cells = []
    for name in CONTESTANTS[:2]:
        wall = statistics.median(wall for wall, _ in seconds[name])
        cpu = statistics.median(cpu for _, cpu in seconds[name])
        cells += [f"{tokens / wall:.0f}", f"{1e3 * cpu / tokens:.3f}"]
    for column in (0, 1):
        cells += [f"{ratio('bare A', 'cuboid', column):.2f}", f"{ratio('bare A', CONTESTANTS[2], column):.2f}"]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meshes", nargs="*", default=MESHES, metavar="MESH")
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    print(row(["mesh", *HEADS]))
    print(row(["---"] * (1 + len(HEADS))))
    for mesh in arguments.meshes:
        recipe = recipe_of(mesh, 10**6)
        ranks = run_ranks(measure, recipe.layout.world_size, recipe, arguments.rounds, timeout=580)
        print(row([mesh, *figures(ranks[0])]), flush=True)


def row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
