"""W-perp by Newton-Schulz iterations (Wang 3.2, eqs. 9 and 10).

Letters: b block (convolution group), o output row, i input column, n example.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from guessopt.estimator import Estimator, check_debias, check_noise, check_refresh, register_estimator
from guessopt.estimators.perp import OVERSAMPLING, is_masked_linear
from guessopt.estimators.transpose import moment_through, pull_back_noise
from guessopt.linalg import masked_right_basis, newton_schulz, odd_polynomial, refined_right_basis, right_singular_basis
from guessopt.sites import Matrix, Site
from guessopt.tracing.context import SiteContext

#: Made by ``python -m benchmarks.newton_schulz``.
DATA = Path(__file__).with_name("newton_schulz.json")


@lru_cache(maxsize=1)
def polynomials() -> tuple[int, Tensor]:
    """The number of compositions, and the coefficients ``[9, 4]`` for steps at 0.1 to 0.9."""
    data = json.loads(DATA.read_text())
    rows = [p["coefficients"] for p in sorted(data["polynomials"], key=lambda p: p["sigma_k"])]
    return int(data["compositions"]), torch.tensor(rows, dtype=torch.float64)


def chosen(step: Tensor) -> Tensor:
    """The coefficients fitted to the closest step; ``[*]`` to ``[*, 4]``."""
    table = polynomials()[1].to(device=step.device, dtype=step.dtype)
    return table[(step * 10).round().nan_to_num(1).clamp(1, 9).long() - 1]


@register_estimator("w_perp_ns")
@dataclass(frozen=True)
class WPerpNS(Estimator):
    """``y = p^N(W~)^T e``: singular values of W~ above the k-th mapped to about 1, the rest to about 0, by N = 5
    compositions of an odd polynomial of degree seven (Wang 3.2, eqs. 9 and 10). Last site: ``N(0, I)``.

    W~ is first normalised to unit spectral norm. The polynomials are fitted to the step at ``sigma_k`` = 0.1, ..., 0.9
    and shipped (``newton_schulz.json``, made by ``python -m benchmarks.newton_schulz``). The one whose step is closest
    to the middle between ``sigma_k`` and ``sigma_{k+1}`` is taken (the paper: to ``sigma_k`` itself, which loses the
    k-th direction as often as not). The singular values come from subspace iteration (the paper: Lanczos), every
    ``refresh`` steps. N is not in the paper.

    Args:
        k: how many singular values to keep; clipped to the site's rank.
        basis: ``"shared"``: ``p^N(W_{i+1})``, cached, then pulled back: ``y = M p^N(W)^T e`` (a departure, for speed: a
            step costs what one of ``WTranspose`` does). ``"example"``: the paper's ``p^N(W M_n)`` for each example,
            from the weights as they are now; slower than ``WPerp(basis="example")``.
        refresh: steps between iterations.
        noise: kind of ``e``'s entries.
        debias: see ``Estimator.correct``.

    >>> w = torch.diag(torch.tensor([4.0, 3.0, 1.0, 0.5]))
    >>> p = WPerpNS(k=2).prepare(None, [(None, w[None])])[0]["p"][0]
    >>> (p.diagonal() - torch.tensor([1, 1, 0, 0])).abs().max() < 0.1
    tensor(True)
    """

    joins: ClassVar[bool] = True
    k: int = 10
    basis: str = "shared"
    refresh: int = 50
    noise: str = "normal"
    debias: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k: the guess needs at least one dimension, got {self.k}")
        if self.basis not in ("shared", "example"):
            raise ValueError(f"basis: {self.basis!r} is not one of shared, example")
        check_refresh(self.refresh)
        check_noise(self.noise)
        check_debias(self.debias, self.noise)

    @property
    def prepares(self) -> bool:
        return True

    def prepare(
        self, site: Site, weights: list[tuple[Matrix, Tensor]], previous: list[dict[str, Tensor]] | None = None
    ) -> list[dict[str, Tensor]]:
        """``p``: ``p^N(W)`` of each next matrix, ``[b, o, i]``; ``rows``: the basis to start from next time."""
        found = []
        for number, (_, w) in enumerate(weights):
            rows = (
                right_singular_basis(w, self.k + OVERSAMPLING)
                if previous is None
                else refined_right_basis(w, previous[number]["rows"])
            )
            entry = {"rows": rows}
            if self.basis == "shared" or not is_masked_linear(site):
                work = w if w.dtype is torch.float64 else w.float()
                largest, step = _sigmas((work @ rows.mT.to(work.dtype)).norm(dim=-2), self.k)
                p = newton_schulz(work / largest[:, None, None], chosen(step), polynomials()[0])
                entry["p"] = p.to(w.dtype)
            found.append(entry)
        return found

    def sample(self, state: Any, ctx: SiteContext) -> Tensor:
        if ctx.site.is_last or state is None:
            return ctx.noise(ctx.s.shape, self.noise)
        if self._is_of_examples(ctx.site):
            (_, w), m = ctx.weights()[0], self._mask(ctx)
            e = ctx.noise((m.shape[0], w.shape[1]), self.noise)
            return self._of_examples(w[0], m, state[0]["rows"][0], e, None).reshape(ctx.s.shape)
        return pull_back_noise(ctx, self._rows(state, ctx), self.noise)

    def second_moment(self, state: Any, ctx: SiteContext, g: Tensor) -> Tensor | None:
        if ctx.site.is_last or state is None:
            return g
        if self._is_of_examples(ctx.site):
            (_, w), m = ctx.weights()[0], self._mask(ctx)
            return self._of_examples(w[0], m, state[0]["rows"][0], None, g.reshape(m.shape)).reshape(g.shape)
        return moment_through(ctx, self._rows(state, ctx), g)

    def note(self, site: Site) -> str | None:
        if self.basis == "example" and site.segment is not None and not is_masked_linear(site):
            return "shared basis: basis='example' needs an elementwise path to a linear layer"
        return None

    def check(self, sites: tuple[Site, ...]) -> None:
        ranks = [site.rank for site in sites if not site.is_last]
        if ranks and self.k > max(ranks) and self.k != type(self).k:
            raise ValueError(
                f"k: {self.k} exceeds the rank of every site (the largest is {max(ranks)}); choose k <= {max(ranks)}"
            )

    def _is_of_examples(self, site: Site) -> bool:
        return self.basis == "example" and is_masked_linear(site)

    @staticmethod
    def _rows(state: list[dict[str, Tensor]], ctx: SiteContext) -> list[tuple[Matrix, Tensor]]:
        assert ctx.site.segment is not None
        return [(m, entry["p"]) for m, entry in zip(ctx.site.segment.matrices, state, strict=True)]

    @staticmethod
    def _mask(ctx: SiteContext) -> Tensor:
        m = ctx.derivative()
        mask = ctx.s.new_ones(ctx.s.shape) if m is None else m.to(ctx.s.dtype)
        return mask.reshape(-1, mask.shape[-1])

    def _of_examples(self, w: Tensor, m: Tensor, rows: Tensor, e: Tensor | None, g: Tensor | None) -> Tensor:
        """``p^N(W M_n)^T e``, or ``p^N(W M_n)^T p^N(W M_n) g``: ``[n, i]``, some examples at a time."""
        side = min(w.shape)
        size = max(1, 2**24 // (side * side))
        parts = [
            self._part(w, m[a : a + size], rows, *(None if t is None else t[a : a + size] for t in (e, g)))
            for a in range(0, len(m), size)
        ]
        return torch.cat(parts).to(w.dtype)

    def _part(self, w: Tensor, m: Tensor, rows: Tensor, e: Tensor | None, g: Tensor | None) -> Tensor:
        # p^N(A) = A Q with Q a polynomial of A^T A, or Q A with Q one of A A^T; Q on the smaller side.
        wide = torch.promote_types(w.dtype, torch.float32)
        basis = masked_right_basis(w, m, rows, self.k + 1).to(wide)
        w, m = w.to(wide), m.to(wide)
        largest, step = _sigmas(((basis * m[:, None]) @ w.T).norm(dim=-1), self.k)
        a = (w * m[:, None]) / largest[:, None, None]  # n o i
        left = w.shape[0] <= w.shape[1]
        q = odd_polynomial(a @ a.mT if left else a.mT @ a, chosen(step), polynomials()[0])
        if e is None:
            assert g is not None
            u = g.to(wide)[..., None]
            v = q @ (a @ u) if left else a @ (q @ u)
        else:
            v = e.to(wide)[..., None]
        return (a.mT @ (q @ v) if left else q @ (a.mT @ v))[..., 0]


def _sigmas(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of singular values ``[*, r]``, the largest (not 0), and the step relative to it: half-way
    between the k-th and the next (0 after the last)."""
    falling = values.sort(dim=-1, descending=True).values
    falling = torch.cat([falling, torch.zeros_like(falling[..., :1])], -1)
    k = min(k, values.shape[-1])
    largest = falling[..., 0].clamp_min(torch.finfo(values.dtype).tiny)
    return largest, (falling[..., k - 1] + falling[..., k]) / (2 * largest)
