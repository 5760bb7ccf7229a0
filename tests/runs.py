"""Runs of the real loop in forked ranks: their recipe, and what they leave in their folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness import run_ranks

from cuboid.trainer.loop import train
from cuboid.trainer.manifest import read_manifest, steps
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.restore import read_facts
from cuboid.trainer.runlog import read_events, read_metrics

STEPS, EVERY = 9, 3


def recipe_on(
    mesh: str = "2x2x2", *, changes: Mapping[str, Mapping[str, Any]] | None = None, **parallel: Any
) -> Recipe:
    """A small run on a mesh "pipeline x data x tensor"; ``changes`` by part of the recipe, ``config`` of the model."""
    pipeline, data, tensor = (int(size) for size in mesh.split("x"))
    config = {
        "model_type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 264,
        "tie_word_embeddings": True,
    }
    parts: dict[str, dict[str, Any]] = {
        "data": {"kind": "text", "path": str(Path(__file__).parents[1] / "LICENSE"), "sequence_length": 32},
        "parallel": {"pipeline": pipeline, "data": data, "tensor": tensor, "microbatches": 4, **parallel},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
        "train": {"steps": STEPS, "global_batch": 8},
        "checkpoint": {"every": EVERY, "keep": 10},
        "track": {"to": "none", "timeline_every": 0},
        "launch": {"device": "cpu", "timeout_seconds": 60},
    }
    for name, change in (changes or {}).items():
        (config if name == "config" else parts[name]).update(change)
    return Recipe.model_validate({"name": "resume", "model": {"config": config}, **parts})


def run(recipe: Recipe, folder: Path, work: Callable[..., Any] = train) -> list[dict[str, Any]]:
    """Train in forked ranks to the end; the metrics of the run's folder."""
    assert set(run_ranks(work, recipe.layout.world_size, recipe, folder, timeout=120)) == {None}
    return read_metrics(folder)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in read_metrics(folder)]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder) if event["kind"] == kind]


def saved_facts(folder: Path) -> dict[int, dict[str, Any]]:
    """The facts of every checkpoint, by its step, oldest first."""
    return {step: read_facts(path) for step, path in sorted(steps(folder / "checkpoints").items())}


def shards(folder: Path, step: int) -> dict[str, str]:
    """SHA-256 of every file of tensors."""
    files = read_manifest(folder / "checkpoints" / f"step-{step:08d}").files
    return {name: record.sha256 for name, record in files.items() if name.endswith(".safetensors")}


def check_resumed(folder: Path, *, at: int) -> None:
    """The newest start went on after step ``at`` (0: it began anew), as the same run as all checkpoints of the folder.

    Losses alone cannot tell: a run that begins anew computes them again.
    """
    assert events(folder, "start")[-1]["step"] == at
    identities = {facts["run_id"] for facts in saved_facts(folder).values()}
    assert len(identities) == 1, identities
    assert None not in identities
