"""Preference tuning: pairs on every mesh and schedule give the numbers of whole models in one process."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, ZeroCase
from harness import run_ranks
from parity import Reference, assembled, assert_same_numbers, compare, difference, one_process, own_share, reference
from runs import events, recipe_on, run
from samples import write_rows

from cuboid.launch.progress import told as told_line
from cuboid.parallel import preference
from cuboid.parallel.loss import IGNORE
from cuboid.trainer import adapters
from cuboid.trainer.recipe import Recipe
from cuboid.trainer.recipe_preference import PreferenceSettings


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reference of another family."""
    folder = tmp_path_factory.mktemp("models") / "other"
    one_process(Case(family="qwen3")).save_pretrained(folder)
    return str(folder)


CELLS = [
    Case(2, 2, 2, "1f1b", tied=True, preference="sigmoid"),
    Case(2, 1, 2, "zbv", lora="some", preference="sigmoid", reference="adapter"),
]
MORE_CELLS = [
    Case(2, 1, 2, "interleaved_1f1b", sequence=False, preference="sigmoid", reference="other"),
    Case(2, 1, 1, "gpipe", preference="ipo"),
    Case(2, 2, 1, "looped_bfs", tied=True, lora="all", preference="sigmoid"),
    Case(2, 2, 1, "interleaved_zero_bubble", preference="sigmoid", shard=False),
    Case(2, 2, 2, "dualpipe_v", lora="all", preference="ipo", reference="adapter"),
    Case(2, 1, 2, activation_checkpointing="full", lora="some", preference="sigmoid", reference="adapter"),
    Case(2, 2, 1, lora="dora", preference="sigmoid"),
    Case(2, 1, 1, frozen="leading", preference="sigmoid", reference="other"),
    Case(1, 2, 2, family="mixtral", expert=2, lora="all", preference="sigmoid", reference="adapter"),
    ZeroCase(1, 2, 1, zero_stage=2, preference="sigmoid", reference="other"),
    ZeroCase(2, 2, 1, zero_stage=1, preference="ipo"),
    ZeroCase(1, 2, 1, zero_stage=3, preference="sigmoid"),
    Case(1, 2, 1, family="mixtral", expert=2, lora="experts", preference="sigmoid", reference="adapter"),
    Case(2, 1, 1, family="blocks", lora="nf4-some", preference="sigmoid", reference="adapter"),
]


@pytest.mark.parametrize(
    "case", [*CELLS, *(pytest.param(case, marks=pytest.mark.full) for case in MORE_CELLS)], ids=str
)
def test_mesh_equals_one_process(case: Case, other: str) -> None:
    if case.reference == "other":
        case = replace(case, reference=other)
    ranks = difference(case)
    assert_same_numbers(case, ranks)


def judged_by_formula(case: Case, expected: Reference, folder: str) -> dict[str, float]:
    """The first batch, in float64 and by TRL's formulas: `sigmoid` and `ipo` of DPOTrainer, its rewards and logps."""
    from transformers import AutoModelForCausalLM

    policy, other = one_process(case), AutoModelForCausalLM.from_pretrained(folder)
    batch, settings = expected.batches[0], case.recipe().preference
    assert settings is not None
    found = {"log_probabilities": [], "rewards": [], "losses": []}
    for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
        begins = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        if len(begins) != 3:  # of one document
            continue
        logps = []
        for first, stop in pairwise(begins):
            mask = (labels[first:stop] != IGNORE).double()
            wanted = labels[first:stop].clamp(min=0)[:, None]
            for model in (policy, other):
                with torch.no_grad():  # a document of its own: nothing stands before or behind it
                    logits = model(input_ids=ids[None, first:stop], use_cache=False).logits[0].double()
                logps.append((F.log_softmax(logits, -1).gather(-1, wanted)[:, 0] * mask).sum())
            logps.append(mask.sum())
        chosen, ref_chosen, of_chosen, rejected, ref_rejected, of_rejected = (value.item() for value in logps)
        if not (of_chosen and of_rejected):
            continue
        found["log_probabilities"].append((chosen, rejected))
        if settings.loss == "ipo":
            chosen, ref_chosen = chosen / of_chosen, ref_chosen / of_chosen
            rejected, ref_rejected = rejected / of_rejected, ref_rejected / of_rejected
        beta, smoothing = settings.beta, settings.label_smoothing
        ratio = torch.tensor((chosen - rejected) - (ref_chosen - ref_rejected), dtype=torch.float64)
        sigmoid = -F.logsigmoid(beta * ratio) * (1 - smoothing) - F.logsigmoid(-beta * ratio) * smoothing
        loss = (ratio - 1 / (2 * beta)) ** 2 if settings.loss == "ipo" else sigmoid
        found["losses"].append(loss.item())
        found["rewards"].append((beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)))
    count = len(found["losses"])
    assert 4 <= count < len(batch.labels), "pairs, and rows without one"
    rewards, logps = ([sum(column) / count for column in zip(*found[name], strict=True)] for name in list(found)[1::-1])
    return {
        "loss": sum(found["losses"]) / count,
        "pairs": count,
        "reward_chosen": rewards[0],
        "reward_rejected": rewards[1],
        "reward_margin": rewards[0] - rewards[1],
        "accuracy": sum(chosen > rejected for chosen, rejected in found["rewards"]) / count,
        "log_probability_chosen": logps[0],
        "log_probability_rejected": logps[1],
    }


def judge(case: Case, expected: Reference) -> list[dict[str, Any]]:
    """In every rank: what an evaluation and then a step say of the first batch."""
    with assembled(case, expected.weights) as engine:
        batch = own_share(expected.batches[0], engine.block)
        both = engine.evaluate([batch, batch]), engine.backward(batch)
        return [{"loss": found.loss, **found.preferences.record()} for found in both if found.preferences]


@pytest.mark.parametrize("kind", ["sigmoid", pytest.param("ipo", marks=pytest.mark.full)])
def test_steps_and_evaluations_tell_what_the_published_formulas_give(kind: str, other: str) -> None:
    """Loss, rewards, margin, accuracy and log probabilities, on a mesh whose ranks have unequally many pairs."""
    case = Case(2, 2, 1, preference=kind, reference=other)
    expected = reference(case)
    formula = judged_by_formula(case, expected, other)
    for evaluation, step in run_ranks(judge, 4, case, expected, timeout=120):
        assert step == pytest.approx(formula, rel=1e-5)
        assert evaluation == pytest.approx({**formula, "pairs": 2 * formula["pairs"]}, rel=1e-5)
    assert 0 < formula["accuracy"] < 1


def adapters_left_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "switched_off", lambda models: nullcontext())


def answers_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    take = preference.LogProbabilitiesKept.take

    def exchanged(self: preference.LogProbabilitiesKept) -> dict[str, torch.Tensor]:
        return {name: kept.flip(0) for name, kept in take(self).items()}

    monkeypatch.setattr(preference.LogProbabilitiesKept, "take", exchanged)


@pytest.mark.full
@pytest.mark.parametrize("plant", [adapters_left_on, answers_exchanged])
def test_a_planted_fault_is_found(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, 1, 1, lora="some", preference="sigmoid", reference="adapter")
    expected = reference(case)
    plant(monkeypatch)
    ranks = run_ranks(compare, case.world_size, case, expected, timeout=120)
    assert max(max(rank.losses) for rank in ranks) > 1e-3
    assert max(rank.gradient for rank in ranks) > 1e-3


def test_a_run_goes_on_against_the_model_that_it_began_with(tmp_path: Path) -> None:
    """On another mesh, where the reference is read anew; evaluation tells the same of held-out pairs."""
    rows = [
        {"prompt": f"{row} is", "chosen": "x" * (1 + row % 5), "rejected": "y" * (1 + row % 7)} for row in range(40)
    ]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    changes = {
        "data": {"kind": "preference", "path": path, "eval_path": path, "sequence_length": 48},
        "train": {"steps": 4, "eval_every": 2, "eval_first": True, "eval_batches": 2},
        "checkpoint": {"every": 2},
    }

    def pairs(mesh: str, steps: int, **parallel: Any) -> Recipe:
        whole = recipe_on(mesh, changes={**changes, "train": {**changes["train"], "steps": steps}}, **parallel)
        return whole.model_copy(update={"preference": PreferenceSettings(beta=0.5)})

    told = run(pairs("1x1x1", 4), tmp_path / "whole")
    run(pairs("2x1x1", 2, schedule="zbv"), tmp_path / "broken")
    for one, other in zip(told, run(pairs("1x2x1", 4), tmp_path / "broken"), strict=True):
        for name in ("loss", "grad_norm", *(name for name in one if "reward" in name or "log_prob" in name)):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
        assert other["pairs"] == one["pairs"] > 8, "several in a sequence"
        assert other.get("eval_accuracy") == one.get("eval_accuracy")
    assert told[-1]["eval_accuracy"] > 0.5
    (first,) = events(tmp_path / "whole", "evaluation")
    assert (first["eval_accuracy"], first["eval_reward_margin"]) == (0.5, 0), "policy and reference are one at first"
    assert told_line(first) == "held-out loss before training 0.6931 (accuracy 50%, margin 0.000)"
