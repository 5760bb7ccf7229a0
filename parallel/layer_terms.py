"""Terms of the loss that compare the student's layers with a teacher's, each on whatever stage its layer stands.

Shapes: B sequences of a microbatch, T tokens, D model, F features of a module on this tensor rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cuboid.parallel.loss import Attach

Compute = Callable[[], Tensor]
"""Runs a layer on a microbatch and gives its hidden states [B, T_local, D]."""
Distance = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""``distance(student's output, teacher's, predicted [B, T], the student's attention mask)``, a sum over the predicted
tokens."""


def partners(layers: int, of_teacher: int) -> list[int]:
    """Which of the teacher's layers each of the student's is compared with: the one that ends as large a part of the
    model, so that the last meets the last (Jiao et al. 2020, "TinyBERT", section 4.1: every third for a third)."""
    return [(layer + 1) * of_teacher // layers - 1 for layer in range(layers)]


@dataclass(frozen=True, kw_only=True)
class Term:
    """One way to compare layers: ``weight`` times the mean over ``layers`` and predicted tokens of a distance, of
    several outputs their sum."""

    layers: Collection[int]
    """Of the student."""
    outputs: Sequence[str]
    """Which outputs: names of modules within a layer; an empty one is the layer's own."""
    weight: float
    distance: Distance
    is_divided: bool
    """Whether each tensor rank's sum is a part of the whole; else each has all of it."""


@contextmanager
def outputs_of(layer: nn.Module, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """What these modules of a layer give while it runs within. A layer that is computed again in the backward is no
    longer listened to."""
    given: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _, __, output: given.__setitem__(name, output)

    hooks = [layer.get_submodule(name).register_forward_hook(listen(name)) for name in names]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


class OutputsKept:
    """Keeps what is compared of a teacher's layers on this rank, each microbatch apart: its `Stage.watch`."""

    def __init__(self, partners: Sequence[int], terms: Sequence[Term]) -> None:
        self._names: dict[int, set[str]] = {}
        for term in terms:
            for layer in term.layers:
                self._names.setdefault(partners[layer], set()).update(term.outputs)
        self._kept: dict[tuple[int, str, int], Tensor] = {}

    def __call__(self, index: int, layer: nn.Module, compute: Compute, *, rows: Tensor, **_: Tensor | None) -> Tensor:
        """``rows`` are the numbers of the microbatch's sequences in the step."""
        with outputs_of(layer, self._names.get(index, ())) as given:
            hidden = compute()
        self._kept |= {(index, name, int(rows[0])): output.detach() for name, output in given.items()}
        return hidden

    def take(self, index: int, name: str, rows: Tensor) -> Tensor:
        return self._kept.pop((index, name, int(rows[0])))


class LayerTerms:
    """Adds its terms to the backward of each of the student's layers: its `Stage.watch`. The parts of all ranks add up
    to the whole.

    Args:
        partners: the teacher's layer for each layer of the whole student.
        tensor_group: the ranks among which a sum may be divided.
    """

    def __init__(self, partners: Sequence[int], terms: Sequence[Term], *, tensor_group: ProcessGroup) -> None:
        self.teacher = OutputsKept(partners, terms)
        self._partners, self._terms, self._group = partners, terms, tensor_group
        self._total: Tensor | float = 0.0
        self.num_valid_tokens: float = 0
        """As in `SummedCrossEntropy`."""

    def __call__(
        self, index: int, layer: nn.Module, compute: Compute, *, rows: Tensor, predicted: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The hidden states as they are; the terms join in the backward."""
        terms = [term for term in self._terms if index in term.layers]
        with outputs_of(layer, {name for term in terms for name in term.outputs}) as given:
            hidden = compute()
        for term in terms:
            wanted = {name: self.teacher.take(self._partners[index], name, rows) for name in term.outputs}
            apart = [term.distance(given[name], wanted[name], predicted, mask) for name in term.outputs]
            loss = torch.stack(apart).sum() * term.weight / (len(term.layers) * self.num_valid_tokens)
            # a part of what else every tensor rank has whole
            record = partial(self._record, loss.detach() * (self._group.size() if term.is_divided else 1))
            if hidden.requires_grad:
                hidden = Attach.apply(hidden, loss, record)
            else:  # nothing up to here is trained, and no backward comes this far
                record()
        return hidden

    def take(self) -> float:
        """This rank's part of the step's loss, of which every tensor rank's counts as the whole; counting begins
        anew."""
        total, self._total = self._total, 0.0
        return float(total)

    def _record(self, loss: Tensor) -> None:
        self._total = self._total + loss
