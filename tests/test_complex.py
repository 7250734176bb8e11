"""Complex numbers in the network, in the loss, as parameters and at sites: the gradient is torch's own,
``dL/dRe + i dL/dIm``."""

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import ClosureError, GuessGradOptimizer, LearnedFeedback
from guessopt.diagnostics import cosine, expected_gradient, true_cotangents, true_gradient, variance
from guessopt.estimators import Estimator, estimator_names
from guessopt.layout import Layout, numel
from guessopt.rng import NoiseSource
from guessopt.step.modes import estimate_alone
from guessopt.tracing.context import NOISES, draw

from .problems import Problem, labels, of

pytestmark = pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")

REAL, COMPLEX = torch.float64, torch.complex128


class Net(nn.Module):
    """Linear layers ``a`` (4 to 6) and ``b`` (3 to 2), a complex parameter ``w`` (3) and a matrix ``m`` (3, 3), a real
    scale ``r`` (3) and matrix ``t`` (3, 3)."""

    def __init__(self, run: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.run = nn.Linear(4, 6), nn.Linear(3, 2), run
        self.w, self.m = nn.Parameter(torch.randn(3, dtype=COMPLEX)), nn.Parameter(torch.randn(3, 3, dtype=COMPLEX))
        self.r, self.t = nn.Parameter(torch.rand(3, dtype=REAL) + 0.5), nn.Parameter(torch.randn(3, 3, dtype=REAL))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def joined(t: Tensor) -> Tensor:
    return torch.view_as_complex(t.unflatten(-1, (-1, 2)))


def net(run: Callable[[Net, Tensor], Tensor], names: str, loss: Callable[[Tensor], Tensor] | None = None) -> Problem:
    """``names``: first letters of the parameters that ``run`` reads."""
    model, x = Net(run), torch.randn(5, 4, dtype=REAL)
    model.a.double(), model.b.double()
    named = [(name, p) for name, p in model.named_parameters() if name[0] in names]
    loss = loss or (lambda out: F.cross_entropy(out, labels(5, 2)))
    return Problem(named, lambda: loss(model(x)), 5)


def rotary() -> Problem:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.o, self.head = (nn.Linear(4, n) for n in (4, 4, 4, 2))

        def forward(self, x: Tensor) -> Tensor:
            angles = torch.arange(3, dtype=REAL)[:, None] * torch.tensor([1, 0.1], dtype=REAL)
            turn = torch.polar(torch.ones_like(angles), angles)
            q, k = (torch.view_as_real(joined(w(x)) * turn).flatten(-2) for w in (self.q, self.k))
            out: Tensor = self.head(self.o(torch.softmax(q @ k.mT, -1) @ x).mean(1))
            return out

    x = torch.randn(2, 3, 4, dtype=REAL)
    return of(Attention(), lambda m: F.cross_entropy(m(x), labels(2, 2)), 2)


def fourier_filter() -> Problem:
    """A global filter network: a complex weight on the spectrum."""

    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 2, 2) / 2)
            self.conv, self.head = nn.Conv2d(1, 2, 1), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            spectrum = torch.fft.rfft2(torch.tanh(self.conv(x)), norm="ortho").permute(0, 2, 3, 1)
            h = torch.fft.irfft2((spectrum * torch.view_as_complex(self.weight)).permute(0, 3, 1, 2), s=(4, 4))
            out: Tensor = self.head(F.gelu(h).mean((2, 3)))
            return out

    x = torch.randn(3, 1, 4, 4, dtype=REAL)
    return of(Filter(), lambda m: F.cross_entropy(m(x), labels(3, 2)), 3)


def stft_loss() -> Problem:
    model = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv1d(2, 1, 3, padding=1))
    x, y = torch.randn(2, 1, 12, dtype=REAL), torch.randn(2, 12, dtype=REAL)
    window = torch.hann_window(8, dtype=REAL)

    def magnitude(a: Tensor) -> Tensor:
        return torch.stft(a, 8, 4, window=window, return_complex=True).abs().clamp_min(1e-7)

    return of(model, lambda m: (magnitude(m(x)[:, 0]) - magnitude(y)).square().mean())


def complex_convolution() -> Problem:
    conv = nn.Conv1d(1, 2, 3, dtype=COMPLEX)
    x = torch.randn(3, 1, 6, dtype=COMPLEX)
    return Problem(list(conv.named_parameters()), lambda: torch.tanh(conv(x)).abs().square().mean(), 3)


def state_space() -> Problem:
    """A diagonal state space: complex parameters made from real ones, a kernel from their powers."""

    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate, self.turn = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3))
            self.c, self.head = nn.Parameter(torch.randn(3, 2)), nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            poles = torch.complex(-torch.exp(self.rate), self.turn)
            steps = torch.arange(x.shape[1], dtype=REAL)
            kernel = torch.einsum("d,dt->t", torch.view_as_complex(self.c), torch.exp(poles[:, None] * steps)).real
            length = 2 * x.shape[1]
            h = torch.fft.irfft(torch.fft.rfft(x, n=length) * torch.fft.rfft(kernel, n=length), n=length)
            out: Tensor = self.head(torch.tanh(h[:, : x.shape[1], None])).mean(1)
            return out

    x = torch.randn(3, 5, dtype=REAL)
    return of(States(), lambda m: F.cross_entropy(m(x), labels(3, 2)), 3)


class Turned(torch.autograd.Function):
    """``z exp(i |z|^2)``, with a backward and no ``jvp``."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z * torch.exp(1j * z.abs().square())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (g,), (z,) = gradients, ctx.saved_tensors
        turn = torch.exp(1j * z.abs().square())
        own: Tensor = g * turn.conj() + 2 * z * (g.conj() * 1j * z * turn).real
        return own


def both(m: Net, x: Tensor) -> Any:
    z = joined(m.a(x)) * m.w
    return m.b(z.real), z


def loss_of_both(outputs: Any) -> Tensor:
    out, z = outputs
    return F.cross_entropy(out, labels(5, 2)) + z.abs().mean()


def in_place(m: Net, x: Tensor) -> Tensor:
    z = joined(m.a(x)) * 1
    z *= m.w
    z += 0.5j
    z.tanh_()
    return m.b(z.abs())


def polar(m: Net, x: Tensor) -> Tensor:
    length, angle = m.a(x).chunk(2, -1)
    return m.b(torch.exp(torch.complex(torch.polar(length.exp(), angle).imag, x[:, :3])).real)


def of_complex_layers(m: Net, x: Tensor) -> Tensor:
    h = torch.tanh(F.linear(joined(m.a(x)), m.m, m.w))
    return m.b(F.linear(h, m.m.conj()).real)


TARGET = torch.randn(5, 3, dtype=COMPLEX, generator=torch.Generator().manual_seed(0))

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "rotary": rotary,
    "fourier filter": fourier_filter,
    "stft loss": stft_loss,
    "complex convolution": complex_convolution,
    "state space": state_space,
    "fft of activations": lambda: net(lambda m, x: m.b(torch.fft.fft(m.a(x))[..., :3].real), "ab"),
    "times a complex parameter": lambda: net(lambda m, x: m.b((joined(m.a(x)) * m.w).abs()), "abw"),
    "plus a complex parameter": lambda: net(lambda m, x: m.b((joined(m.a(x)) + m.w).angle()), "abw"),
    "a real scale of a complex activation": lambda: net(lambda m, x: m.b((joined(m.a(x)) * m.r).imag), "abr"),
    "a real activation times a complex parameter": lambda: net(
        lambda m, x: m.b((m.b(x[:, :3])[:, :1] * m.w).real), "bw"
    ),
    "complex layers, conjugated": lambda: net(of_complex_layers, "abwm"),
    "matmul": lambda: net(lambda m, x: m.b((torch.sigmoid(joined(m.a(x)) @ m.m) / m.w).abs()), "abwm"),
    "einsum": lambda: net(lambda m, x: m.b(torch.einsum("ni,io,o->no", joined(m.a(x)), m.m, m.w).real), "abwm"),
    "a real layer plus a complex parameter": lambda: net(
        lambda m, x: m.b((F.linear(x[:, :3], m.t) + m.w).abs()), "btw"
    ),
    "the loss and the network read a complex tensor": lambda: net(both, "abw", loss_of_both),
    "an operation without forward derivative": lambda: net(
        lambda m, x: m.b(Turned.apply(joined(m.a(x)) * m.w).imag), "abw"
    ),
    "written in place": lambda: net(in_place, "abw"),
    "polar, complex, exp": lambda: net(polar, "ab"),
    "the loss reads a complex tensor": lambda: net(
        lambda m, x: joined(m.a(x)) * m.w, "aw", lambda z: (z - TARGET).abs().pow(3).mean()
    ),
    "the loss reads it, and a complex parameter": lambda: net(
        lambda m, x: torch.tanh(joined(m.a(x)) @ m.m), "am", lambda z: torch.view_as_real(z * (1 + 2j)).square().mean()
    ),
    "a loss for each example": lambda: net(
        lambda m, x: joined(m.a(x)) * m.w, "aw", lambda z: (z.conj() * TARGET).real.sum(1).exp()
    ),
}  # fmt: skip


#: The reference engine refuses these by name.
NOT_BY_FUNC = ("written in place", "an operation without forward derivative")


def build(name: str) -> Problem:
    torch.manual_seed(0)
    return PROBLEMS[name]()


def sgd(problem: Problem, estimator: Any = "activation_perturbation", **options: Any) -> GuessGradOptimizer:
    return GuessGradOptimizer(problem.named, torch.optim.SGD, estimator, **{"lr": 0.0, "seed": 0, **options})


def reference(problem: Problem) -> dict[str, Tensor]:
    found = torch.autograd.grad(problem.closure().mean(), problem.parameters())
    return dict(zip([name for name, _ in problem.named], found, strict=True))


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 1e-9) -> None:
    for name, g in wanted.items():
        assert found[name].dtype is g.dtype
        torch.testing.assert_close(
            found[name], g, rtol=rtol, atol=rtol * float(g.abs().max()), msg=lambda m, name=name: f"{name}: {m}"
        )


class OneHot(Estimator):
    """A guess that is 1 or 1j at one entry of one site, in every example."""

    name: ClassVar[str] = "one_hot"
    per_example_parameters: ClassVar[bool] = False
    at: tuple[int, int] = (-1, 0)

    def sample(self, state: Any, local: Any) -> Tensor:
        n, (site, entry) = local.examples, self.at
        r = local.s.new_zeros(n, local.s.numel() // n)
        if site == local.site.index:
            r[:, entry % r.shape[1]] = 1j if entry >= r.shape[1] else 1
        return local.site.layout.unrows(r, tuple(local.s.shape))

    def options(self) -> dict[str, Any]:
        return {}


#: ``test_engines_and_modes_agree`` compares these with "fast".
SLOW_ENGINES = [pytest.param(engine, marks=pytest.mark.slow) for engine in ("dual", "func")]


@pytest.mark.parametrize("engine", ["fast", *SLOW_ENGINES])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_sum_over_one_hot_guesses_is_the_gradient(name: str, engine: str) -> None:
    problem = build(name)
    if engine == "func" and name in NOT_BY_FUNC:
        problem = build("times a complex parameter")
    opt = sgd(problem, engine=engine)
    wanted = reference(problem)
    estimate_alone(opt.estimation, problem.closure)
    graph = opt.estimation.plans[0].graph
    assert problem.batch in (None, graph.batch) or name == "state space"  # the kernel's length is the batch's
    estimator = OneHot()
    opt.estimation.estimators, opt.estimation.plans[0].assignments = [estimator] * len(problem.named), None
    total = {k: torch.zeros_like(p) for k, p in opt.estimation.by_position.items()}
    runs = 0
    for site in graph.sites:
        if site.shares is None:
            entries = numel(site.shape) // (1 if site.layout is Layout.COUPLED else graph.batch)
            for entry in range(entries * (2 if site.dtype.is_complex else 1)):
                estimator.at, runs = (site.index, entry), runs + 1
                for k, g in estimate_alone(opt.estimation, problem.closure)[1].items():
                    total[k] = total[k] + g
    assert runs and not graph.loss_params
    assert_close({opt.estimation.names[k]: g for k, g in total.items()}, wanted)


@pytest.mark.parametrize("estimator", ["w_perp", "downstream", "directional_descent"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_engines_and_modes_agree(name: str, estimator: str) -> None:
    found = []
    ways: list[dict[str, Any]] = [{"engine": "dual"}, {"engine": "fast"}, {"memory": "replay"}]
    if name not in NOT_BY_FUNC:
        ways.append({"engine": "func"})
    for way in ways:
        problem = build(name)
        opt = sgd(problem, estimator, **way)
        opt.estimate(problem.closure)
        found.append({name: p.grad for name, p in problem.named if p.grad is not None})
    assert len(found[0]) == len(problem.named)
    for other in found[1:]:
        assert_close(other, found[0], 1e-11)


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("estimator", ["w_transpose", "directional_descent"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_stacked_guesses_are_those_in_turn(name: str, estimator: str, orthogonal: bool) -> None:
    found = []
    for stacked in (None, False):
        problem = build(name)
        opt = sgd(problem, estimator, guesses=3, stack_guesses=stacked, orthogonal=orthogonal)
        opt.estimate(problem.closure)
        found.append({name: p.grad for name, p in problem.named if p.grad is not None})
        assert stacked is False or opt.estimation.plans[0].stacks
    assert_close(found[0], found[1], 1e-9)


@pytest.mark.parametrize("name", ["times a complex parameter", "complex layers, conjugated", "complex convolution"])
def test_stream_updates_complex_parameters_as_store_does(name: str) -> None:
    ends = []
    for memory in ("store", "stream"):
        problem = build(name)
        opt = GuessGradOptimizer(problem.named, torch.optim.AdamW, "w_perp", lr=0.01, seed=0, memory=memory)
        for _ in range(3):
            opt.step(problem.closure)
        ends.append({name: p.detach() for name, p in problem.named})
    assert_close(ends[0], ends[1], 1e-12)
    assert any(not torch.equal(p, dict(build(name).named)[n]) for n, p in ends[0].items())


@pytest.mark.parametrize("kind", NOISES)
def test_the_mean_of_a_complex_guess_is_torchs_gradient(kind: str) -> None:
    source = NoiseSource(0)
    y = draw(source, kind, (200_000,), COMPLEX, torch.device("cpu"))
    assert y.dtype is COMPLEX
    y = y - torch.complex(*[torch.tensor(NOISES[kind][0], dtype=REAL)] * 2)
    g = torch.tensor(0.3 - 1.7j, dtype=COMPLEX)
    mean = ((g.conj() * y).real * y).mean()
    assert abs(complex(mean / NOISES[kind][1] - g)) < 0.03


UNGUIDED = ("activation_perturbation", "directional_descent", "auto")


@pytest.mark.parametrize(
    "estimator", [n for n in estimator_names() if n not in ("one_hot", "whisper", "learned_feedback")]
)
@pytest.mark.parametrize("name", ["complex layers, conjugated", "fourier filter"])
def test_every_estimator_serves_complex_sites(name: str, estimator: str) -> None:
    """Where the next layer's input is complex, the guess is isotropic, and a note says so."""
    problem = build(name)
    opt = sgd(problem, estimator)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.estimate(problem.closure)
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in problem.parameters())
    noted = any(
        "a.weight (linear) gets another guess: its output, or the next layer, is complex" in str(w.message)
        for w in caught
    )
    assert noted == (name == "complex layers, conjugated" and estimator not in UNGUIDED)


def test_learned_feedback_refuses_complex_sites_and_errors_by_name() -> None:
    problem = build("complex layers, conjugated")
    with pytest.raises(ValueError, match=r"learned_feedback: linear gives a complex output of shape \[5, 3\]"):
        sgd(problem, LearnedFeedback()).estimate(problem.closure)
    assert all(p.grad is None for p in problem.parameters())
    # m is a frozen layer here: the network ends after it
    problem = net(lambda m, x: F.linear(joined(torch.tanh(m.a(x))), m.m), "a", lambda z: (z - TARGET).abs().mean())
    with pytest.raises(ClosureError, match=r"the loss reads a complex tensor of shape \[5, 3\]"):
        sgd(problem, LearnedFeedback()).estimate(problem.closure)
    problem = build("complex layers, conjugated")
    mixed = {"[mw]": "activation_perturbation", "*": "learned_feedback"}
    opt = sgd(problem, mixed)
    for _ in range(3):
        opt.step(problem.closure)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in problem.parameters())
    problem = build("rotary")  # complex in between alone
    sgd(problem, LearnedFeedback()).step(problem.closure)


def test_a_complex_loss_is_refused() -> None:
    problem = net(lambda m, x: joined(m.a(x)), "a", lambda z: z.mean())
    with pytest.raises(ClosureError, match=r"a loss of dtype torch\.complex128; it must be a real floating-point"):
        sgd(problem).estimate(problem.closure)


@pytest.mark.parametrize("name", PROBLEMS)
def test_diagnostics_keep_both_parts(name: str) -> None:
    problem = build(name)
    opt = sgd(problem)
    assert_close(true_gradient(opt, problem.closure), reference(problem), 1e-10)
    assert_close(expected_gradient(opt, problem.closure), reference(problem), 1e-9)


def test_diagnostics_of_complex_sites() -> None:
    model, x = Net(lambda m, x: joined(m.a(x)) * m.w), torch.randn(5, 4, dtype=REAL)
    model.a.double()
    seen: list[Tensor] = []

    def closure(keep: bool = False) -> Tensor:
        z = model(x)
        if keep:
            seen.append(z)
        return (z - TARGET).abs().square().mean()

    named = [(n, p) for n, p in model.named_parameters() if n[0] in "aw"]
    opt = GuessGradOptimizer(named, torch.optim.SGD, "activation_perturbation", lr=0.0, seed=0, exact_last=True)
    wanted = torch.autograd.grad(closure(True), seen)[0]
    torch.testing.assert_close(true_cotangents(opt, closure)["w"], wanted)
    found = cosine(opt, closure)
    assert found.per_site["w"] == pytest.approx(1) and found.per_parameter["w"] == pytest.approx(1)
    opt = GuessGradOptimizer(named, torch.optim.SGD, "activation_perturbation", lr=0.0, seed=0)
    spread = variance(opt, closure, draws=300)
    # d real entries, y normal: E |D y - g|^2 = (d + 1) |g|^2, all sites' D joined
    squares = {k: g.abs().square().sum(1) for k, g in true_cotangents(opt, closure).items()}
    total = sum(squares.values())
    expected = float((total * 6 + squares["w"]).mean())
    assert spread.per_site["w"] == pytest.approx(expected, rel=0.25)
