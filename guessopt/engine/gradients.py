"""From directional derivatives to parameter gradients: ``D_n -> g^_i -> site rule -> gradients``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from guessopt.rng import replayed
from guessopt.sites import ForwardRecord, SiteGraph


def estimated_cotangents(
    graph: SiteGraph, record: ForwardRecord, formed: Mapping[int, Tensor] | None = None
) -> dict[int, Tensor]:
    """``g^_i[n] = D_n y_i[n]`` (Singhal eq. 13; Wang 2), or the exact error where the site has one; by site index.
    Of a float16 guess in float32, since the product may leave float16's range.

    ``formed``: cotangents that estimators have formed themselves.
    """
    found: dict[int, Tensor] = {}
    for site in reversed(graph.sites):
        if formed is not None and site.index in formed:
            found[site.index] = formed[site.index]
        elif (y := record.guesses.get(site.index)) is not None:
            d = site.layout.spread(record.d, site.shape)
            narrow = y.dtype is torch.float16
            found[site.index] = y.float().mul_(d) if narrow else y.mul_(d.to(y.dtype))  # y has served
        elif site.shares is not None and site.shares in found:
            found[site.index] = found[site.shares]
        elif site.cut is not None:
            found[site.index] = record.errors[site.cut]
    return found


def parameter_gradients(
    graph: SiteGraph,
    record: ForwardRecord,
    cotangents: Mapping[int, Tensor],
    params: Mapping[int, Tensor],
    ids: Mapping[int, int],
) -> dict[int, Tensor]:
    """Each site's own transposed rule, then any expression of parameters back to the parameters themselves.

    Args:
        params: trainable parameters by position; ids: ``id`` to position.

    Returns:
        Gradients by position; parameters that nothing consumed are absent.
    """
    found: dict[int, Tensor] = {}
    expressions: list[Tensor] = []
    their_gradients: list[Tensor] = []

    def add(position: int, gradient: Tensor) -> None:
        if position in found:  # a sum in bfloat16 would lose what is a hundred times smaller
            low = gradient.dtype in (torch.float16, torch.bfloat16)
            gradient = found[position] + (gradient.float() if low else gradient)
        found[position] = gradient

    def keep(variable: Tensor, gradient: Tensor) -> None:
        if id(variable) in ids:
            add(ids[id(variable)], gradient)
        else:
            expressions.append(variable)
            their_gradients.append(gradient.to(variable.dtype))

    for visit in record.visits:
        if visit.directions is not None:
            for variable, v in zip(visit.variables, visit.directions, strict=True):
                keep(variable, sum_over_examples(record.d, v))  # grad = sum_n D_n v[n]
            continue
        for site in graph.sites_at[visit.call.index]:
            g = cotangents.get(site.index)
            if g is None:
                continue
            unit: Tensor | None = None
            if site.dtype is torch.float16 and g.dtype is torch.float32:
                unit = g.abs().amax().clamp_min(torch.finfo(g.dtype).tiny)
                g = (g / unit).half()  # the largest entry one: the rule's products stay within range
            autocast = torch.autocast(*visit.autocast) if visit.autocast else nullcontext()
            with replayed(visit.random), autocast:
                gradients = site.rule.gradients(visit.call.fn, visit.args, visit.kwargs, site.output, visit.wanted, g)
            for variable, gradient in zip(visit.variables, gradients, strict=True):
                if gradient is not None:
                    keep(variable, gradient if unit is None else gradient.float() * unit)
    if expressions:
        positions = [p for p in params if p not in record.params]
        through = torch.autograd.grad(
            expressions, [params[p] for p in positions], their_gradients, allow_unused=True, retain_graph=True
        )
        for position, gradient in zip(positions, through, strict=True):
            if gradient is not None:
                add(position, gradient)
    if record.params:
        total = record.d.sum()
        for position, v in record.params.items():
            add(position, total.to(v.dtype) * v)  # grad = D v (Baydin 2022; Singhal A.2)
    for position, gradient in record.exact.items():
        add(position, gradient)
    return found


def sum_over_examples(d: Tensor, v: Tensor) -> Tensor:
    """``sum_n D_n v[n]``; ``v`` ``[N, *]``, or ``[1, *]`` for the scalar derivative."""
    weights = d if v.shape[0] == d.shape[0] else d.sum().expand(v.shape[0])
    return torch.tensordot(weights.to(v.dtype), v, dims=1)
