"""A calibration set: text that tells which inputs each linear layer of a finished model meets.

Shapes: N samples, T tokens of a sample, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cuboid.parallel.errors import FieldError, UserError
from cuboid.parallel.loss import IGNORE
from cuboid.trainer.data import Batch
from cuboid.trainer.held_out import SAMPLES, Passage, attention_masks, passage_at, passage_of
from cuboid.trainer.model_folder import Config, Finished, Model, linears, on_meta

_DAMPING = 0.01
"""Of the mean of X'X's diagonal, added to all of it (GPTQ, section 3.3)."""
_RUN = 32
"""Tokens one after another that, found in two texts, are no accident."""
_SAME = 0.5
"""The share of such runs above which two texts are the same: headings and licences recur in files of one kind."""


@dataclass(frozen=True)
class CalibrationSet:
    """What a method asks."""

    batch: Batch
    words: str
    """Which text it is, how much, and how much of the held-out text stands in it, in a line."""


@dataclass(frozen=True)
class Calibration:
    """Which text, and how much of it."""

    path: str | None = None
    """Given like `data.path`; None: what the model's run trained on."""
    samples: int = SAMPLES

    def read(self, model: Finished, config: Config, held_out: Passage | None) -> CalibrationSet:
        """The samples, in the tokens of the model.

        Args:
            held_out: the text that the model is measured on.

        Raises:
            UserError: there is no text, it cannot be read, has so few tokens that no X'X could have full rank, or is
                the held-out text.
        """
        passage = self._passage(model, config)
        dataset = passage.open(model.folder)
        count = min(passage.samples, dataset.num_samples)
        batch = dataset.batch(range(count))
        tokens = int(_content(batch).sum())
        widest = max(linear.in_features for _, linear in linears(on_meta(config)))
        if tokens < widest:
            constraint = f"gives {tokens:,} tokens, fewer than the {widest:,} inputs of the widest linear layer"
            enough = -(-count * widest // tokens)
            if enough > dataset.num_samples:
                raise FieldError(passage.field, passage.words, constraint, "give more text")
            raise FieldError("--calibration-samples", self.samples, constraint, f"use at least {enough}")
        words = f"{tokens:,} tokens of {passage.words}"
        if held_out is not None:
            share = _share_known(held_out.read(model.folder), batch)
            if share > _SAME:
                constraint = f"holds {share:.0%} of the held-out text, whose loss would say nothing then"
                raise FieldError(passage.field, passage.words, constraint, "give other text")
            words += f", which has {share:.1%} of the held-out runs of {_RUN} tokens"
        return CalibrationSet(batch, words)

    def _passage(self, model: Finished, config: Config) -> Passage:
        if model.recipe is None:
            if self.path is None:
                words = "which inputs the layers meet; give --calibration, a text named as data.path names one"
                raise UserError(f"this method asks {words}")
            return passage_at(self.path, field="--calibration", config=config, samples=self.samples)
        if self.path is None:
            return Passage(field="data.path", data=model.recipe.data, samples=self.samples, seed=model.recipe.seed)
        passage = passage_of(model.recipe, self.path)
        assert passage is not None
        return replace(passage, field="--calibration", samples=self.samples)


def _share_known(held_out: Batch, calibration: Batch) -> float:
    """Which share of the held-out runs of tokens stands in the calibration set too."""
    found, known = (_runs(batch.input_ids) for batch in (held_out, calibration))
    return torch.isin(found, known).double().mean().item()


def _runs(ids_NT: Tensor) -> Tensor:
    """A number for each run of tokens; what fills samples up, the same token all over, is none."""
    runs = ids_NT.unfold(1, min(_RUN, ids_NT.shape[1]), 1).flatten(0, 1)
    runs = runs[(runs != runs[:, :1]).any(1)]
    draw = torch.Generator().manual_seed(0)
    return runs @ torch.randint(-(2**62), 2**62, (runs.shape[1],), generator=draw)  # modulo 2**64: a hash


def _content(batch: Batch) -> Tensor:
    """[N, T]: the tokens that do not merely fill a sample up: after the last that is predicted nothing comes."""
    return (batch.labels != IGNORE).flip(1).cumsum(1).flip(1) > 0


@torch.no_grad()
def visit_linears(model: Model, batch: Batch, visit: Callable[[str, nn.Linear, Tensor], None]) -> None:
    """Run the model over the calibration set, all of it one layer at a time, up to the head.

    Each linear layer, before it computes, is given to ``visit`` with X'X [I, I] of its inputs X, float32 and slightly
    damped. What ``visit`` does to its weight holds for all that comes after it: later layers meet the inputs that
    they will meet.
    """
    content_NT = _content(batch)

    def reached(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(linear: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert isinstance(linear, nn.Linear)
            x = inputs[0].flatten(0, -2)[content_NT.flatten()].float()
            hessian_II = x.T @ x
            scale = hessian_II.diagonal().mean().item() or 1.0  # where all inputs are 0 any weight is as good
            hessian_II.diagonal().add_(_DAMPING * scale)
            visit(name, linear, hessian_II)

        return before

    hooks = [linear.register_forward_pre_hook(reached(name)) for name, linear in linears(model)]
    masks = attention_masks(model, batch.position_ids)
    model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=masks, use_cache=False)
    for hook in hooks:
        hook.remove()
