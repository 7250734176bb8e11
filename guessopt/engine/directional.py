"""Directional derivatives, from the cuts' tangents and exact errors: ``D_n`` by example, ``l'[n, t]`` by position."""

from __future__ import annotations

from collections.abc import Sequence

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


def by_position(graph: SiteGraph, errors: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor:
    """``l'[n, t]``, ``[N, T]``, of the cuts that have positions; ``[1, T]`` if some cut's examples cannot be told
    apart."""
    parts = [
        cut.layout.sum_positions(inner(wide(e), wide(t)), graph.batch, cut.position_dim)
        for cut, e, t in zip(graph.cuts, errors, tangents, strict=True)
        if t is not None and cut.position_dim is not None
    ]
    if not parts:
        like = next(e for e, cut in zip(errors, graph.cuts, strict=True) if cut.position_dim is not None)
        return wide(like).new_zeros(graph.batch, graph.positions)
    if len({len(part) for part in parts}) > 1:
        parts = [part.sum(0, keepdim=True) for part in parts]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
