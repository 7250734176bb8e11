"""A site as its estimator sees it: the site's output, noise, and the way to the next matrix site(s).

Letters: s the site's output, x the next matrix site's input, u a cotangent of x, y a guess (a cotangent of s).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from guessopt.layout import Layout, Shape
from guessopt.ops.cached import CachedCall
from guessopt.ops.elementwise import derivative, is_dropout, lasting_derivative, pull_back
from guessopt.ops.reverse import push
from guessopt.rng import NoiseSource
from guessopt.sites import DownstreamPath, Matrix, ParallelSites, Site
from guessopt.tracing.functions import autocast_of, dense
from guessopt.tracing.subgraph import Random, evaluate, filled, unary, walked


class SiteContext:
    """A site in the middle of a run, as ``Estimator.sample`` sees it.

    Args:
        site: the site.
        s: its output, without tangent, ``[N, *, d_out]`` or as ``site.layout`` says.
        values: tensors of the run by value, at least those that the segment reads.
        source: of noise.
        several: whether more than one guess will be made here, so that their common work is kept.
        cached: takes the results of calls that a pull-back makes before the closure does, by call; None: nobody can
            use them.
        random: by call, the random states before the segment's calls that draw (None: not known yet). With them the
            segment draws the numbers of the forward run. Without them, dropout is replaced by its mean, and other calls
            draw new numbers.
    """

    def __init__(
        self,
        site: Site,
        s: Tensor,
        values: dict[int, Tensor],
        source: NoiseSource,
        *,
        several: bool = False,
        cached: dict[int, CachedCall] | None = None,
        random: Random | None = None,
    ) -> None:
        self.site, self.s, self.values, self._source = site, s, values, source
        self._cached = cached
        self._random: Random = random or {}
        self._derivative: tuple[Tensor | None] | None = None
        self._several = several
        self._runs: dict[tuple[int, ...], tuple[Tensor, Any]] = {}

    def noise(self, shape: Shape, kind: str = "normal") -> Tensor:
        """Independent entries, in the dtype and on the device of ``s``.

        Args:
            kind: ``"normal"``, ``"rademacher"``, ``"uniform_centred"`` (mean 0, variance 1) or ``"uniform"`` (U[0, 1);
                Singhal A.2).
        """
        return draw(self._source, kind, shape, self.s.dtype, self.s.device)

    def held(self, *, several: bool = False) -> SiteContext:
        """A copy that may outlast the site's place in the run: of the values, it keeps only those that the segment
        reads. ``several``: whether it will pull back several times."""
        segment, values = self.site.segment, self.values
        needed = {} if segment is None else {v: values[v] for v in segment.needs if v in values}
        return SiteContext(self.site, self.s, needed, self._source, several=several, random=self._random)

    def replaying(self, random: Random) -> SiteContext:
        """A copy whose segment draws the numbers of the forward run, from the states in ``random``."""
        return SiteContext(self.site, self.s, self.values, self._source, several=self._several, random=random)

    @property
    def awaits_draws(self) -> bool:
        """Whether the segment draws in a call that the closure has not made yet."""
        return any(self._random[c] is None for c in self._draws)

    @property
    def _has_drawn(self) -> bool:
        """Whether the random states before the segment's draws are known."""
        return bool(self._random) and any(self._random[c] is not None for c in self._draws)

    @cached_property
    def _draws(self) -> tuple[int, ...]:
        """The segment's calls that draw, if ``random`` lists them."""
        random, segment = self._random, self.site.segment
        return tuple(c.index for c in walked(segment) if c.index in random) if random and segment is not None else ()

    def weights(self) -> list[tuple[Matrix, Tensor]]:
        """The next matrix site(s), each with its weight (parallel ones stacked) as ``[b, o, i]``."""
        assert self.site.segment is not None
        values = self.values
        if self.site.segment.weight_program:
            values = evaluate(self.site.segment.weight_program, values, random=self._random)
        return [
            (m, m.rule.matrix(m, dense(values[m.weights[0]])) if len(m.weights) == 1 else self._stack(m, values))
            for m in self.site.segment.matrices
        ]

    @staticmethod
    def _stack(m: Matrix, values: dict[int, Tensor]) -> Tensor:
        return torch.cat([m.rule.matrix(m, dense(values[w])) for w in m.weights], dim=1)

    @property
    def is_elementwise(self) -> bool:
        """Whether nothing but elementwise operations lies between the site and the next matrix site."""
        return self.site.segment is not None and self.site.segment.elementwise is not None

    def derivative(self) -> Tensor | None:
        """``M = phi'(s)`` of an elementwise path, shape of ``s``; None for the identity."""
        if self._derivative is None and self._has_drawn:
            self._derivative = (self._pulled((), self._segment(), torch.ones_like(self.s)),)
        elif self._derivative is None:
            self._derivative = (derivative(self._path(), self.s),)
        return self._derivative[0]

    def _path(self) -> tuple[tuple[Callable[..., Any], Callable[[Tensor], Tensor]], ...]:
        assert self.site.segment is not None and self.site.segment.elementwise is not None
        return tuple((call.fn, unary(call)) for call in self.site.segment.elementwise)

    def _masked(self, u: Tensor) -> Tensor:
        m = self.derivative()
        return u if m is None else u * m

    def pull_back(self, u: Tensor, *, spent: bool = False) -> Tensor:
        """``J^T u``: from the next matrix site's input back to ``s``, through the segment alone.

        Args:
            u: shape of the next input.
            spent: whether the result may take ``u``'s memory.

        Returns:
            Shape of ``s``.
        """
        segment = self.site.segment
        if segment is not None and segment.fused is not None and not self._has_drawn:
            assert segment.elementwise is not None
            lasting = None if self._cached is None else lasting_derivative(segment.elementwise, self.s)
            if lasting is None:
                return segment.fused(u, self.s, spent)
            call, m = lasting
            assert self._cached is not None
            args = filled(call.args, {segment.source: self.s})
            self._cached[call.index] = CachedCall.of(args, call.kwargs, None, m)
            return u.mul_(m) if spent else u * m
        if self.is_elementwise:
            once = self._derivative is None and not self._several and not self._has_drawn
            return pull_back(self._path(), self.s, u) if once else self._masked(u)
        if self._cached is not None:
            self._cached.clear()
        return self._pulled((), self._segment(), u)

    def _pulled(self, goals: tuple[int, ...], run: Callable[[Tensor], Any], u: Any) -> Tensor:
        """``J^T u``. For several guesses the way is run once, and its graph kept."""
        with torch.enable_grad():
            found = self._runs.get(goals)
            if found is None:
                s = self.s.detach().requires_grad_()
                found = s, run(s)
                if self._several:
                    self._runs[goals] = found
            return torch.autograd.grad(found[1], found[0], u, retain_graph=self._several)[0]

    def push_forward(self, v: Tensor) -> Tensor:
        """``J v``: from ``s`` to the next matrix site's input."""
        if self.is_elementwise:
            return self._masked(v)
        return push(lambda s: (self._segment()(s),), [self.s], [v])[0]

    def next_input(self) -> Tensor:
        """``x_{i+1}``: the next matrix site's input, computed from ``s``."""
        if not self.is_elementwise:
            return self._segment()(self.s)
        x = self.s
        for fn, run in self._path():
            x = x if is_dropout(fn) else run(x)
        return x

    def onward(self, matrices: int) -> DownstreamPath | None:
        """The way through this many matrix sites, or through all if there are fewer; None if the way cannot be run by
        itself."""
        ways = self.site.segment.onward if self.site.segment is not None else ()
        return ways[min(matrices, len(ways)) - 1] if ways else None

    def pull_back_from(self, way: DownstreamPath, us: list[Tensor]) -> Tensor:
        """``J^T u``: from the way's goals back to ``s``."""
        return self._pulled(way.goals, self._onward(way), us)

    def push_forward_to(self, way: DownstreamPath, v: Tensor) -> list[Tensor]:
        """``J v``: from ``s`` to the way's goals."""
        return push(self._onward(way), [self.s], [v])

    def _onward(self, way: DownstreamPath) -> Callable[[Tensor], tuple[Tensor, ...]]:
        segment = self.site.segment
        assert segment is not None

        def run(s: Tensor) -> tuple[Tensor, ...]:
            values = evaluate(way.program, {**self.values, segment.source: s}, random=self._random)
            return tuple(values[goal] for goal in way.goals)

        return run

    @property
    def examples(self) -> int:
        """How many examples ``s`` holds; 1 where they are coupled."""
        layout = self.site.layout
        if layout is Layout.BATCH_FIRST:
            return self.s.shape[0]
        if layout is Layout.BATCH_SECOND:
            return self.s.shape[1]
        return self.site.direction_shapes[0][0] if self.site.direction_shapes else 1

    def _segment(self) -> Callable[[Tensor], Tensor]:
        segment = self.site.segment
        assert segment is not None
        x, calls = segment.matrices[0].x, segment.elementwise or segment.program

        def run(s: Tensor) -> Tensor:
            return evaluate(calls, {**self.values, segment.source: s}, cached=self._cached, random=self._random)[x]

        return run


class ParallelContext(SiteContext):
    """Parallel sites as one layer. Outputs, cotangents and tangents are tuples here, in the order of ``joint.sites``.

    Args:
        joint: the sites.
        site, s: the first one and its output. The other outputs are computed here.
        values, source, several, cached: as for ``SiteContext``.
    """

    def __init__(
        self,
        joint: ParallelSites,
        site: Site,
        s: Tensor,
        values: dict[int, Tensor],
        source: NoiseSource,
        *,
        several: bool = False,
        cached: dict[int, CachedCall] | None = None,
    ) -> None:
        super().__init__(site, s, values, source, several=several, cached=cached)
        if cached is not None:
            cached.clear()
        self.values = evaluate(joint.others, {**values, site.value: s}, cached=cached)
        self.joint = joint
        self._run: tuple[tuple[Tensor, ...], Tensor] | None = None
        self.outputs = tuple(self.values[v] for v in joint.values)

    def pull_back(self, u: Tensor, *, spent: bool = False) -> Any:
        """``J^T u``: a tensor for each site."""
        with torch.enable_grad():
            if self._run is None or not self._several:
                ss = tuple(s.detach().requires_grad_() for s in self.outputs)
                self._run = ss, self._meet(*ss, cached=self._cached)[0]
            return torch.autograd.grad(self._run[1], self._run[0], u, retain_graph=self._several)

    def push_forward(self, v: Any) -> Tensor:
        """``J v``: a tensor for each site, to the next matrix site's input."""
        return push(self._meet, self.outputs, v)[0]

    def _meet(self, *ss: Tensor, cached: dict[int, CachedCall] | None = None) -> tuple[Tensor]:
        segment = self.site.segment
        assert segment is not None
        values = {**self.values, **dict(zip(self.joint.values, ss, strict=True))}
        return (evaluate(self.joint.program, values, cached=cached)[segment.matrices[0].x],)


def alike(t: Tensor, w: Tensor) -> Tensor:
    """``t`` in the dtype of ``w``, for a product of the two; unchanged where autocast converts both."""
    if t.dtype is w.dtype or (w.dtype is not torch.float64 and autocast_of(t)):
        return t
    return t.to(w.dtype)


def draw(source: NoiseSource, kind: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Noise of a kind (see ``SiteContext.noise``); its mean if ``source.means``.

    In a complex dtype the real and the imaginary part are independent noise. Then ``E[Re(conj(g) y) y] = g`` for
    torch's gradient ``g``, as for real numbers.
    """
    if dtype.is_complex:
        return torch.view_as_complex(draw(source, kind, (*shape, 2), dtype.to_real(), device))
    if source.means:
        return torch.full(shape, NOISES[kind][0], dtype=dtype, device=device)
    if kind == "normal":
        return source.normal(shape, dtype, device)
    u = source.uniform(shape, dtype, device)
    if kind == "rademacher":
        return (u < 0.5).to(dtype).mul_(2).sub_(1)
    if kind == "uniform_centred":
        return u.sub_(0.5).mul_(12**0.5)
    return u


#: Kinds of noise: the mean and the variance of an entry.
NOISES = {"normal": (0.0, 1.0), "rademacher": (0.0, 1.0), "uniform": (0.5, 1 / 12), "uniform_centred": (0.0, 1.0)}


def centred(kind: str) -> str:
    """The kind of noise with mean 0 and variance 1 that takes this kind's place."""
    return "uniform_centred" if kind == "uniform" else kind
