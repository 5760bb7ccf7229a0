"""Tokens/s and CPU seconds a token of cuboid against a hand-written torch loop, step by step in one process tree.

    python benchmarks/step_speed.py [--rounds 12] [MESH ...]        # a mesh is pipeline x data x tensor, such as 2x2x2

In every round each contestant makes one step from the same batch; the order turns round by round. The peer, here the
bare loop, runs twice, as A and A', so that their ratio shows what the machine's noise alone makes of equal code. A step
of cuboid is the product's own `train_step`: loss, clipping, update, measured bubble, metrics.jsonl. Losses and norms
are compared first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import torch.distributed as dist
from bare_loop import BareLoop
from harness import run_ranks
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from cuboid.parallel.mesh import Block, connect
from cuboid.parallel.schedules import SCHEDULES
from cuboid.trainer.data import Dataset, prepare
from cuboid.trainer.loop import set_up, train_step
from cuboid.trainer.model import draw_blueprint, seeded_tensors
from cuboid.trainer.model_config import read_checked_config
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.tokenizer import open_tokenizer
from cuboid.trainer.tokens import cache_folder

Step = Callable[[int], tuple[float | None, float]]
"""Makes step number so-and-so (from 1, each once): loss where it is known, and gradient norm."""
Contestant = Callable[[Recipe, Block], AbstractContextManager[Step]]

MESHES = ("1x2x1", "1x1x2", "2x1x1", "2x2x1", "2x2x2")
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


@contextmanager
def cuboid(recipe: Recipe, block: Block) -> Iterator[Step]:
    """The product."""
    folder = Path(tempfile.mkdtemp()) if block.rank == 0 else Path(tempfile.gettempdir())
    with set_up(recipe, folder, block) as run:

        def step(number: int) -> tuple[float, float]:
            assert run.step == number - 1
            result = train_step(run)
            return result.loss, result.grad_norm

        yield step


@contextmanager
def bare(recipe: Recipe, block: Block) -> Iterator[Step]:
    """The hand-written loop, with torch's schedule of the same name."""
    settings, schedule = recipe.parallel, SCHEDULES[recipe.parallel.schedule].torch_name
    shape = (recipe.batch_plan.microbatch_size, recipe.data.sequence_length)
    # the whole model is not kept
    loop = BareLoop(whole_model(recipe), block.mesh, microbatches=settings.microbatches, shape=shape, schedule=schedule)
    yield fed(loop.step, recipe, block)


def whole_model(recipe: Recipe) -> LlamaForCausalLM:
    """With the first weights of a cuboid run."""
    blueprint = draw_blueprint(read_checked_config(recipe.model))
    read = seeded_tensors(blueprint, seed=recipe.seed)
    model = AutoModelForCausalLM.from_config(blueprint.config, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    model.load_state_dict({name: read(name) for name, _ in model.named_parameters()})
    return model.train()


def fed(step: Callable[[Tensor, Tensor, Tensor], tuple[float | None, float]], recipe: Recipe, block: Block) -> Step:
    """A peer's ``step(ids, labels, positions)`` on the data of a cuboid run."""
    dataset = dataset_of(recipe)

    def make(number: int) -> tuple[float | None, float]:
        batch = dataset.batch(recipe.batch_plan.samples(number, block.coordinate.data))
        return step(batch.input_ids, batch.labels, batch.position_ids)

    return make


def dataset_of(recipe: Recipe) -> Dataset:
    vocabulary = read_checked_config(recipe.model).vocab_size
    tokenizer = open_tokenizer(recipe.data.tokenizer, pretrained=None, vocab_size=vocabulary)
    return prepare(recipe.data, tokenizer=tokenizer, seed=recipe.seed, cache=cache_folder())


def measure(
    recipe: Recipe, rounds: int, ours: Contestant = cuboid, theirs: Contestant = bare
) -> list[list[tuple[float, float]]]:
    """In every rank, for ours, theirs as A and theirs as A': (wall, CPU) seconds of each step; CPU is summed over
    ranks."""
    with connect(recipe.layout, timeout_seconds=120) as block, ExitStack() as stack:
        steps = [stack.enter_context(contestant(recipe, block)) for contestant in (ours, theirs, theirs)]
        compare_numbers(steps)
        seconds: list[list[tuple[float, float]]] = [[], [], []]
        for turn in range(rounds):
            for place in (turn % 3, (turn + 1) % 3, (turn + 2) % 3):
                seconds[place].append(timed(partial(steps[place], WARM_UP + turn + 1)))
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


def compare_numbers(steps: list[Step]) -> None:
    """The contestants make the same updates, or there is nothing to compare; this warms them up too."""
    for number in range(1, WARM_UP + 1):
        (loss, norm), *others = [step(number) for step in steps]
        assert loss is not None
        for other_loss, other_norm in others:
            assert other_loss is None or abs(other_loss - loss) < 2e-5 * loss, (number, other_loss, loss)
            assert abs(other_norm - norm) < 2e-4 * norm, (number, other_norm, norm)


def heads(ours: str, theirs: str) -> list[str]:
    return [
        *(f"{who} {what}" for who in (ours, theirs) for what in ("tokens/s", "CPU ms/token")),
        f"tokens/s, {ours} : {theirs}",
        "A : A'",
        f"CPU, {theirs} : {ours}",
        "A : A'",
    ]


def figures(seconds: list[list[tuple[float, float]]]) -> list[str]:
    """The cells below `heads`: tokens/s and CPU ms a token of both, and the ratios."""
    ours, theirs, again = seconds
    tokens = 8 * 256

    def ratio(first: list[tuple[float, float]], second: list[tuple[float, float]], column: int) -> float:
        return statistics.median(a[column] / b[column] for a, b in zip(first, second, strict=True))

    cells = []
    for each in (ours, theirs):
        wall = statistics.median(wall for wall, _ in each)
        cpu = statistics.median(cpu for _, cpu in each)
        cells += [f"{tokens / wall:.0f}", f"{1e3 * cpu / tokens:.3f}"]
    for column in (0, 1):
        cells += [f"{ratio(theirs, ours, column):.2f}", f"{ratio(theirs, again, column):.2f}"]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meshes", nargs="*", default=MESHES, metavar="MESH")
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    print_head(["mesh", *heads("cuboid", "bare")])
    for mesh in arguments.meshes:
        recipe = recipe_of(mesh, 10**6)
        seconds = run_ranks(measure, recipe.layout.world_size, recipe, arguments.rounds, timeout=580)[0]
        print(row([mesh, *figures(seconds)]), flush=True)


def print_head(cells: list[str]) -> None:
    print(row(cells))
    print(row(["---"] * len(cells)))


def row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
