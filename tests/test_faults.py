"""Steps that are not to be trusted: skipped, gone back before, or the run's end, and the same run afterwards."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import RanksFailed, run_ranks
from runs import STEPS, check_resumed, events, recipe_on, run, saved_facts, shards

from cuboid.launch.progress import told
from cuboid.parallel.gradients import local
from cuboid.parallel.loss import SummedCrossEntropy
from cuboid.trainer.check_faults import fault_errors
from cuboid.trainer.engine import NativeEngine
from cuboid.trainer.loop import train
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.replicas import PRIME, Replicas, _checksums
from cuboid.trainer.runlog import STOP_FILE, read_metrics

NAN = float("nan")
POISON = {5: NAN, 7: 1e4}
"""By step, what the loss of one data rank is multiplied with."""


def on(mesh: str, **faults: Any) -> Recipe:
    recipe = recipe_on(mesh)
    if mesh == "1x3x1":
        recipe = recipe_on(mesh, microbatches=2, shard=False, changes={"train": {"global_batch": 6}})
    return Recipe.model_validate({**recipe.model_dump(), "faults": faults})


def _train_poisoned(
    recipe: Recipe, folder: Path, poison: Mapping[int, float], flips: Mapping[int, str], stop_in: int = 0
) -> None:
    """The last rank's loss is wrong in the steps of ``poison``, whenever they come. Before the steps of ``flips``, the
    first time, it flips a bit of a parameter."""
    begin, loss, left, factor = NativeEngine.begin_step, SummedCrossEntropy.__call__, dict(flips), [1.0]
    is_last = int(os.environ["RANK"]) == recipe.layout.world_size - 1

    def begin_step(engine: NativeEngine, step: int) -> None:
        begin(engine, step)
        factor[0] = poison.get(step, 1.0) if is_last else 1.0
        if is_last and (name := left.pop(step, None)):
            local(dict(engine.parameters)[name].detach()).view(torch.int32).view(-1)[3] ^= 1 << 22
        if step == stop_in and os.environ["RANK"] == "0":
            (folder / STOP_FILE).write_text("pause")

    def call(self: SummedCrossEntropy, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return loss(self, logits, labels) * factor[0]

    NativeEngine.begin_step = begin_step  # type: ignore[method-assign]
    SummedCrossEntropy.__call__ = call  # type: ignore[method-assign]
    train(recipe, folder)


def poisoned(recipe: Recipe, folder: Path, poison: Mapping[int, float], **more: Any) -> list[dict[str, Any]]:
    flips = more.pop("flips", {})
    run_ranks(_train_poisoned, recipe.layout.world_size, recipe, folder, poison, flips, *more.values(), timeout=120)
    return read_metrics(folder)


@pytest.mark.parametrize("mesh", ["2x2x1", pytest.param("1x2x2", marks=pytest.mark.full)])
def test_skipped_and_rewound_and_resumed_runs_are_the_same(tmp_path: Path, mesh: str) -> None:
    """Bit for bit: all of them update nothing in steps 5 and 7."""
    skipping = on(mesh, not_finite="skip", spike="skip", window=4)
    metrics = poisoned(skipping, tmp_path / "skip", POISON)
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert {row["step"]: row["skipped"] for row in metrics if "skipped" in row} == {5: "not_finite", 7: "spike"}
    assert [row["step"] for row in metrics if row["loss"] is None] == [5]
    first, second = events(tmp_path / "skip", "skip")
    assert (first["step"], first["samples"]) == (5, "samples 36 to 39")  # the poisoned data rank's
    assert (second["step"], second["samples"]) == (7, "samples 48 to 55")
    assert "times the median of the last 4 steps" in second["cause"]
    assert re.fullmatch(
        r"step 5: the loss is nan, first on rank \d \(samples 36 to 39\); nothing was updated", told(first)
    )

    rewinding, folder = on(mesh, not_finite="rewind", spike="rewind", window=4), tmp_path / "rewind"
    assert [row["step"] for row in poisoned(rewinding, folder, POISON, stop_in=6)] == [1, 2, 3, 4, 5, 6]
    assert saved_facts(folder)[6]["faults"]["skipped"] == [5]
    (folder / STOP_FILE).unlink()
    assert [row["step"] for row in poisoned(rewinding, folder, POISON)] == list(range(1, STEPS + 1))
    check_resumed(folder, at=6)
    assert [(event["step"], event["to"]) for event in events(folder, "rewind")] == [(5, 3), (7, 6)]
    assert [event["step"] for event in events(folder, "checkpoint")] == [3, 6, 9]
    assert saved_facts(folder)[STEPS]["faults"] == saved_facts(tmp_path / "skip")[STEPS]["faults"]
    assert shards(folder, STEPS) == shards(tmp_path / "skip", STEPS)


def test_too_many_faults_stop_the_run(tmp_path: Path) -> None:
    """And another policy goes on past them."""
    recipe = on("1x2x1", not_finite="skip", max_faults=2)
    words = r"RunFailed: step 6: the loss is nan.*\(samples 44 to 47\); nothing was updated; faults.max_faults=2, "
    words += r"and steps before it were so: 4 \(samples 24 to 31\), 5 \(samples 32 to 39\)"
    with pytest.raises(RanksFailed, match=words):
        poisoned(recipe, tmp_path, dict.fromkeys((4, 5, 6), NAN))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    poisoned(on("1x2x1", not_finite="skip", max_faults=3), tmp_path, dict.fromkeys((4, 5, 6), NAN))
    check_resumed(tmp_path, at=3)
    assert saved_facts(tmp_path)[STEPS]["faults"]["skipped"] == [4, 5, 6]


PAIR = "ranks 0 and 1 hold different bits of {}"


@pytest.mark.parametrize(
    ("mesh", "name", "words"),
    [
        ("1x3x1", "model.layers.0.mlp.up_proj.weight", "rank 2 holds other bits of {} than the 2 others"),
        pytest.param("1x1x2", "model.norm.weight", PAIR, marks=pytest.mark.full),
        pytest.param("2x1x1", "model.embed_tokens.weight", PAIR, marks=pytest.mark.full),  # tied, over the pipeline
    ],
)
def test_a_flipped_bit_is_found_and_the_run_goes_back(tmp_path: Path, mesh: str, name: str, words: str) -> None:
    """Flipped before step 6: found in step 7, since the checkpoint of step 6 is looked at then, and set aside."""
    recipe = on(mesh)
    poisoned(recipe, tmp_path / "flipped", {}, flips={6: name})
    (found,) = events(tmp_path / "flipped", "rewind")
    assert (found["step"], found["to"], found["fault"]) == (7, 3, "replicas")
    assert found["cause"].startswith(words.format(name))
    (refused,) = events(tmp_path / "flipped", "checkpoint_refused")
    assert refused["path"].endswith("step-00000006")
    run(recipe, tmp_path / "sound")
    assert shards(tmp_path / "flipped", STEPS) == shards(tmp_path / "sound", STEPS)


MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "num_local_experts": 4,
}


GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 264}
"""With dropout: tensor ranks that hold the same hidden states drop the same ones."""


def _train_compared(recipe: Recipe, folder: Path) -> int:
    """Returns how many tensors of this rank others hold too."""
    compared, share = [], Replicas.share

    def counted(replicas: Replicas) -> float:
        compared.append(len(replicas._parts))
        return share(replicas)

    Replicas.share = counted  # type: ignore[method-assign]
    train(recipe, folder)
    assert len(compared) == recipe.train.steps
    return compared[0]


@pytest.mark.full
@pytest.mark.parametrize(
    ("mesh", "parallel", "model"),
    [
        ("1x4x1", {"shard": 2, "microbatches": 2}, None),  # HSDP
        ("1x2x2", {"shard": False, "sequence": False}, None),
        ("2x2x1", {"shard": False, "schedule": "zbv"}, None),
        ("2x2x2", {"expert": 2}, MIXTRAL),
        ("1x1x2", {"sequence": False}, GPT2),
    ],
    ids=["groups", "no sequence parallelism", "zbv", "experts", "dropout"],
)
def test_replicas_of_a_sound_run_are_equal_in_every_bit(
    tmp_path: Path, mesh: str, parallel: dict[str, Any], model: dict[str, Any] | None
) -> None:
    """The run would stop at a difference."""
    recipe = recipe_on(mesh, changes={"train": {"steps": 4}, "checkpoint": {"every": 0}}, **parallel).model_dump()
    if model is not None:
        recipe |= {"model": {"config": model}, "moe": {"bias_update": 0.01} if model is MIXTRAL else None}
    recipe = Recipe.model_validate({**recipe, "faults": {"replicas_every": 1}})
    assert min(run_ranks(_train_compared, recipe.layout.world_size, recipe, tmp_path, timeout=120)) >= 10


def test_a_flipped_bit_always_shows() -> None:
    """In either half of a 64-bit word, also where its sum overflows."""
    assert all(pow(2, power, PRIME) != 1 for power in range(1, 65))
    tensor = torch.arange(-4, 4, dtype=torch.float32)
    (sound,) = _checksums([tensor])
    for bit in range(32):
        changed = tensor.clone()
        changed.view(torch.int32)[5] ^= -(1 << 31) if bit == 31 else 1 << bit
        (found,) = _checksums([changed])
        assert (found - sound) % PRIME, bit
        assert _checksums([changed[1:].clone()]) != _checksums([tensor[1:].clone()]), "of an odd number of elements"


@pytest.mark.parametrize(
    ("faults", "changes", "words"),
    [
        ({"spike": "rewind"}, {"checkpoint": {"every": 0}}, "faults.spike=rewind has nothing to go back to"),
        ({"not_finite": "skip"}, {"parallel": {"engine": "deepspeed"}}, "use stop, or parallel.engine=native"),
    ],
)
def test_what_cannot_be_answered_is_told(faults: Any, changes: Any, words: str) -> None:
    recipe = Recipe.model_validate({**recipe_on("1x1x1", changes=changes).model_dump(), "faults": faults})
    (error,) = fault_errors(recipe)
    assert words in str(error)
