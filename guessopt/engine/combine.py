"""K guesses, one estimate: a weighted sum of the K estimates, the mean or a projection.

Letters: K guesses, n example, N batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from guessopt.credit import Credit, rate
from guessopt.graph import SiteGraph
from guessopt.layout import Layout
from guessopt.record import ForwardRecord, SavedCall
from guessopt.sites import Site


def stack(records: Sequence[ForwardRecord]) -> ForwardRecord:
    """The records of K runs with one guess each as the record of one run with K guesses."""
    first = records[0]

    def together(parts: list[Mapping[int, Tensor]]) -> dict[int, Tensor]:
        return {key: torch.stack([part[key] for part in parts]) for key in parts[0]}

    saved_calls = [
        saved_calls[0]
        if saved_calls[0].directions is None
        else replace(
            saved_calls[0],
            directions=[torch.stack(vs) for vs in zip(*(_directions(v) for v in saved_calls), strict=True)],
        )
        for saved_calls in zip(*(record.saved_calls for record in records), strict=True)
    ]
    return replace(
        first,
        d=torch.stack([record.d for record in records]),
        credit=Credit.stack([record.credit for record in records]),
        guesses=together([record.guesses for record in records]),
        params=together([record.params for record in records]),
        saved_calls=saved_calls,
    )


def _directions(saved: SavedCall) -> list[Tensor]:
    assert saved.directions is not None
    return saved.directions


@dataclass(frozen=True)
class Weights:
    """The factor of each guess in the estimate.

    Attributes:
        examples: ``[K, N]``, by example.
        batch: ``[K]``, for guesses whose examples cannot be told apart.
        credit: ``[K, N, T]``, by example and position, for the sites with positions; None: there are none.
    """

    examples: Tensor
    batch: Tensor
    credit: Credit | None = None

    def sum(self, site: Site, y: Tensor) -> Tensor:
        """``sum_k w_k y_k`` of a site's guesses ``[K, *shape]``: the estimate ``[*shape]``, written over the first
        guess."""
        ws = [self._of(site, k) for k in range(y.shape[0])]
        found = y[0].mul_(ws[0].to(y.dtype))
        for part, w in zip(y[1:], ws[1:], strict=True):
            found.addcmul_(part, w.to(y.dtype))
        return found

    def _of(self, site: Site, k: int) -> Tensor:
        """The factor of guess k, shaped to broadcast against the site's output."""
        if self.credit is not None and site.position_dim is not None:
            return rate(site, self.examples[k], self.credit.map(lambda d: d[k]))
        return self.batch[k] if site.layout is Layout.COUPLED else site.layout.spread(self.examples[k], site.shape)


def mean_weights(record: ForwardRecord) -> Weights:
    """``D / K``: the mean of the K estimates."""
    count = len(record.d)
    d, credit = record.d / count, record.credit and record.credit.map(lambda each: each / count)
    return Weights(d, d.sum(1), credit)


def projection_weights(record: ForwardRecord, graph: SiteGraph) -> Weights:
    """``c (Y^T Y)^{-1} D`` with ``c = mean_k |y_k|^2 / K``.

    The estimate is ``c`` times the cotangent's projection on the span of the K guesses. ``Y`` joins the guesses of all
    sites, example by example. The guesses of coupled sites and of parameters are joined over the whole batch. With
    isotropic normal guesses the estimate is unbiased: a random subspace's direction is independent of the guesses'
    lengths."""
    d, count = record.d, record.d.shape[0]
    n = d.shape[1]
    wide = torch.float64 if d.dtype is torch.float64 else torch.float32
    gram, shared = d.new_zeros(n, count, count, dtype=wide), d.new_zeros(count, count, dtype=wide)

    def add(rows: Tensor) -> None:
        """``rows``: ``[n, K, *]``, or ``[1, K, *]`` of the whole batch."""
        rows = rows.to(wide)
        inner = rows @ rows.mT
        if rows.shape[0] == n:
            gram.add_(inner.to(gram.device))
        else:
            shared.add_(inner[0].to(gram.device))

    for index, y in record.guesses.items():
        y = _real(y)
        add(_by_example(graph.sites[index].layout, y, n))
    for saved in record.saved_calls:
        for v in saved.directions or ():
            add(_real(v).reshape(*v.shape[:2], -1).transpose(0, 1))
    for v in record.params.values():
        add(_real(v).reshape(1, count, -1))
    batch = _projected(shared + gram.sum(0), d.sum(1).to(wide))
    return Weights(batch[:, None] if n == 1 else _projected(gram, d.T.to(wide)).T, batch)


def _real(y: Tensor) -> Tensor:
    """A complex tensor as a real one; the two parts are the last dimension."""
    return torch.view_as_real(y) if y.is_complex() else y


def _projected(gram: Tensor, d: Tensor) -> Tensor:
    """``c G^{-1} d``; ``gram`` ``[*, K, K]``, ``d`` ``[*, K]``. A ridge far below any real eigenvalue makes it the
    pseudo-inverse where guesses depend on each other or vanish."""
    count = gram.shape[-1]
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = 10 * torch.finfo(gram.dtype).eps * mean + torch.finfo(gram.dtype).tiny
    eye = torch.eye(count, dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky_ex(gram + ridge[..., None, None] * eye)[0]
    return torch.cholesky_solve(d[..., None], factor)[..., 0] * (mean / count)[..., None]


def _by_example(layout: Layout, y: Tensor, n: int) -> Tensor:
    """``[K, *shape]`` to ``[N, K, *]``; ``[1, K, *]`` where coupled."""
    rows = (layout if n > 1 else Layout.COUPLED).rows(y, n, lead=1)
    return rows.reshape(len(rows), len(y), -1)


def combined(record: ForwardRecord, graph: SiteGraph, weights: Weights) -> tuple[ForwardRecord, dict[int, Tensor]]:
    """The weighted sum of the K estimates.

    Returns:
        The record with ``D = 1`` and weighted guesses in place of K of them, and the cotangents by site index.
    """
    ones = record.d.new_ones(1)
    cotangents = {index: weights.sum(graph.sites[index], y) for index, y in record.guesses.items()}
    saved_calls = [
        saved
        if saved.directions is None
        else replace(saved, directions=[_contracted(v, weights) for v in saved.directions])
        for saved in record.saved_calls
    ]
    params = {p: torch.tensordot(weights.batch.to(v.dtype), v, 1) for p, v in record.params.items()}
    return replace(record, d=ones, guesses={}, saved_calls=saved_calls, params=params), cotangents


def _contracted(v: Tensor, weights: Weights) -> Tensor:
    """``sum_k sum_n w_k[n] v_k[n]``, as one direction ``[1, *shape]``; ``v`` ``[K, N, *shape]``, N maybe 1."""
    w = weights.examples if v.shape[1] == weights.examples.shape[1] else weights.batch[:, None].expand(v.shape[:2])
    result: Tensor = torch.tensordot(w.to(v.dtype), v, 2)[None]
    return result
