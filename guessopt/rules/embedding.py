"""Rows looked up by index, and sums of them: linear in the table.

Letters: n example, w the table ``[words, features]``.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from guessopt.rules.base import register_tangent


@register_tangent(F.embedding_bag, duals=2)
def embedding_bag(
    ids_and_table: tuple[Tensor, Tensor], tangents: tuple[None, Tensor], *rest: Any, mode: str = "mean", **other: Any
) -> Any:
    """``ds = bag(dw)`` for sums and means; torch has no forward derivative."""
    if mode == "max" or rest or other.get("max_norm") is not None:
        return NotImplemented
    (ids, w), (_, dw) = ids_and_table, tangents
    return F.embedding_bag(ids, w, mode=mode, **other), F.embedding_bag(ids, dw, mode=mode, **other)
