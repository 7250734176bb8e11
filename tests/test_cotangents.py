"""The true cotangents of the diagnostics. Their product with the guesses is the engine's ``D_n``. The sites' rules
turn them into autograd's gradients, also for writes in place and calls with several outputs."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import GuessGradOptimizer, LearnedFeedback
from guessopt.diagnostics import cosine
from guessopt.diagnostics.reverse import Truth, draw, measuring
from guessopt.engine.gradients import parameter_gradients
from guessopt.estimators import Estimator
from guessopt.step import runs
from guessopt.step.runs import forward

from .problems import labels

REAL = torch.float64


class Isotropic(Estimator):
    """Normal noise at every site, even at sites with few parameters."""

    name: ClassVar[str] = "isotropic"
    per_example_parameters: ClassVar[bool] = False

    def sample(self, state: Any, local: Any) -> Tensor:
        y: Tensor = local.noise(local.s.shape)
        return y


class Net(nn.Module):
    def __init__(self, run: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.wide, self.h = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 8), nn.Linear(4, 2)
        self.lstm, self.gru, self.rnn = nn.LSTMCell(3, 4), nn.GRUCell(3, 4), nn.RNNCell(3, 4)
        self.layer, self.norm = nn.LSTM(3, 4, batch_first=True), nn.LayerNorm(4)
        self.p, self.q, self.run = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3, 4)), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


CASES: dict[str, Callable[[Net, Tensor], Tensor]] = {}


def case(f: Callable[[Net, Tensor], Tensor]) -> Callable[[Net, Tensor], Tensor]:
    CASES[f.__name__.strip("_")] = f
    return f


def zeros(x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], 4)


@case
def lstm_cell(m: Net, x: Tensor) -> Tensor:
    x, h, c = x.flatten(0, -2), zeros(x.flatten(0, -2)), zeros(x.flatten(0, -2))
    for _ in range(3):
        h, c = m.lstm(x, (h, c))
    return m.h(h + c)


@case
def gru_cell(m: Net, x: Tensor) -> Tensor:
    x, h = x.flatten(0, -2), zeros(x.flatten(0, -2))
    for _ in range(3):
        h = m.gru(x, m.rnn(x, h))
    return m.h(h)


@case
def lstm_of_two_outputs(m: Net, x: Tensor) -> Tensor:
    out, (h, c) = m.layer(x.reshape(len(x), -1, 3))
    return m.h(out.mean(1) + h[0] * c[0])


@case
def add_in_place(m: Net, x: Tensor) -> Tensor:
    o = m.a(x)
    o += m.b(x)
    return m.h(torch.tanh(o))


@case
def add_in_place_twice(m: Net, x: Tensor) -> Tensor:
    o = m.a(x)
    z = o * 2
    o += z
    o *= 1.5
    o += m.b(x)
    return m.h(o)


@case
def add_a_parameter_in_place(m: Net, x: Tensor) -> Tensor:
    o = m.a(x)
    o += m.p
    return m.h(torch.tanh(o))


@case
def parameters_in_place(m: Net, x: Tensor) -> Tensor:
    o = torch.tanh(m.a(x)) * 2
    o *= m.p
    o += m.p
    return m.h(torch.tanh(o))


@case
def relu_(m: Net, x: Tensor) -> Tensor:
    o = m.a(x)
    o.relu_()
    return m.h(o)


@case
def relu_inplace_of_a_sum(m: Net, x: Tensor) -> Tensor:
    o = m.a(x)
    o += m.b(x)
    return m.h(F.relu(o, inplace=True))


@case
def tanh_(m: Net, x: Tensor) -> Tensor:
    return m.h(m.a(x).tanh_())


@case
def views_in_place(m: Net, x: Tensor) -> Tensor:
    o = m.a(x).view(-1, 4)
    o += 1
    o *= m.p
    return m.h(o.view(*x.shape[:-1], 4))


@case
def chunk(m: Net, x: Tensor) -> Tensor:
    a, b = m.wide(x).chunk(2, -1)
    return m.h(a * torch.sigmoid(b))


@case
def split(m: Net, x: Tensor) -> Tensor:
    a, b, c = torch.split(m.wide(x), (4, 2, 2), -1)
    return m.h(torch.tanh(a) * torch.cat([c, b], -1))


@case
def unbind(m: Net, x: Tensor) -> Tensor:
    a, b = m.wide(x).unflatten(-1, (2, 4)).unbind(-2)
    return m.h(torch.tanh(a) * b)


@case
def shared_bias(m: Net, x: Tensor) -> Tensor:
    o = x @ m.q + m.p
    o += 1
    return m.h(torch.tanh(o))


@case
def shared_sum(m: Net, x: Tensor) -> Tensor:
    return m.h(torch.tanh(m.a(x) + m.b(x)))


@case
def into_a_buffer(m: Net, x: Tensor) -> Tensor:
    o = zeros(x)
    o += m.p
    o += m.b(x)
    return m.h(torch.tanh(o))


@case
def written_by_index(m: Net, x: Tensor) -> Tensor:
    o = m.a(x).clone()
    o[..., 0] = m.b(x)[..., 1]
    return m.h(torch.tanh(o))


@case
def values_and_indices(m: Net, x: Tensor) -> Tensor:
    return m.h(m.a(x) * torch.max(m.norm(m.b(x)), -1, keepdim=True)[0])


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3)], ids=["vectors", "tokens"])
@pytest.mark.parametrize("name", CASES)
def test_the_truth_is_that_of_autograd(name: str, shape: tuple[int, ...]) -> None:
    model, x = Net(CASES[name]).double(), torch.randn(shape, dtype=REAL)

    def closure() -> Tensor:
        out = model(x).reshape(5, -1, 2).mean(1)
        return F.cross_entropy(out, labels(5, 2))

    every = list(model.named_parameters())
    gradients = torch.autograd.grad(closure(), [p for _, p in every], allow_unused=True)
    wanted = {n: (p, g) for (n, p), g in zip(every, gradients, strict=True) if g is not None}
    opt = GuessGradOptimizer(
        [(n, p) for n, (p, _) in wanted.items()], torch.optim.SGD, "activation_perturbation", lr=0.0
    )
    opt.estimation.estimators = [Isotropic()] * len(wanted)
    truth = Truth(opt, closure)

    with measuring(opt) as transaction:
        plan, record = forward(opt.estimation, closure, transaction)
    sites = plan.graph.sites
    product = sum(float((truth.g[k] * y).sum()) for k, y in record.guesses.items())
    size = sum(float((truth.g[k] * y).abs().sum()) for k, y in record.guesses.items())
    assert set(record.guesses) == {site.index for site in sites if site.shares is None}
    assert float(record.d.sum()) == pytest.approx(product, abs=1e-12 * size)

    found = parameter_gradients(truth.graph, truth.record, truth.g, opt.estimation.by_position, opt.estimation.ids)
    for k, (n, (_, g)) in enumerate(wanted.items()):
        for mine in (found[k], truth.gradient[k]):
            torch.testing.assert_close(mine, g, rtol=1e-9, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize("name", ["lstm_cell", "add_in_place"])
def test_an_exact_error_has_a_cosine_of_one(name: str) -> None:
    model, x = Net(CASES[name]).double(), torch.randn(5, 2, 3, dtype=REAL)
    named = [(n, p) for n, p in model.named_parameters() if n.startswith("h")]
    opt = GuessGradOptimizer(named, torch.optim.SGD, "activation_perturbation", lr=0.0, exact_last=True)
    assert cosine(opt, lambda: model(x).square().mean()).total == pytest.approx(1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.cell(x, (torch.zeros_like(x), torch.zeros_like(x)))
        y: Tensor = x + self.out(torch.tanh(h + 2 * c))
        return y


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
def test_learned_feedback_gives_each_output_of_a_cell_its_own_cotangent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block needs no feedback: its cotangents equal autograd's."""
    model, x = (
        nn.Sequential(nn.Linear(4, 4), Block(), Block(), nn.Linear(4, 3)).double(),
        torch.randn(12, 4, dtype=REAL),
    )
    opt = GuessGradOptimizer(model.named_parameters(), torch.optim.SGD, LearnedFeedback(gamma=0), lr=0.0, seed=0)

    def closure() -> Tensor:
        return F.cross_entropy(model(x), labels(12, 3))

    monkeypatch.setattr(runs, "direct_calls", lambda *_: frozenset())  # as in a step whose guesses correct
    monkeypatch.setattr(runs, "makes_no_guess", lambda *_: False)
    truth, found = Truth(opt, closure), draw(opt, closure).cotangents
    assert truth.graph.chain is not None
    last = [site for site in truth.graph.sites if opt.estimation.names[site.params[0]].startswith("2.")]
    assert {site.op for site in last} == {"lstm_cell", "linear"} and len(last) == 3
    for site in last:
        torch.testing.assert_close(found[site.index], truth.g[site.index], rtol=1e-9, atol=1e-12)
