"""Dropout: ``s = mask x / (1 - p)``, entry by entry or channel by channel.

A path that is pulled back before the mask is drawn takes the mean of dropout, the identity.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guessopt.ops.base import Entries, Op, register


def dropout(x: Tensor, dx: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, **other: Any) -> Any:
    """``ds = mask / (1 - p) dx`` with the mask that torch draws from the same random state."""
    if inplace or other or not training or not 0 < p < 1:
        return NotImplemented
    if x.is_cuda:
        out, mask = torch.native_dropout(x, p, True)
        return out, (dx * mask).mul_(1 / (1 - p))
    mask = torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
    return x * mask, dx * mask


def draws(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a dropout ``(x, p, training)`` draws a mask."""
    p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    return p != 0 and bool(args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True)))


register(Op((F.dropout, torch.dropout), tangent=dropout, draws=draws, masks_by_shape=True, entries=Entries.DROPOUT))
register(Op((F.alpha_dropout,), draws=draws, masks_by_shape=True, entries=Entries.DROPOUT))
register(
    Op(
        (F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout, torch.feature_dropout),
        draws=draws,
        entries=Entries.DROPOUT,
    )
)
register(Op((torch.dropout_, torch.alpha_dropout), draws=draws, masks_by_shape=True))
