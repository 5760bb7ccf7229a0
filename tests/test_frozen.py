"""Frozen parameters: the others train as in one process, on every schedule; these keep their bits and have no state."""

from __future__ import annotations

from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from cases import FROZEN, LEARNING_RATE, Case
from harness import run_ranks
from parity import (
    Reference,
    assembled,
    assert_same_numbers,
    compare,
    difference,
    freeze,
    full,
    own_share,
    reference,
    relative,
)

from cuboid.parallel import pipeline, tensor
from cuboid.parallel.schedules import SCHEDULES
from cuboid.trainer.assemble import layers_of_stages
from cuboid.trainer.checkpoint import Checkpointer, load
from cuboid.trainer.model import draw_blueprint
from cuboid.trainer.model_config import read_checked_config

CASES = [
    Case(1, 2, 2, family="qwen3", activation_checkpointing="full", frozen="norms"),
    Case(2, 2, 1, "1f1b", layers=5, frozen="leading"),  # the first rank trains nothing
    Case(2, 1, 2, "gpipe", tied=True, frozen="embedding"),
    Case(2, 1, 1, "interleaved_1f1b", frozen="middle"),
    Case(2, 1, 2, "looped_bfs", sequence=False, frozen="trailing"),
    Case(2, 2, 1, "interleaved_zero_bubble", frozen="leading"),
    Case(2, 2, 2, "zbv", tied=True, shard=False, frozen="embedding"),
    Case(2, 2, 1, "dualpipe_v", "qwen3", frozen="middle"),  # the second rank trains nothing
]
MESHES = ((2, 2, 1), (2, 1, 2), (2, 1, 1))
EVERY = [
    Case(*mesh, schedule, tied=tied, shard=shard, frozen=frozen)
    for (schedule, frozen), mesh, tied, shard in zip(
        product(SCHEDULES, list(FROZEN)[1:]), cycle(MESHES), cycle((False, True)), cycle((True, True, True, False))
    )
]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.full) for case in EVERY)], ids=str)
def test_what_is_trained_trains_as_in_one_process(case: Case) -> None:
    assert_same_numbers(case, difference(case))


@pytest.mark.parametrize(
    ("case", "stage"),
    [
        (Case(2, layers=5, frozen="leading"), 0),
        (Case(2, schedule="zbv", frozen="leading"), 0),
        (Case(2, schedule="zbv", frozen="middle"), 1),
        (Case(2, schedule="zbv", frozen="middle"), 2),
        (Case(2, frozen="trailing"), 1),
        (Case(2, schedule="zbv", frozen="trailing"), 3),
    ],
    ids=str,
)
def test_whole_stages_are_frozen(case: Case, stage: int) -> None:
    """What the names in `FROZEN` promise of stages is true of these."""
    recipe = case.recipe()
    blueprint = draw_blueprint(read_checked_config(recipe.model))
    freeze(blueprint.model, case.frozen)
    split = layers_of_stages(recipe, blueprint)
    parts = [f"model.layers.{layer}." for layer in split[stage]]
    parts += ["model.embed_tokens."] * (stage == 0) + ["model.norm.", "lm_head."] * (stage == len(split) - 1)
    of_stage = [p for name, p in blueprint.model.named_parameters() if name.startswith(tuple(parts))]
    assert of_stage
    assert not any(parameter.requires_grad for parameter in of_stage)


def test_a_stage_of_frozen_layers_gets_more_of_them() -> None:
    """A frozen matrix has no gradient to compute: two products of three."""
    recipe = Case(2).recipe()
    blueprint = draw_blueprint(read_checked_config(recipe.model))
    assert layers_of_stages(recipe, blueprint) == [range(3), range(3, 6)]
    freeze(blueprint.model, "leading")
    assert layers_of_stages(recipe, blueprint) == [range(4), range(4, 6)]


def thawed_by_tensor_parallelism(patch: pytest.MonkeyPatch) -> None:
    distribute = tensor._distribute

    def forgetful(module: torch.nn.Module, *args: object, **kwargs: object) -> None:
        distribute(module, *args, **kwargs)
        module.requires_grad_()

    patch.setattr(tensor, "_distribute", forgetful)


def inputs_of_stages_without_gradient(patch: pytest.MonkeyPatch) -> None:
    """As torch takes them where the example, or a frozen stage before, asks for none."""
    retrieve = pipeline.TimedStage._retrieve_recv_activations

    def cold(self: pipeline.TimedStage, microbatch: int) -> tuple[torch.Tensor, ...]:
        return tuple(hidden.detach() for hidden in retrieve(self, microbatch))

    patch.setattr(pipeline.TimedStage, "_retrieve_recv_activations", cold)


def test_a_frozen_parameter_that_is_thawed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 1, 2, frozen="norms")
    thawed_by_tensor_parallelism(monkeypatch)
    ranks = run_ranks(compare, case.world_size, case, reference(case), timeout=120)
    assert all("model.norm.weight" in rank.touched for rank in ranks)


def test_gradients_that_go_missing_behind_a_frozen_stage_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, 1, 1, "interleaved_zero_bubble", frozen="leading")
    inputs_of_stages_without_gradient(monkeypatch)
    ranks = run_ranks(compare, case.world_size, case, reference(case), timeout=120)
    assert any(rank.missing for rank in ranks)


def save_after_a_step(case: Case, expected: Reference, folder: Path) -> None:
    with assembled(case, expected.weights) as engine:
        result = engine.backward(own_share(expected.batches[0], engine.block))
        engine.update(result, learning_rate=LEARNING_RATE)
        with Checkpointer(folder, keep=1, asynchronous=False) as checkpointer:
            checkpointer.save(1, engine.tensors(), {})


def go_on(case: Case, expected: Reference, folder: Path) -> tuple[list[float], dict[str, float]]:
    """From other weights: relative errors of the later losses, and of each parameter's update (frozen: largest one)."""
    with assembled(case, {name: torch.zeros_like(weight) for name, weight in expected.weights.items()}) as engine:
        tensors = engine.tensors()
        load(folder / "step-00000001", tensors)
        engine.resume_at(1, tensors)
        losses = []
        for batch, loss in zip(expected.batches[1:], expected.losses[1:], strict=True):
            result = engine.backward(own_share(batch, engine.block))
            losses.append(relative(result.loss, loss))
            engine.update(result, learning_rate=LEARNING_RATE)
        updates = {}
        for name, parameter in engine.parameters:
            moved = full(parameter.detach()) - expected.weights[name]
            update = expected.updates.get(name)
            updates[name] = (moved.abs().max() if update is None else (moved - update).norm() / update.norm()).item()
        return losses, updates


def test_a_checkpoint_goes_on_on_another_mesh(tmp_path: Path) -> None:
    """It holds every parameter, and the optimizer's state of those that are trained."""
    saved_on, read_on = (
        Case(2, 2, 1, "zbv", tied=True, frozen="leading"),
        Case(2, 1, 2, "1f1b", tied=True, frozen="leading"),
    )
    expected = reference(saved_on)
    run_ranks(save_after_a_step, saved_on.world_size, saved_on, expected, tmp_path, timeout=120)
    for losses, updates in run_ranks(go_on, read_on.world_size, read_on, expected, tmp_path, timeout=120):
        assert max(losses) <= 1e-5
        for name, error in updates.items():
            assert error <= (2e-4 if name in expected.updates else 0.0), name
