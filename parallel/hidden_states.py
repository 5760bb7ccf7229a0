"""How far the student's hidden states are from a teacher's: a distance for `layer_terms`.

Shapes: B sequences of a microbatch, T tokens, t those of this tensor rank (T without sequence parallelism), D model.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup


def hidden_distance(
    student_BtD: Tensor,
    teacher_BtD: Tensor,
    predicted_BT: Tensor,
    mask: Tensor | None,
    *,
    kind: str,
    tensor_group: ProcessGroup,
) -> Tensor:
    """Summed over this rank's predicted tokens. ``kind``: mse, the mean over D of squared differences (Jiao et al.
    2020, "TinyBERT", equation 8); or cosine, one less the cosine of the angle between the two (Sanh et al. 2019,
    "DistilBERT", section 3)."""
    found, wanted = student_BtD.float(), teacher_BtD.float()
    each = (found - wanted).square().mean(-1) if kind == "mse" else 1 - F.cosine_similarity(found, wanted, dim=-1)
    tokens = found.shape[1]
    first = tokens * tensor_group.rank() if tokens < predicted_BT.shape[1] else 0
    return (each * predicted_BT[:, first : first + tokens]).sum()
