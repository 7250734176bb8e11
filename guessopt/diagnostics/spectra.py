"""Subspaces and spectra: where the gradient lies, and how narrow the guesses' space is (Wang Figure 1; Singhal Figures
2, 5, 7).

Letters: n example, d entries of one example's output at a site, g the true cotangent, W~ the Jacobian of the next
matrix site's output with respect to the site's output, r its smaller side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from guessopt.diagnostics.plots import bars, curve
from guessopt.diagnostics.reverse import Closure, Truth, double, unfused
from guessopt.layout import Layout
from guessopt.ops.matrix import MatrixRule
from guessopt.optimizer import GuessGradOptimizer
from guessopt.record import SavedCall
from guessopt.sites import Site
from guessopt.tracing.context import SiteContext

#: Sites with more entries an example than this are left out: a Jacobian is built column by column.
LARGEST = 4096


@dataclass(frozen=True)
class Overlap:
    """By site, the overlap of the true cotangent with the top-k right singular subspace of W~, for k = 1 ... r; the
    mean over examples."""

    per_site: dict[str, tuple[float, ...]]

    def plot(self, ax: Any = None) -> Any:
        """Wang Figure 1: a curve over k per site; returns the axes. Needs matplotlib."""
        return curve(None, self.per_site, ax, "k", "overlap with the true gradient")


@dataclass(frozen=True)
class EffectiveRank:
    """Effective ranks of parameters with at least two dimensions, as matrices: rows are the first dimension."""

    per_parameter: dict[str, float]

    def plot(self, ax: Any = None) -> Any:
        """A bar per parameter; returns the axes. Needs matplotlib."""
        return bars(self.per_parameter, ax, "effective rank")


@dataclass(frozen=True)
class JacobianSpectra:
    """By site: singular values of the Jacobians through the next 1, 2, ... matrix sites, largest first, mean over
    examples."""

    per_site: dict[str, tuple[tuple[float, ...], ...]]

    def plot(self, ax: Any = None, site: str | None = None) -> Any:
        """Singhal Figure 7, right: one site's spectra (default: the first), each over its largest value; returns the
        axes. Needs matplotlib."""
        spectra = self.per_site[site if site is not None else next(iter(self.per_site))]
        lines = {f"{n} layer{'s' * (n > 1)}": [v / s[0] for v in s] for n, s in enumerate(spectra, 1)}
        ax = curve(None, lines, ax, "index", "singular value over the largest")
        ax.set_yscale("log")
        return ax


@dataclass(frozen=True)
class ActivationOverlap:
    """By matrix site, cosine between the true gradient of its input and that gradient's projection: on the first
    ``k[j]`` principal components of the input over the batch, and on a random subspace of the same dimension."""

    k: dict[str, tuple[int, ...]]
    principal: dict[str, tuple[float, ...]]
    random: dict[str, tuple[float, ...]]

    def plot(self, ax: Any = None, site: str | None = None) -> Any:
        """Singhal Figure 2, right (one site, default: the last); returns the axes. Needs matplotlib."""
        site = site if site is not None else list(self.k)[-1]
        lines = {"principal components": self.principal[site], "random subspace": self.random[site]}
        return curve(self.k[site], lines, ax, "dimension", "cosine", {"random subspace": "--"})


def overlap(opt: GuessGradOptimizer, closure: Closure, examples: int | None = 64) -> Overlap:
    """``||V_k V_k^T g|| / ||g||`` over k (Wang eq. 19, which prints ``U_k`` where ``V_k`` is meant: the columns of V
    span the image of ``W~^T``), mean over the first ``examples`` examples with a gradient. Last sites have no W~ and
    are absent, as are sites of more than 4096 entries.

    >>> import torch, guessopt
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Identity(), torch.nn.Linear(8, 2))
    >>> opt = guessopt.GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, lr=0.1)
    >>> found = overlap(opt, lambda: net(torch.randn(6, 3)).square().mean()).per_site["0.weight"]
    >>> len(found), round(found[-1], 4)  # the gradient lies in the image of W^T
    (2, 1.0)
    """
    truth = Truth(opt, closure)
    found = {}
    for name, site, ctx in truth.sites():
        jacobian = next_jacobian(site, ctx, examples)
        if jacobian is None:
            continue
        v = torch.linalg.svd(jacobian, full_matrices=False)[2]  # n r d
        g = truth.rows(site, truth.g[site.index])[: len(v)].double()
        norm = g.norm(dim=1, keepdim=True)
        parts = (v @ g[..., None])[..., 0].square().cumsum(1).sqrt()  # n r d, n d -> n r
        there = norm[:, 0] > 0
        if bool(there.any()):
            found[name] = _floats((parts[there] / norm[there]).mean(0))
    return Overlap(found)


def next_jacobian(site: Site, ctx: SiteContext, examples: int | None = None) -> Tensor | None:
    """W~ of the first ``examples`` examples, ``[n, out, d]`` in float64; None for a last or a too large site."""
    if site.segment is None or ctx.s.numel() // ctx.examples > LARGEST:
        return None
    weights = ctx.weights()

    def apply(v: Tensor) -> list[Tensor]:
        x = ctx.push_forward(v)
        return [m.rule.apply(m, w, x) for m, w in weights]

    return _columns(apply, site, ctx, examples)


def _columns(apply: Callable[[Tensor], Sequence[Tensor]], site: Site, ctx: SiteContext, examples: int | None) -> Tensor:
    """The matrix of a linear map of one example's output, for each of the first examples: ``[n, out, d]``. The map's
    tensors stand below each other."""
    n, shape = ctx.examples, tuple(ctx.s.shape)
    d = ctx.s.numel() // n
    columns = []
    with torch.no_grad(), unfused():
        for j in range(d):
            r = ctx.s.new_zeros(n, d)
            r[:, j] = 1
            parts = apply(site.layout.unrows(r, shape))
            layouts = [site.layout if site.layout.fits(tuple(p.shape), n) else Layout.COUPLED for p in parts]
            column = torch.cat([layout.flat_rows(p, n) for layout, p in zip(layouts, parts, strict=True)], 1)
            columns.append(column[:examples].double())
    return torch.stack(columns, dim=2)


def effective_rank_of(matrix: Tensor) -> float:
    """``exp(H(p))``, p the singular values over their sum (Roy and Vetterli 2007): between 1 and the rank.

    >>> import torch
    >>> round(effective_rank_of(torch.eye(5)), 4), round(effective_rank_of(torch.ones(5, 5)), 4)
    (5.0, 1.0)
    """
    s = torch.linalg.svdvals(double(matrix.detach()))
    p = s / s.sum().clamp_min(1e-300)
    return float(torch.exp(torch.special.entr(p).sum()))


def effective_rank(opt: GuessGradOptimizer, closure: Closure | None = None) -> EffectiveRank:
    """Effective rank of every weight (Singhal Figure 5). The closure is not run: it is an argument so that all
    diagnostics have one signature.

    >>> import torch, guessopt
    >>> net = torch.nn.Linear(4, 3)
    >>> opt = guessopt.GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, lr=0.1)
    >>> 1 <= effective_rank(opt).per_parameter["weight"] <= 3
    True
    """
    names = zip(opt.estimation.names, opt.estimation.params, strict=True)
    return EffectiveRank({name: effective_rank_of(p.flatten(1)) for name, p in names if p.dim() > 1})


def jacobian_spectra(
    opt: GuessGradOptimizer, closure: Closure, layers: int = 4, examples: int | None = 16
) -> JacobianSpectra:
    """Spectra of the Jacobian from a site's output through l matrix sites and the activation after the last of them
    (through the last one's output, where nothing follows), l = 1 ... ``layers`` (Singhal Figure 7 and A.3). Last sites,
    and sites of more than 4096 entries, are absent.

    >>> import torch, guessopt
    >>> net = torch.nn.Sequential(*[m for _ in range(3) for m in (torch.nn.Linear(4, 4), torch.nn.ReLU())])
    >>> opt = guessopt.GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, lr=0.1)
    >>> found = jacobian_spectra(opt, lambda: net(torch.randn(6, 4)).square().mean())
    >>> {name: len(spectra) for name, spectra in found.per_site.items()}
    {'0.weight': 2, '2.weight': 1}
    """
    truth = Truth(opt, closure)
    found = {}
    for name, site, ctx in truth.sites():
        ways = site.segment.onward[:layers] if site.segment is not None else ()
        if not ways or ctx.s.numel() // ctx.examples > LARGEST:
            continue
        jacobians = (_columns(partial(ctx.push_forward_to, way), site, ctx, examples) for way in ways)
        found[name] = tuple(_floats(torch.linalg.svdvals(jacobian).mean(0)) for jacobian in jacobians)
    return JacobianSpectra(found)


def activation_overlap(
    opt: GuessGradOptimizer, closure: Closure, k: Sequence[int] | None = None, seed: int = 0
) -> ActivationOverlap:
    """How well activations span the gradient (Singhal 4, Figures 2 and 10): at every linear layer or convolution, the
    gradient ``dL/dx`` of its input against the principal components of x over the batch, and against a random subspace;
    cosines are ``||P g|| / ||g||``, mean over the rows with a gradient. Rows are examples (for linear layers: every
    token).

    Args:
        k: dimensions (None: 1, 2, 4, ... below the number of entries, and that number).
        seed: of the random subspace.

    >>> import torch, guessopt
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> opt = guessopt.GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, lr=0.1)
    >>> x = torch.randn(16, 3)
    >>> found = activation_overlap(opt, lambda: net(x).square().mean(), k=[2, 8])
    >>> found.k["2.weight"], round(found.random["2.weight"][-1], 4)
    ((2, 8), 1.0)
    """
    truth = Truth(opt, closure)
    generator = torch.Generator().manual_seed(seed)
    dimensions, principal, random = {}, {}, {}
    saved_calls = {saved.call.index: saved for saved in truth.record.saved_calls}
    for name, site, _ in truth.sites():
        saved = saved_calls.get(site.call.index)
        if not isinstance(site.rule, MatrixRule) or saved is None:
            continue
        pair = _input_and_gradient(site.rule, site, saved, truth.g[site.index])
        if pair is None:
            continue
        x, g = pair
        g = g[g.norm(dim=1) > 0]
        d = x.shape[1]
        if d > LARGEST or not len(g):
            continue
        ks = tuple(sorted({min(j, d) for j in (k or [*(2**e for e in range(d.bit_length())), d])}))
        basis = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2]
        noise = torch.randn(d, d, dtype=torch.float64, generator=generator).to(x.device)
        dimensions[name] = ks
        principal[name] = _projected(basis, g, ks)
        random[name] = _projected(torch.linalg.qr(noise)[0].T, g, ks)
    return ActivationOverlap(dimensions, principal, random)


def _input_and_gradient(rule: MatrixRule, site: Site, saved: SavedCall, g: Tensor) -> tuple[Tensor, Tensor] | None:
    """A matrix site's input and the true gradient of it, by the site's own transpose; rows, float64."""
    x = rule.input(saved.args, saved.kwargs)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        args = tuple(leaf if a is x else a for a in saved.args)
        kwargs = {key: leaf if a is x else a for key, a in saved.kwargs.items()}
        out = saved.call.fn(*args, **kwargs)
        u = torch.autograd.grad(out, leaf, g.to(out.dtype))[0]
    if rule.geometry(saved.call) == "linear":
        return x.detach().double().reshape(-1, x.shape[-1]), u.double().reshape(-1, x.shape[-1])
    return x.detach().double().flatten(1), u.double().flatten(1)


def _projected(basis: Tensor, g: Tensor, ks: tuple[int, ...]) -> tuple[float, ...]:
    """Mean over rows g of ``||P_k g|| / ||g||``, P_k on the first k rows of the basis."""
    parts = (g @ basis.T).square().cumsum(1).sqrt() / g.norm(dim=1, keepdim=True)
    return tuple(float(parts[:, min(k, parts.shape[1]) - 1].mean()) for k in ks)


def _floats(t: Tensor) -> tuple[float, ...]:
    return tuple(float(v) for v in t)
