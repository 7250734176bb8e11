"""Guesses against slow reference formulas: equal noise, multiplied by explicit matrices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from guessopt import (
    ActivationMixing,
    Downstream,
    GuessGradOptimizer,
    SelfSharpening,
    WPerp,
    WPerpNS,
    WPreconditioned,
    WTranspose,
)
from guessopt.diagnostics import _backpropagate, estimated_gradient, true_gradient
from guessopt.estimators import Estimator, make_estimator
from guessopt.estimators.newton_schulz import polynomials
from guessopt.estimators.perp import w_perp
from guessopt.estimators.transpose import noise_at, w_transpose, w_transpose_moment
from guessopt.layout import Layout
from guessopt.tracing.context import SiteContext

from .problems import build


class Chain:
    """The MLP problem 4-6-5-3: an estimator's guesses, and the matrices that they are made of."""

    def __init__(self, estimator: Estimator, problem: str = "mlp") -> None:
        made = build(problem)
        self.estimator = estimator
        self.opt = GuessGradOptimizer(made.named, torch.optim.SGD, estimator, lr=0.1, seed=0)
        estimated_gradient(self.opt, made.closure)
        graph, run, _ = _backpropagate(self.opt, made.closure)
        self.contexts = [run.contexts[site.index] for site in graph.sites]
        self.w = [p.detach() for name, p in made.named if name.endswith("weight")]
        self.noise: list[Tensor] = []
        self.kinds: list[str] = []
        for ctx in self.contexts:
            ctx.noise = self.draw  # type: ignore[method-assign]

    def draw(self, shape: tuple[int, ...], kind: str = "normal") -> Tensor:
        self.noise.append(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)))
        self.kinds.append(kind)
        return self.noise[-1]

    def state(self, ctx: SiteContext) -> Any:
        e = self.estimator
        return e.prepare(ctx.site, ctx.weights()) if e.prepares and not ctx.site.is_last else None

    def guess(self, site: int) -> Tensor:
        return self.estimator.sample(self.state(self.contexts[site]), self.contexts[site])

    def moment(self, site: int) -> Tensor:
        """``E[y y^T]`` of each example, ``[n, d, d]``."""
        ctx = self.contexts[site]
        state, found = self.state(ctx), []
        for d in range(ctx.s.shape[-1]):
            g = torch.zeros_like(ctx.s)
            g[..., d] = 1
            moment = self.estimator.second_moment(state, ctx, g)
            assert moment is not None
            found.append(moment)
        return torch.stack(found, -1)

    def m(self, site: int) -> Tensor:
        return (self.contexts[site].s > 0).double()

    def wm(self, site: int) -> Tensor:
        """``W_{i+1} M_n``, ``[n, o, i]``."""
        return self.w[site + 1] * self.m(site)[:, None, :]


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=1e-8, atol=atol)


def test_the_formulas_by_themselves() -> None:
    """Products of explicit matrices on a ReLU MLP: ``y = M W^T z``, ``y = M V_k z``, ``E[y y^T] = M W^T W M``."""
    chain = Chain(WTranspose())
    (ctx, m, w), W = (chain.contexts[0], chain.m(0), chain.w[1]), chain.contexts[0].weights()
    z, g = noise_at(W, ctx), torch.randn_like(ctx.s)
    close(w_transpose(z, W, lambda u: u * m), (z[0] @ w) * m)
    close(w_transpose_moment(g, W, lambda v: v * m, lambda u: u * m), ((g * m) @ w.T @ w) * m)
    v = torch.linalg.svd(w)[2][:2]
    V = [(matrix, v[None]) for matrix, _ in W]
    z = noise_at(V, ctx)
    close(w_perp(z, V, lambda u: u * m), (z[0] @ v) * m)


@pytest.mark.parametrize("estimator", [Downstream(), SelfSharpening()], ids=lambda e: e.name)
def test_downstream_passes_the_next_layer_and_its_activation(estimator: Estimator) -> None:
    chain = Chain(estimator)
    y = chain.guess(0)
    (e,) = chain.noise
    close(y, ((e * chain.m(1)) @ chain.w[1]) * chain.m(0))  # M_i W_{i+1}^T M_{i+1} e
    y = chain.guess(1)
    close(y, (chain.noise[1] @ chain.w[2]) * chain.m(1))  # nothing follows the last layer
    close(chain.guess(2), chain.noise[2])
    assert set(chain.kinds) == {estimator.noise}


def test_two_layers_downstream() -> None:
    chain = Chain(Downstream(l=2))
    y = chain.guess(0)
    close(y, (((chain.noise[0] @ chain.w[2]) * chain.m(1)) @ chain.w[1]) * chain.m(0))


def test_downstream_of_the_attention_layer_is_before_the_feed_forward_layer() -> None:
    """The guess passes softmax, projection, residual branch and norm. The reference is reverse mode through the
    model."""
    chain = Chain(Downstream(), "transformer")
    ctx = next(a for a in chain.contexts if a.s.shape == (5, 3, 12))
    way = ctx.onward(1)
    assert way is not None and way.shapes == ((5, 3, 4),)
    assert {"softmax", "matmul", "linear", "add", "layer_norm"} <= {call.op.removeprefix("__") for call in way.program}


def test_self_sharpening_takes_the_exact_error_at_the_last_site_unless_refused() -> None:
    for exact in (None, False):
        made = build("mlp")
        opt = GuessGradOptimizer(made.named, torch.optim.SGD, "self_sharpening", exact_last=exact, lr=0.1, seed=0)
        same = torch.allclose(
            estimated_gradient(opt, made.closure)["4.weight"], true_gradient(opt, made.closure)["4.weight"]
        )
        assert same is (exact is None)


def test_activation_mixing() -> None:
    for normalise in (False, True):
        chain = Chain(ActivationMixing(normalise=normalise))
        y = chain.guess(0)
        (a,) = chain.noise
        assert a.shape == (7, 7)
        x = chain.contexts[0].s.relu()
        expected = torch.stack([chain.m(0)[n] * sum(a[n, m] * x[m] for m in range(7)) for n in range(7)])
        if normalise:
            expected = expected / expected.norm(dim=1, keepdim=True) * 6**0.5
        close(y, expected)
        close(chain.guess(2), chain.noise[1])


@pytest.mark.parametrize("layout", list(Layout), ids=lambda layout: layout.name)
def test_mixtures_are_of_examples_wherever_these_lie(layout: Layout) -> None:
    from guessopt.estimators.mixing import rows

    examples = torch.randn(3, 4, 2)  # n t d
    there: dict[Layout, Callable[[Tensor], Tensor]] = {
        Layout.BATCH_FIRST: lambda t: t,
        Layout.COUPLED: lambda t: t,
        Layout.BATCH_SECOND: lambda t: t.transpose(0, 1),
        Layout.FLAT: lambda t: t.reshape(12, 2),
        Layout.FLAT_T: lambda t: t.transpose(0, 1).reshape(12, 2),
    }
    t = there[layout](examples)
    assert torch.equal(rows(t, layout, 3), examples.reshape(3, 8))
    assert torch.equal(layout.unrows(examples.reshape(3, 8), tuple(t.shape)), t)


@pytest.mark.parametrize("power", [0.1, 0.5, 2.0, 4.0])
def test_powers_of_singular_values(power: float) -> None:
    chain = Chain(WTranspose(power=power))
    y = chain.guess(0)
    u, s, vh = torch.linalg.svd(chain.w[1], full_matrices=False)
    close(y, (chain.noise[0] @ (u * s**power) @ vh) * chain.m(0))


def test_the_top_directions_of_each_example() -> None:
    chain = Chain(WPerp(k=2, basis="example"))
    for site in (0, 1):
        _, s, vh = torch.linalg.svd(chain.wm(site))
        vh = vh[:, :2] * (s[:, :2, None] > 1e-12)
        close(chain.moment(site), vh.mT @ vh)


def test_the_bottom_directions_of_each_example_are_unseen_by_the_next_layer() -> None:
    chain = Chain(WPerp(k=2, basis="example", select="bottom"))
    moment = chain.moment(0)
    close(moment @ moment, moment)  # a projection, of rank 2
    close(moment.diagonal(dim1=-2, dim2=-1).sum(-1), torch.full((7,), 2.0, dtype=torch.float64))
    values = torch.linalg.svdvals(chain.wm(0))
    smallest = torch.cat([values, torch.zeros(7, 1)], 1).double()[:, -2:]
    close((chain.wm(0) @ moment).square().sum((1, 2)), smallest.square().sum(1))


def test_bottom_directions_move_nothing() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3)).double()
    x = torch.randn(9, 6, dtype=torch.float64)
    bottom = WPerp(k=10, basis="example", select="bottom")
    opt = GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, bottom, exact_last=True, lr=0.1)
    estimate = estimated_gradient(opt, lambda: torch.nn.functional.cross_entropy(net(x), torch.arange(9) % 3))
    assert float(estimate["0.weight"].abs().max()) == 0 and bool(estimate["2.weight"].any())


def by_hand(w: Tensor, k: int) -> Tensor:
    """``p^N`` of the singular values of ``W / sigma_1``, one at a time."""
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    compositions, table = polynomials()
    below = float(s[k]) if k < len(s) else 0.0
    a, b, c, d = table[round(min(max((float(s[k - 1]) + below) / 2 / float(s[0]) * 10, 1), 9)) - 1]
    x = s / s[0]
    for _ in range(compositions):
        x = a * x + b * x**3 + c * x**5 + d * x**7
    return (u * x) @ vh


def test_newton_schulz() -> None:
    chain = Chain(WPerpNS(k=2))
    close(chain.guess(0), (chain.noise[0] @ by_hand(chain.w[1], 2)) * chain.m(0), atol=1e-8)
    chain = Chain(WPerpNS(k=2, basis="example"))
    y, (e,) = chain.guess(0), chain.noise
    close(y, torch.stack([e[n] @ by_hand(chain.wm(0)[n], 2) for n in range(7)]), atol=1e-8)
    chain = Chain(WPerpNS(k=3, basis="example"))
    y, (e,) = chain.guess(1), chain.noise
    close(y, torch.stack([e[n] @ by_hand(chain.wm(1)[n], 3) for n in range(7)]), atol=1e-8)


def test_the_shipped_polynomials_come_near_their_steps() -> None:
    compositions, table = polynomials()
    x = torch.linspace(0, 1.02, 1021, dtype=torch.float64)
    for step, (a, b, c, d) in zip(torch.arange(1, 10) / 10, table, strict=True):
        y = x
        for _ in range(compositions):
            y = a * y + b * y**3 + c * y**5 + d * y**7
        off = (y - (x > step).double()).abs()
        assert float(off.square().mean()) ** 0.5 < 0.12
        assert float(off[(x - step).abs() > 0.05].max()) < 0.2


def test_preconditioned_guesses_span_the_row_space_evenly() -> None:
    chain = Chain(WPreconditioned())
    for site in (0, 1):
        _, s, vh = torch.linalg.svd(chain.wm(site), full_matrices=False)
        vh = vh * (s[..., None] > 1e-9)
        close(chain.moment(site), vh.mT @ vh, atol=1e-6)
    close(Chain(WPreconditioned(), "gelu mlp").moment(2), torch.eye(3, dtype=torch.float64).expand(6, 3, 3))


@pytest.mark.parametrize(
    "estimator",
    [
        WTranspose(debias=True), WTranspose(power=2.0, debias=True), Downstream(debias=True),
        ActivationMixing(normalise=False, debias=True), WPerp(k=2, debias=True),
        WPerp(k=2, basis="masked", debias=True), WPerp(k=2, basis="example", debias=True),
        WPreconditioned(debias=True), WPreconditioned(basis="shared", debias=True),
    ],
    ids=str,
)  # fmt: skip
def test_debiased_guesses_expect_the_projection_of_the_gradient(estimator: Estimator) -> None:
    """``correct`` applies ``E[y y^T]^+``: to the moment of g it gives back g within the span, and y by its pinv."""
    chain = Chain(estimator)
    for site in (0, 1):
        ctx, moment = chain.contexts[site], chain.moment(site)
        state = chain.state(ctx)
        g = torch.randn(ctx.s.shape, dtype=torch.float64)
        inverse = torch.linalg.pinv(moment, rtol=1e-8, hermitian=True)
        second = estimator.second_moment(state, ctx, g)
        assert second is not None
        close(estimator.correct(state, ctx, second), (inverse @ moment @ g[..., None])[..., 0], atol=1e-4)
        y = chain.guess(site)
        close(estimator.correct(state, ctx, y), (inverse @ y[..., None])[..., 0], atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ({"name": "downstream", "l": 0}, "l: "),
        ({"name": "w_transpose", "power": 5.0}, "power: "),
        ({"name": "w_transpose", "noise": "uniform", "debias": True}, "debias: "),
        ({"name": "activation_mixing", "debias": True}, "debias: "),
        ({"name": "w_perp_ns", "k": 0}, "k: "),
        ({"name": "w_perp_ns", "basis": "masked"}, "basis: "),
        ({"name": "w_preconditioned", "sigma": 0.0}, "sigma: "),
        ({"name": "w_preconditioned", "basis": "masked"}, "basis: "),
    ],
    ids=str,
)
def test_bad_options_are_named(spec: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_estimator(spec)
