"""`cuboid verify` of mixtures: right meshes pass, in bfloat16 too, and planted faults of experts are found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner
from verifying import RECIPE, Verify

from cuboid.launch import cli
from cuboid.parallel import collectives, expert
from cuboid.trainer import assemble

pytestmark = pytest.mark.usefixtures("beside_a_text")


def experts_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    build = assemble.build_stages

    def frozen(*arguments: Any) -> Any:
        stages = build(*arguments)
        for _, _, experts, _ in (found for stage in stages for found in expert.expert_modules(stage)):
            experts.requires_grad_(False)
        return stages

    monkeypatch.setattr(assemble, "build_stages", frozen)


def balance_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.record()
        return grad, None, None

    monkeypatch.setattr(expert.Attach, "backward", staticmethod(backward))


def experts_not_rebalanced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert.Experts, "rebalance", lambda self, measures: None)


EXPERTS = ("parallel.expert=2", "model.config.num_local_experts=4", "moe={aux_loss: 0.1, bias_update: 0.1}")


def test_experts_compute_the_numbers_of_one_process(verify: Verify) -> None:
    code, printed = verify(*EXPERTS, family="mixtral")
    assert code == 0, printed
    assert "mixtral, sharded, experts over 2 ranks, shrunk to 3 layers" in printed


IN_BFLOAT16 = ("precision.compute=bfloat16", "model.config.num_local_experts=4", "parallel.data=1")


@pytest.mark.parametrize(
    ("mesh", "seed"),
    [
        ((2, 2), 1),
        *(
            pytest.param(mesh, seed, marks=pytest.mark.full)
            for mesh in ((1, 2), (2, 1), (2, 2))
            for seed in (1, 3)  # with which tokens near a tie chose other experts
            if (mesh, seed) != ((2, 2), 1)
        ),
    ],
)
def test_experts_in_bfloat16_are_compared_without_ties(verify: Verify, mesh: tuple[int, int], seed: int) -> None:
    pipeline, tensor_ranks = mesh
    sizes = (f"parallel.pipeline={pipeline}", f"parallel.tensor={tensor_ranks}", f"seed={seed}")
    code, printed = verify(*IN_BFLOAT16, *sizes, family="mixtral")
    assert code == 0, printed
    assert "bfloat16, each token to all experts, shrunk to " in printed


def gradients_left_where_the_expert_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back to a token's rank is not the gradient of its own copies."""
    backward = staticmethod(lambda ctx, grad: (grad, None, None, None))
    monkeypatch.setattr(collectives._Exchange, "backward", backward)


def test_a_planted_fault_of_experts_is_found_in_bfloat16(verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients_left_where_the_expert_is(monkeypatch)
    code, printed = verify(*IN_BFLOAT16, "parallel.pipeline=1", "parallel.expert=2", family="mixtral")
    assert code == 1, printed
    assert "<- too much" in printed


def test_ties_are_not_mistaken_for_faults() -> None:
    Path("small.yaml").write_text(RECIPE.format(family="mixtral"))
    done = CliRunner().invoke(cli.app, ["verify", "small.yaml", "--shrink", "none", *IN_BFLOAT16])
    assert done.exit_code == 2
    assert "in bfloat16 a token near a tie chooses another expert than in one process" in done.stderr


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (experts_frozen, "no gradient: model.layers.0.mlp.experts.down_proj"),
        pytest.param(balance_without_a_gradient, "mlp.gate.weight  <- too much", marks=pytest.mark.full),
        pytest.param(experts_not_rebalanced, "<- too much", marks=pytest.mark.full),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_planted_faults_of_experts_are_found(
    verify: Verify, plant: Callable[[pytest.MonkeyPatch], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    code, printed = verify(*EXPERTS, family="mixtral")
    assert code == 1, printed
    assert words in printed
