"""Hidden states against a teacher's: a loss behind every layer, on whatever stage it stands.

Shapes: B sequences of a microbatch, T tokens, t those of this tensor rank (T without sequence parallelism), D model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from cuboid.parallel.loss import Attach


def partners(layers: int, of_teacher: int) -> list[int]:
    """Which of the teacher's layers each of the student's is compared with: the one that ends as large a part of the
    model, so that the last meets the last (Jiao et al. 2020, "TinyBERT", section 4.1: every third for a third)."""
    return [(layer + 1) * of_teacher // layers - 1 for layer in range(layers)]


class StatesKept:
    """Keeps what these of the teacher's layers give on this rank, each microbatch apart: `Stage.watch` of a teacher."""

    def __init__(self, layers: Collection[int]) -> None:
        self._layers = frozenset(layers)
        self._kept: dict[tuple[int, int], Tensor] = {}

    def __call__(self, layer: int, hidden_BtD: Tensor, rows: Tensor, predicted: None = None) -> Tensor:
        """``rows`` are the numbers of the microbatch's sequences in the step."""
        if layer in self._layers:
            self._kept[layer, int(rows[0])] = hidden_BtD.detach()
        return hidden_BtD

    def take(self, layer: int, rows: Tensor) -> Tensor:
        return self._kept.pop((layer, int(rows[0])))


class HiddenStatesLoss:
    """Adds to the backward of each of the student's layers how far its hidden states are from the teacher's, a mean
    over layers and predicted tokens: `Stage.watch` of a student. The parts of all ranks add up to the whole.

    Args:
        teacher: what the teacher's layers on this rank gave.
        partners: the teacher's layer for each layer of the whole student.
        weight: of the mean in the loss.
        kind: mse, the mean over D of squared differences (Jiao et al. 2020, equation 8); or cosine, one less the
            cosine of the angle between the two (Sanh et al. 2019, "DistilBERT", section 3).
        tensor_group: the ranks among which a sequence's tokens may be divided.
    """

    def __init__(
        self, teacher: StatesKept, partners: Sequence[int], *, weight: float, kind: str, tensor_group: ProcessGroup
    ) -> None:
        self._teacher, self._partners, self._weight, self._kind = teacher, partners, weight, kind
        self._group = tensor_group
        self._total: Tensor | float = 0.0
        self.num_valid_tokens: float = 0
        """As in `SummedCrossEntropy`."""

    def __call__(self, layer: int, hidden_BtD: Tensor, rows: Tensor, predicted_BT: Tensor) -> Tensor:
        """The hidden states as they are; their loss joins in the backward."""
        wanted = self._teacher.take(self._partners[layer], rows).float()
        found, tokens = hidden_BtD.float(), hidden_BtD.shape[1]
        parts = predicted_BT.shape[1] // tokens
        first = tokens * self._group.rank() if parts > 1 else 0
        if self._kind == "mse":
            each = (found - wanted).square().mean(-1)
        else:
            each = 1 - F.cosine_similarity(found, wanted, dim=-1)
        summed = (each * predicted_BT[:, first : first + tokens]).sum()
        loss = summed * self._weight / (len(self._partners) * self.num_valid_tokens)
        # where tensor ranks share the tokens, each has a part of what else all have whole
        return Attach.apply(hidden_BtD, loss, partial(self._record, loss.detach() * parts))

    def take(self) -> float:
        """This rank's part of the step's loss, of which every tensor rank's counts as the whole; counting begins
        anew."""
        total, self._total = self._total, 0.0
        return float(total)

    def _record(self, loss: Tensor) -> None:
        self._total = self._total + loss
