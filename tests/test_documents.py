"""Documents that share a sequence know nothing of one another, on every mesh and with every attention."""

from __future__ import annotations

import pytest
import torch
from cases import TOKENS, VOCABULARY, Case
from harness import run_ranks

from cuboid.parallel.mesh import connect
from cuboid.trainer.assemble import assemble, initial_weights
from cuboid.trainer.data import Batch
from cuboid.trainer.model import draw_blueprint
from cuboid.trainer.model_config import read_checked_config

BEGINS = 5
"""Where the second document of every row begins."""
APART = torch.cat([torch.arange(BEGINS), torch.arange(TOKENS - BEGINS)])
RUNNING = torch.arange(TOKENS)
"""Positions of `cross_documents: true`: one running text."""


def logits(case: Case, attention: str) -> dict[str, torch.Tensor] | None:
    """In every rank: of the first rows, as drawn and with other tokens in each row's first document."""
    recipe = case.recipe()
    with connect(recipe.layout, timeout_seconds=60) as block:
        blueprint = draw_blueprint(read_checked_config(recipe.model), attention=attention)
        assert blueprint.model.config._attn_implementation == attention
        engine = assemble(recipe, block, blueprint, initial_weights(recipe, blueprint))
        with torch.no_grad():
            for _, parameter in engine.parameters:
                if parameter.dim() > 1:
                    parameter.mul_(5)  # initial weights are so small that attention hardly matters
        outputs: list[torch.Tensor] = []
        for stage in engine.pipeline.modules.values():
            if stage.is_last:
                stage.register_forward_hook(lambda _, args, output: outputs.append(output.detach().clone()))
        rows = recipe.train.global_batch // case.data
        ids = torch.randint(VOCABULARY, (rows, TOKENS), generator=torch.Generator().manual_seed(3))
        other = ids.clone()
        other[:, :BEGINS] = (ids[:, :BEGINS] + 1) % VOCABULARY
        found = {}
        for words, positions in {"apart": APART, "running": RUNNING}.items():
            for which, tokens in {"drawn": ids, "other": other}.items():
                outputs.clear()
                engine.backward(Batch(tokens, ids, positions.repeat(rows, 1)))
                if outputs:
                    found[f"{words} {which}"] = torch.cat(outputs)
        return found or None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", [Case(), Case(2, 1, 2), Case(2, 1, 2, family="mistral")], ids=str)
def test_a_document_does_not_see_the_one_before_it(case: Case, attention: str) -> None:
    ranks = [found for found in run_ranks(logits, case.world_size, case, attention, timeout=120) if found]
    assert len(ranks) == case.tensor, "the last stage's ranks"
    for found in ranks:
        drawn, other = found["apart drawn"], found["apart other"]
        assert torch.equal(drawn[:, BEGINS:], other[:, BEGINS:]), "bit for bit, since nothing of it came in"
        changed = (drawn[:, :BEGINS] != other[:, :BEGINS]).any(-1)
        assert changed.all(), "where the tokens differ"
        # one running text looks back: across the border, as far as the sliding window or the sequence goes
        drawn, other = found["running drawn"], found["running other"]
        assert (drawn[:, BEGINS:] != other[:, BEGINS:]).any(-1).all()
