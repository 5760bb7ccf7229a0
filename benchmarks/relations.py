"""Whether a student's relations between tokens come nearer to its teacher's, and what that is worth.

    python benchmarks/relations.py

A small model is trained on Python's standard library; narrower students of half as many layers then learn from it, with
`distill.attention` and without, from two seeds, on one rank. Each is then looked at, by transformers, on text that it
was not trained on.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import torch.nn.functional as F
from harness import run_ranks
from step_speed import print_head, row
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from cuboid.parallel.layer_terms import outputs_of, partners
from cuboid.parallel.loss import IGNORE
from cuboid.parallel.mesh import connect
from cuboid.parallel.relations import relation_distance
from cuboid.trainer.assemble import assemble, initial_weights
from cuboid.trainer.data import Batch, Dataset, prepare
from cuboid.trainer.model import draw_blueprint, whole_model
from cuboid.trainer.model_config import read_checked_config
from cuboid.trainer.optimizer import learning_rate
from cuboid.trainer.plans import PROJECTIONS
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.tokenizer import open_tokenizer
from cuboid.trainer.tokens import cache_folder

ROWS, HEADS, SEEDS = 16, 12, (1, 2)
HELD_OUT = 20_000
"""The first of `ROWS` samples that no run comes to."""
TEACHER = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 6}
STUDENT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def recipe_of(sizes: dict[str, int], *, steps: int, seed: int, distill: dict[str, Any] | None = None) -> Recipe:
    config = {"model_type": "llama", "vocab_size": 264, "intermediate_size": 3 * sizes["hidden_size"], **sizes}
    return Recipe.model_validate(
        {
            "name": "relations",
            "seed": seed,
            "model": {"config": config | {"bos_token_id": None, "eos_token_id": 256}},
            "data": {"kind": "text", "path": "package:stdlib", "tokenizer": "bytes", "sequence_length": 64},
            "distill": distill,
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 5},
            "train": {"steps": steps, "global_batch": ROWS},
        }
    )


def data_of(recipe: Recipe) -> Dataset:
    """The same samples for every recipe of this file."""
    tokenizer = open_tokenizer("bytes", pretrained=None, vocab_size=264)
    found = prepare(recipe.data, tokenizer=tokenizer, seed=0, cache=cache_folder())
    assert isinstance(found, Dataset)
    return found


def train(recipe: Recipe, folder: str, steps: int) -> None:
    """So many steps on one rank; the model is then written into ``folder`` as transformers would."""
    data, settings = data_of(recipe), recipe.optimizer
    with connect(recipe.layout, timeout_seconds=60) as block:
        blueprint = draw_blueprint(read_checked_config(recipe.model))
        engine = assemble(recipe, block, blueprint, initial_weights(recipe, blueprint))
        for step in range(1, steps + 1):
            rate = learning_rate(step, steps=recipe.train.steps, settings=settings)
            engine.step(data.batch(range((step - 1) * ROWS, step * ROWS)), learning_rate=rate)
        model = whole_model(blueprint)
        weights = {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in engine.weights()}
    model.load_state_dict(weights)
    model.save_pretrained(folder)


@torch.no_grad()
def look(folder: str, teacher: str, batch: Batch) -> tuple[float, float]:
    """Cross entropy, and what `distill.attention` at weight 1 makes of all layers' relations."""
    given, losses = [], []
    for name in (folder, teacher):
        model = AutoModelForCausalLM.from_pretrained(name)
        with ExitStack() as stack:
            given.append([stack.enter_context(outputs_of(layer, PROJECTIONS)) for layer in model.model.layers])
            logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE).item())
    mask = draw_blueprint(model.config).masks(batch.position_ids)["full_attention"]
    predicted, (ours, theirs) = batch.labels != IGNORE, given
    apart = [
        relation_distance(found[name], theirs[partner][name], predicted, mask, heads=HEADS, of_all=HEADS)
        for found, partner in zip(ours, partners(len(ours), len(theirs)), strict=True)
        for name in PROJECTIONS
    ]
    return losses[0], sum(apart).item() / (len(ours) * int(predicted.sum()))


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        teacher = f"{root}/teacher"
        own = recipe_of(TEACHER, steps=150, seed=0)
        run_ranks(train, 1, own, teacher, 150, timeout=600)
        batch = data_of(own).batch(range(HELD_OUT, HELD_OUT + ROWS))
        print(f"the teacher's held-out loss: {look(teacher, teacher, batch)[0]:.3f}")
        print_head(["seed", "`distill.attention`", "held-out loss", "relations"])
        for seed in SEEDS:
            for weight, steps in ((0.0, 0), (0.0, 100), (1.0, 100)):
                distill = {"teacher": teacher, "attention": weight, "attention_layers": [0, 1], "relation_heads": HEADS}
                student = f"{root}/student-{seed}-{weight}-{steps}"
                recipe = recipe_of(STUDENT, steps=100, seed=seed, distill=distill)
                run_ranks(train, 1, recipe, student, steps, timeout=600)
                loss, apart = look(student, teacher, batch)
                told = f"{weight:g}" if steps else "before training"
                print(row([str(seed), told, f"{loss:.3f}", f"{apart:.3f}"]), flush=True)


if __name__ == "__main__":
    main()
