"""How many bytes of tensors live at once, counted while a program runs, also on `meta`, where none takes memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within: every memory that an operation hands out, from then until nothing refers to it.

    What an operation takes and frees inside itself is not seen. ``known`` tensors are there already and not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        """The most since it was last set."""
        self._seen: set[int] = set()
        for tensor in known:
            self._watch(tensor, counted=False)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(given):
            if isinstance(leaf, Tensor):
                self._watch(leaf)
        return given

    def _watch(self, tensor: Tensor, *, counted: bool = True) -> None:
        storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counted else 0
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class FusedAttention(TorchFunctionMode):
    """Within: `scaled_dot_product_attention` keeps for its backward what a fused kernel keeps, on `meta` too, where
    torch would take the one that holds all scores [B, H, T, T]."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
            return _Fused.apply(given["query"], given["key"], given["value"], given.get("attn_mask"))
        return func(*args, **(kwargs or {}))


class _Fused(torch.autograd.Function):
    """Dao et al. 2022, "FlashAttention", section 3.1: queries, keys, values, the output, and one number for each row of
    scores; and a mask, which torch turns into numbers for each call. Of shapes alone; nothing is computed."""

    @staticmethod
    def forward(ctx: Any, query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        batch, heads, tokens, _ = query_BHTD.shape
        # every kernel lays the output out as [B, T, H, D], so that the heads can be read side by side without a copy
        output_BHTD = query_BHTD.new_empty(batch, tokens, heads, value_BHTD.shape[-1]).transpose(1, 2)
        rows_BHT = query_BHTD.new_empty(batch, heads, tokens, dtype=torch.float32)
        added = [] if mask_B1TT is None else [query_BHTD.new_empty(mask_B1TT.shape)]
        ctx.save_for_backward(query_BHTD, key_BHTD, value_BHTD, output_BHTD, rows_BHT, *added)
        return output_BHTD

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None
