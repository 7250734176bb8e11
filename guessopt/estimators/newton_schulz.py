"""W-perp by Newton-Schulz iterations (Wang 3.2, eqs. 9 and 10).

Letters: b block (convolution group), o output row, i input column, n example.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from guessopt.estimator import Estimator
from guessopt.estimators.checks import (
    check_choice,
    check_debias,
    check_dimension,
    check_noise,
    check_rank,
    check_refresh,
)
from guessopt.estimators.masked import Masked, linear_weight, mask_of
from guessopt.estimators.perp import OVERSAMPLING
from guessopt.estimators.transpose import Matrices, matrices, moment_through, pull_back_noise
from guessopt.linalg import masked_right_basis, refined_right_basis, right_singular_basis, wide
from guessopt.registry import register_estimator
from guessopt.sites import Site
from guessopt.tracing.context import SiteContext

#: Made by ``python -m benchmarks.newton_schulz``.
DATA = Path(__file__).with_name("newton_schulz.json")

#: Entries of the Gram matrices that are formed at once.
MAX_GRAM_ENTRIES = 2**24


def newton_schulz(W: Tensor, coefficients: Tensor, compositions: int) -> Tensor:
    """``p^N(W) = U p^N(S) V^T``: ``p`` composed N times maps every singular value (Wang eqs. 9 and 10).

    Args:
        W: ``[*, o, i]``, of unit spectral norm.
        coefficients: ``[*, 4]``: ``p(x) = a x + b x^3 + c x^5 + d x^7``.
        compositions: N.

    >>> newton_schulz(torch.eye(2)[None] / 2, torch.tensor([[1.0, 0.0, 0.0, 1.0]]), 1)[0].diagonal()
    tensor([0.5078, 0.5078])
    """
    if W.shape[-2] <= W.shape[-1]:
        return odd_polynomial(W @ W.mT, coefficients, compositions) @ W
    return W @ odd_polynomial(W.mT @ W, coefficients, compositions)


def odd_polynomial(gram: Tensor, coefficients: Tensor, compositions: int) -> Tensor:
    """``Q`` with ``p^N(W) = Q W`` for ``gram = W W^T``, or ``p^N(W) = W Q`` for ``gram = W^T W``; ``[*, r, r]``."""
    a, b, c, d = coefficients.to(gram.dtype)[..., None, None].unbind(-3)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    found: Tensor | None = None
    for left in reversed(range(compositions)):
        q = a * eye + b * gram + gram @ gram @ (c * eye + d * gram)
        found = q if found is None else found @ q
        if left:
            gram = gram @ (q @ q)
    assert found is not None
    return found


@lru_cache(maxsize=1)
def polynomials() -> tuple[int, Tensor]:
    """The number of compositions, and the coefficients ``[9, 4]`` for steps at 0.1 to 0.9."""
    data = json.loads(DATA.read_text())
    rows = [p["coefficients"] for p in sorted(data["polynomials"], key=lambda p: p["sigma_k"])]
    return int(data["compositions"]), torch.tensor(rows, dtype=torch.float64)


def coefficients_for(step: Tensor) -> Tensor:
    """The coefficients that were fitted to the closest step; ``[*]`` to ``[*, 4]``."""
    table = polynomials()[1].to(device=step.device, dtype=step.dtype)
    return table[(step * 10).round().nan_to_num(1).clamp(1, 9).long() - 1]


def largest_and_step(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of singular values ``[*, r]``: the largest (not 0), and the middle between the k-th and the next, over the
    largest. The next after the last is 0."""
    falling = values.sort(dim=-1, descending=True).values
    falling = torch.cat([falling, torch.zeros_like(falling[..., :1])], -1)
    k = min(k, values.shape[-1])
    largest = falling[..., 0].clamp_min(torch.finfo(values.dtype).tiny)
    return largest, (falling[..., k - 1] + falling[..., k]) / (2 * largest)


class ExamplePolynomial(NamedTuple):
    """``p^N(A)`` of every example's ``A = W M_n / sigma_1``: ``Q A`` if ``left``, else ``A Q``.

    ``A`` is ``[n, o, i]``; ``Q`` is square, of the smaller side of ``A``.
    """

    A: Tensor
    Q: Tensor
    left: bool

    @staticmethod
    def of(W: Tensor, M: Tensor, start: Tensor, k: int) -> ExamplePolynomial:
        """``W`` ``[o, i]``, ``M`` ``[n, i]``; ``start``: right singular vectors of ``W`` as rows."""
        dtype = torch.promote_types(W.dtype, torch.float32)
        basis = masked_right_basis(W, M, start, k + 1).to(dtype)
        W, M = W.to(dtype), M.to(dtype)
        largest, step = largest_and_step(((basis * M[:, None]) @ W.T).norm(dim=-1), k)
        A = (W * M[:, None]) / largest[:, None, None]
        left = W.shape[0] <= W.shape[1]
        Q = odd_polynomial(A @ A.mT if left else A.mT @ A, coefficients_for(step), polynomials()[0])
        return ExamplePolynomial(A, Q, left)

    def apply(self, v: Tensor) -> Tensor:
        """``p^N(A) v``: ``[n, i]`` to ``[n, o]``."""
        u = v.to(self.A.dtype)[..., None]
        return (self.Q @ (self.A @ u) if self.left else self.A @ (self.Q @ u))[..., 0]

    def transpose(self, e: Tensor) -> Tensor:
        """``p^N(A)^T e``: ``[n, o]`` to ``[n, i]``."""
        u = e.to(self.A.dtype)[..., None]
        return (self.A.mT @ (self.Q @ u) if self.left else self.Q @ (self.A.mT @ u))[..., 0]


@register_estimator("w_perp_ns")
@dataclass(frozen=True)
class WPerpNS(Masked, Estimator):
    """``y = p^N(W~)^T e``: N = 5 compositions of an odd polynomial of degree seven map the singular values of W~ above
    the k-th to about 1, and the others to about 0 (Wang 3.2, eqs. 9 and 10). Last site: ``N(0, I)``.

    W~ is first normalised to unit spectral norm. The polynomials are fitted to the step at ``sigma_k`` = 0.1, ..., 0.9
    and shipped (``newton_schulz.json``, made by ``python -m benchmarks.newton_schulz``). Departures from the paper:

    - The polynomial is taken whose step is closest to the middle between ``sigma_k`` and ``sigma_{k+1}``. The paper
      takes ``sigma_k`` itself, which loses the k-th direction as often as not.
    - The singular values come from an eigendecomposition at first, and from subspace iteration every ``refresh`` steps
      after that. The paper takes Lanczos.
    - The paper does not give N.

    Args:
        k: how many singular values to keep; clipped to the site's rank.
        basis: ``"shared"``: ``p^N(W_{i+1})``, cached, then pulled back: ``y = M p^N(W)^T e`` (a departure, for speed: a
            step costs as much as a step of ``WTranspose``). ``"example"``: the paper's ``p^N(W M_n)`` for each example,
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
        check_dimension(self.k)
        check_choice("basis", self.basis, "shared", "example")
        check_refresh(self.refresh)
        check_noise(self.noise)
        check_debias(self.debias, self.noise)

    @property
    def prepares(self) -> bool:
        return True

    def prepare(
        self, site: Site, weights: Matrices, previous: list[dict[str, Tensor]] | None = None
    ) -> list[dict[str, Tensor]]:
        """For each next matrix ``p``: ``p^N(W)``, ``[b, o, i]``, and ``rows``: the basis to start from next time."""
        olds = [None] * len(weights) if previous is None else [entry["rows"] for entry in previous]
        return [
            self._prepared(w, old, needs_p=not self.is_masked(site)) for (_, w), old in zip(weights, olds, strict=True)
        ]

    def _prepared(self, w: Tensor, old: Tensor | None, needs_p: bool) -> dict[str, Tensor]:
        rows = right_singular_basis(w, self.k + OVERSAMPLING) if old is None else refined_right_basis(w, old)
        if not needs_p:
            return {"rows": rows}
        work = wide(w)
        largest, step = largest_and_step((work @ rows.mT.to(work.dtype)).norm(dim=-2), self.k)
        p = newton_schulz(work / largest[:, None, None], coefficients_for(step), polynomials()[0])
        return {"rows": rows, "p": p.to(w.dtype)}

    def sample(self, state: Any, ctx: SiteContext) -> Any:
        if ctx.site.is_last or state is None:
            return ctx.noise(ctx.s.shape, self.noise)
        if not self.is_masked(ctx.site):
            return pull_back_noise(ctx, self._matrices(state, ctx), self.noise)
        W, M = linear_weight(ctx), _flat(mask_of(ctx))
        e = ctx.noise((len(M), len(W)), self.noise)
        return self._of_examples(W, M, state, e, lambda p, e: p.transpose(e)).reshape(ctx.s.shape)

    def second_moment(self, state: Any, ctx: SiteContext, g: Any) -> Any:
        if ctx.site.is_last or state is None:
            return g
        if not self.is_masked(ctx.site):
            return moment_through(ctx, self._matrices(state, ctx), g)
        W, M = linear_weight(ctx), _flat(mask_of(ctx))
        return self._of_examples(W, M, state, g.reshape(M.shape), lambda p, g: p.transpose(p.apply(g))).reshape(g.shape)

    def _of_examples(
        self, W: Tensor, M: Tensor, state: Any, v: Tensor, f: Callable[[ExamplePolynomial, Tensor], Tensor]
    ) -> Tensor:
        """``f(p, v)`` with each example's ``p``, ``[n, i]``; some examples at a time."""
        size, start = max(1, MAX_GRAM_ENTRIES // min(W.shape) ** 2), state[0]["rows"][0]
        parts = zip(M.split(size), v.split(size), strict=True)
        return torch.cat([f(ExamplePolynomial.of(W, m, start, self.k), t) for m, t in parts]).to(W.dtype)

    @staticmethod
    def _matrices(state: list[dict[str, Tensor]], ctx: SiteContext) -> Matrices:
        return matrices([entry["p"] for entry in state], ctx)

    # --- reporting ----------------------------------------------------------------------------------------------------

    def check(self, sites: tuple[Site, ...]) -> None:
        check_rank(self.k, type(self).k, sites)


def _flat(M: Tensor) -> Tensor:
    """``[n, i]``: every index before the last counts as an example."""
    return M.reshape(-1, M.shape[-1])
