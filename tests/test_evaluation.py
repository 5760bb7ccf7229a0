"""Evaluation: the loss of one process on every mesh and schedule, and a training that does not notice."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import LEARNING_RATE, Case, ZeroCase
from harness import run_ranks
from parity import Reference, assembled, own_share, reference, relative
from runs import STEPS, events, losses, recipe_on, run

from cuboid.trainer.runlog import read_metrics


def evaluate_between_steps(case: Case, expected: Reference) -> list[tuple[float, float, float]]:
    """Relative errors of the evaluated loss, the trained one and the gradient norm of each step but the first."""
    with assembled(case, expected.weights) as engine:
        errors = []
        for step, batch in enumerate(expected.batches):
            own = own_share(batch, engine.block)
            evaluated, tokens, _ = engine.evaluate([own, own]) if step else (0.0, 0, None)
            result = engine.backward(own)
            loss, norm = expected.losses[step], expected.norms[step]
            if step:
                assert tokens == 2 * result.tokens
                found = (relative(evaluated, loss), relative(result.loss, loss), relative(result.grad_norm, norm))
                errors.append(found)
            engine.update(result, learning_rate=LEARNING_RATE)
        return errors


CASES = [
    Case(1, 2, 2, activation_checkpointing="full"),
    Case(2, 2, 1, "gpipe", shard=False),
    Case(2, 2, 2, "1f1b", tied=True),
    Case(2, 2, 1, "interleaved_1f1b"),
    Case(2, 1, 2, "looped_bfs"),
    Case(2, 2, 1, "interleaved_zero_bubble"),
    Case(2, 2, 1, "zbv", tied=True),
    Case(2, 1, 1, "dualpipe_v"),
    ZeroCase(1, 2, 1, zero_stage=3),
    pytest.param(ZeroCase(2, 2, 1, zero_stage=1), marks=pytest.mark.full),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_loss_is_evaluated_as_it_is_trained_and_changes_nothing(case: Case) -> None:
    arguments = (case, reference(case))
    for errors in run_ranks(evaluate_between_steps, case.world_size, *arguments, timeout=120):
        for evaluated, trained, norm in errors:
            assert evaluated <= 1e-5
            assert trained <= 1e-5
            assert norm <= 1e-4


def test_a_run_evaluates_held_out_text_on_any_mesh(tmp_path: Path) -> None:
    text = tmp_path / "held-out.txt"
    # 17 samples: two batches and one sample
    text.write_text("Deeds will not be less valiant because they are unpraised. " * 9)
    changes = {"data": {"eval_path": str(text)}, "train": {"eval_every": 4, "eval_first": True, "eval_batches": 5}}
    evaluated = {}
    for mesh, parallel in (("1x1x1", {}), ("2x2x1", {"schedule": "zbv"})):
        run(recipe_on(mesh, changes=changes, **parallel), tmp_path / mesh)
        records = read_metrics(tmp_path / mesh)
        evaluated[mesh] = {r["step"]: (r["eval_loss"], r["eval_tokens"]) for r in records if "eval_loss" in r}
        (first,) = events(tmp_path / mesh, "evaluation")
        evaluated[mesh][0] = (first["eval_loss"], first["eval_tokens"])
    assert list(evaluated["1x1x1"]) == [4, 8, STEPS, 0]
    for step, (loss, tokens) in evaluated["1x1x1"].items():
        # each byte but the first is predicted, and the document's end; what fills the last batch is not
        assert tokens == len(text.read_bytes())
        assert evaluated["2x2x1"][step] == (pytest.approx(loss, rel=1e-5), tokens)
    run(recipe_on("2x2x1", schedule="zbv"), tmp_path / "alone")
    assert losses(tmp_path / "2x2x1") == losses(tmp_path / "alone"), "evaluation leaves no trace in training"
