"""Directional derivatives ``D_n``, from the cuts' tangents and exact errors."""

from __future__ import annotations

import torch
from torch import Tensor

from guessopt.engine.jvp.duals import inner
from guessopt.graph import SiteGraph
from guessopt.linalg import wide


def directional_derivatives(graph: SiteGraph, errors: list[Tensor], tangents: list[Tensor | None]) -> Tensor:
    """``D_n = sum_v Re <dL/dv[n], v'[n]>`` over the cuts ``v`` (Singhal eq. 13's scalar, per example): the derivative
    of example n's share of the loss.

    Args:
        errors: ``dL/dv`` of each cut.
        tangents: ``v'`` of each cut, of the same shape; None for zero.

    Returns:
        ``[N]``, or the sum ``[1]`` if some cut's examples cannot be told apart.
    """
    parts = [
        cut.layout.sum_examples(inner(wide(e), wide(t)), graph.batch)
        for cut, e, t in zip(graph.cuts, errors, tangents, strict=True)
        if t is not None
    ]
    if not parts:
        return torch.zeros(1)
    if len({part.shape[0] for part in parts}) > 1:
        parts = [part.sum().reshape(1) for part in parts]
    d = parts[0]
    for part in parts[1:]:
        d = d + part
    return d
