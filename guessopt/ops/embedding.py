"""Rows looked up by index, and sums of them: linear in the table.

Letters: n example, b bag, i feature. The table ``w`` is ``[words, i]``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guessopt.ops.base import Op, register


def embedding_bag(
    ids_and_table: tuple[Tensor, Tensor], tangents: tuple[None, Tensor], *rest: Any, mode: str = "mean", **other: Any
) -> Any:
    """``ds = bag(dw)`` for sums and means. For maxima, ``ds[b, i]`` is ``dw`` of the word that ``s[b, i]`` comes from.

    Torch has no forward derivative. ``ids`` is ``[b, n]``, or ``[n]`` with ``offsets`` ``[b]``; ``s`` is ``[b, i]``."""
    if rest or other.get("max_norm") is not None:
        return NotImplemented
    (ids, w), (_, dw) = ids_and_table, tangents
    if mode == "max":
        return F.embedding_bag(ids, w, mode=mode, **other), _of_largest(ids, w, dw, **other)
    return F.embedding_bag(ids, w, mode=mode, **other), F.embedding_bag(ids, dw, mode=mode, **other)


def _of_largest(
    ids: Tensor,
    w: Tensor,
    dw: Tensor,
    offsets: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    **other: Any,
) -> Tensor:
    """``[b, i]``: ``dw`` of the word that has given each entry its maximum; 0 for an empty bag."""
    if offsets is None:
        offsets = torch.arange(0, ids.numel(), ids.shape[1], device=ids.device)
    padding = None if padding_idx is None else padding_idx % len(w)
    _, _, sizes, chosen = torch.embedding_bag(
        w, ids.flatten(), offsets, False, 2, False, None, include_last_offset, padding
    )
    full = (sizes[: len(chosen)] > 0)[:, None]
    return torch.where(full, dw.gather(0, torch.where(full, chosen, 0)), 0)


register(Op((F.embedding_bag,), tangent=embedding_bag, duals=2))
