"""Downstream: a random cotangent further on, pulled back by partial backpropagation (Singhal 3.2, eq. 7; A.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from guessopt.estimator import Estimator
from guessopt.estimators.checks import check_debias, check_noise
from guessopt.graph import SiteGraph
from guessopt.registry import register_estimator
from guessopt.sites import MAX_DOWNSTREAM_SITES, Site
from guessopt.tracing.context import SiteContext


@register_estimator("downstream")
@dataclass(frozen=True)
class Downstream(Estimator):
    """``y = J^T e``: noise ``e`` after the activation of the matrix site ``l`` further on, pulled back through that
    part of the network alone (Singhal eq. 7; A.2). In a ReLU MLP, l = 1: ``y = M_i W_{i+1}^T M_{i+1} e``.

    "After the activation" is the input of the matrix site that follows. In the network's last layers none follows: the
    noise is then at the last matrix site's output, and ``y = M_i W_{i+1}^T e``. Last site: ``N(0, I)``. The guess
    passes every operation in between, also attention, norms and residual branches; they are evaluated once more.

    Departure from the paper: the index of eq. 7 puts the guess at ``x_{i+l}``, which for l = 1 gives ``M_i e``. A.2
    ("until the next layer") and the paper's results show that the next layer's weights are meant.

    Biased: ``E[y y^T] = J^T J``.

    Args:
        l: matrix sites to pass, 1 to 4; the paper found no gain beyond 1 (Figure 7).
        noise: kind of ``e``'s entries.
        debias: see ``Estimator.correct``.

    >>> Downstream(l=9)
    Traceback (most recent call last):
    ...
    ValueError: l: the number of matrix sites to pass must be 1 to 4, got 9
    """

    l: int = 1  # noqa: E741 (the paper's letter)
    noise: str = "normal"
    debias: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.l, int) or not 1 <= self.l <= MAX_DOWNSTREAM_SITES:
            raise ValueError(f"l: the number of matrix sites to pass must be 1 to {MAX_DOWNSTREAM_SITES}, got {self.l}")
        check_noise(self.noise)
        check_debias(self.debias, self.noise)

    def sample(self, state: Any, ctx: SiteContext) -> Tensor:
        path = ctx.onward(self.l)
        if path is None:
            return ctx.noise(ctx.s.shape, self.noise)
        return ctx.pull_back_from(path, [ctx.noise(shape, self.noise) for shape in path.shapes])  # J^T e

    def second_moment(self, state: Any, ctx: SiteContext, g: Tensor) -> Tensor | None:
        path = ctx.onward(self.l)
        return g if path is None else ctx.pull_back_from(path, ctx.push_forward_to(path, g))  # J^T J g

    def reversed_matrices(self, graph: SiteGraph) -> int:
        return self.l

    def note(self, site: Site) -> str | None:
        if site.segment is not None and not site.segment.onward:
            return "isotropic noise: the next layers write into memory that other tensors share"
        return None


@register_estimator("self_sharpening")
@dataclass(frozen=True)
class SelfSharpening(Downstream):
    """``Downstream`` with uniform noise, U[0, 1), whose mean is not zero, and the exact error at the last site: the
    method that Singhal 4.1 and A.2 call self-sharpening, used there with StableAdamW.

    The exact error can be refused with the optimizer's ``exact_last=False``. Since the guesses have means ``mu_i``,
    each site's estimate depends on all sites' cotangents: ``E g^_i = J_i^T J_i g_i / 12 + mu_i sum_j <mu_j, g_j>``.

    >>> SelfSharpening().noise, SelfSharpening.exact_last
    ('uniform', True)
    """

    noise: str = "uniform"
    exact_last: ClassVar[bool] = True
