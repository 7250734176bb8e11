"""How a feedback matrix begins, and learning it from weights."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import Downstream, GuessGradOptimizer, LearnedFeedback, preflight
from guessopt.diagnostics import cosine, estimated_gradient, true_gradient

from .feedback_networks import (
    Closure,
    Reference,
    convolutions,
    feedback,
    inputs,
    network,
    optimizer,
    optimizer_of,
)
from .problems import build, learned


def test_starts_at_the_product_of_the_weights() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 5), nn.Linear(5, 3)).double()
    x = torch.randn(64, 5, dtype=torch.float64)
    opt = optimizer(net, lr=0.0, gamma=0, beta=0, start="weights")
    for _ in range(2):
        opt.step(lambda: net(x).square().mean())
    w2, w3 = net[1].weight.detach(), net[2].weight.detach()
    torch.testing.assert_close(feedback(opt), [(w3 @ w2).T, w3.T])
    assert cosine(opt, lambda: net(x).square().mean()).total == pytest.approx(1)


@pytest.mark.parametrize("memory", ["store", "replay", "stream"])
def test_starts_at_the_mean_product_of_weights_and_masks(memory: str) -> None:
    """By default, in every mode; not where the output has many features."""
    net, closure = network()
    x = inputs(closure)
    with torch.no_grad():
        m2 = (net[:3](x) > 0).double()
        product = net[2].weight.T @ (m2[:, :, None] * net[4].weight.T).mean(0)

    def made(net: nn.Module) -> GuessGradOptimizer:
        estimator = LearnedFeedback(gamma=0, beta=0)
        return GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, estimator, lr=0.0, memory=memory)

    opt = made(net)
    opt.step(closure)
    b1, b2 = feedback(opt)
    torch.testing.assert_close(b1, product)
    torch.testing.assert_close(b2, net[4].weight.detach().T)
    wide = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 129)).double()
    opt = made(wide)
    opt.step(lambda: wide(x).square().mean())
    assert not torch.allclose(feedback(opt)[1], wide[2].weight.detach().T)


@pytest.mark.parametrize("memory", ["store", "replay", "stream"])
def test_feedback_from_weights(memory: str) -> None:
    """Recursive least squares of what the next ``B``, as it was, predicts, on the error; nothing is guessed, and the
    first site, for which nobody asks, has no ``B``."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)
    ).double()
    x, y = torch.randn(32, 4, dtype=torch.float64), torch.arange(32) % 3
    estimator = LearnedFeedback(gamma=0, source="weights", clip=1e9)
    opt = GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, estimator, lr=0.5, memory=memory)
    opt.step(lambda: F.cross_entropy(net(x), y))
    second: Any = None
    for _ in range(4):
        before = feedback(opt)
        with torch.no_grad():
            e = (net(x).softmax(1) - F.one_hot(y, 3)) / len(x)
            unit = e / e.square().mean().sqrt()
            now = unit.T @ unit / len(x)
            second = now if second is None else second + 0.4 * (now - second)
            firm = second + 0.01 * second.trace() / 3 * torch.eye(3)
            m3 = (net[:5](x) > 0).double()
            wanted = [(m3 * (e @ before[1].T)) @ net[4].weight, e @ net[6].weight]
            steps = [
                (u - e @ b.T).T @ torch.linalg.solve(firm, unit.T).T / (len(x) * e.square().mean().sqrt())
                for u, b in zip(wanted, before, strict=True)
            ]
        noise = copy.deepcopy(opt.state_dict()["guessopt"]["noise"])
        opt.step(lambda: F.cross_entropy(net(x), y))
        torch.testing.assert_close(feedback(opt), [b + 0.4 * s for b, s in zip(before, steps, strict=True)])
        assert str(noise) == str(opt.state_dict()["guessopt"]["noise"])


@pytest.mark.parametrize("model", ["mlp", "convolutions"])
@pytest.mark.parametrize("gamma", [0, 1])
def test_feedback_from_weights_in_every_mode(model: str, gamma: int) -> None:
    ends = []
    for memory in ("store", "replay", "stream"):
        net, closure = network() if model == "mlp" else convolutions()
        estimator = LearnedFeedback(gamma=gamma, source="weights")
        opt = GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, estimator, lr=0.1, memory=memory, seed=1)
        for _ in range(3):
            opt.step(closure)
        ends.append([*feedback(opt), *(p.detach() for p in net.parameters())])
    assert all(torch.equal(a, b) for end in ends[1:] for a, b in zip(ends[0], end, strict=True))


def test_feedback_from_weights_is_the_mean_jacobian_of_a_linear_network() -> None:
    """Convolutions without activations: with it, every gradient is backpropagation's."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 2, 3, padding=1), nn.Flatten(),
        nn.Linear(18, 3),
    ).double()  # fmt: skip
    x = torch.randn(8, 1, 7, 7, dtype=torch.float64)

    def closure() -> Tensor:
        return F.cross_entropy(net(x), torch.arange(8) % 3)

    opt = optimizer(net, lr=0.0, gamma=0, source="weights")
    for _ in range(2):
        opt.step(closure)
        true = true_gradient(opt, closure)
        for name, g in estimated_gradient(opt, closure).items():
            torch.testing.assert_close(g, true[name], rtol=1e-9, atol=1e-12)


def test_where_feedback_comes_from() -> None:
    """Weights, where a batch is small for the rows of ``B``, which then tells positions apart."""
    net, closure = convolutions()
    shapes = [tuple(b.shape) for b in _stepped(net, closure)]
    assert shapes == [(4 * 9, 3), (4, 3)]
    assert [tuple(b.shape) for b in _stepped(net, closure, source="guesses")] == [(3 * 16, 3), (4 * 9, 3), (4, 3)]
    report = preflight(optimizer(net), closure)
    assert report.sites[0].guess == "learned_feedback: one matrix site ahead"
    assert report.sites[1].guess == "learned_feedback: one matrix site ahead, B [36, 3] from weights"
    assert report.feedback == 8 * 3 * (36 + 4 + 3)
    with pytest.raises(ValueError, match="source: 'weights' needs weights"):
        wide = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 129)).double()
        optimizer(wide, source="weights").step(lambda: wide(torch.randn(16, 4).double()).square().mean())
    with pytest.raises(ValueError, match="source: 'weights' goes with ahead=1"):
        LearnedFeedback(source="weights", ahead=0)
    with pytest.raises(ValueError, match="source: 'backward' is not one of"):
        LearnedFeedback(source="backward")


@pytest.mark.parametrize("memory", ["store", "replay"])
def test_the_first_batch_decides_where_feedback_comes_from(memory: str) -> None:
    """A last, smaller one does not undo what was learned."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)).double()
    x = torch.randn(64, 4, dtype=torch.float64)
    for sizes, guessed in (((64, 2, 64), True), ((2, 64, 2), False)):
        opt = GuessGradOptimizer(
            net.named_parameters(), torch.optim.SGD, LearnedFeedback(gamma=0), lr=0.1, memory=memory, seed=1
        )
        for n in sizes:
            opt.step(lambda n=n: F.cross_entropy(net(x[:n]), torch.arange(n) % 3))
            states = learned(opt).values()
            assert len(states) == 1 + guessed and all(("power" in state) == guessed for state in states)
        assert all(state["steps"] == (13 if guessed else 12) for state in states)


def _stepped(net: nn.Module, closure: Closure, **options: Any) -> list[Tensor]:
    opt = optimizer(net, gamma=0, **options)
    opt.step(closure)
    return feedback(opt)


def test_starts_at_random_and_stays_there() -> None:
    """Direct feedback alignment: nothing is guessed, and the matrices are those of the first step."""
    net, closure = network()
    opt = optimizer(net, gamma=0, beta=0, start="random", ahead=0)
    opt.step(closure)
    before = feedback(opt)
    opt.step(closure)
    assert len(before) == 2 and all(a is b for a, b in zip(before, feedback(opt), strict=True))
    b = torch.cat([b.flatten() * b.shape[0] ** 0.5 for b in before])
    assert abs(float(b.square().mean()) - 1) < 5 * (2 / len(b)) ** 0.5
    reference = Reference(net, 0, 0, 0, 0)
    reference.b = before
    found = estimated_gradient(opt, closure)
    noise = [torch.zeros(16, 6).double(), torch.zeros(16, 5).double()]
    g1, _ = reference.cotangents(inputs(closure), torch.arange(16) % 3, noise)[0]
    torch.testing.assert_close(found["0.weight"], g1.T @ inputs(closure))


def test_a_start_goes_on_learning() -> None:
    net, closure = network()
    opt = optimizer(net, gamma=0, start="weights")
    opt.step(closure)
    before = feedback(opt)
    opt.step(closure)
    assert not any(torch.equal(a, b) for a, b in zip(before, feedback(opt), strict=True))


def test_preflight_tells_the_form_and_the_size() -> None:
    net, closure = network()
    report = preflight(optimizer(net), closure)
    forms = [site.guess for site in report.sites]
    assert forms[0] == "learned_feedback: one matrix site ahead, B [6, 3]"
    assert forms[1] == "learned_feedback: exact error through the head, B [5, 3]"
    assert report.feedback == 8 * (6 * 3 + 5 * 3) and report.reversed <= 1
    assert "none holds two matrix sites" in str(report)
    opt = optimizer(net)
    opt.step(closure)
    assert sum(b.nbytes for b in feedback(opt)) == report.feedback
    bounded = preflight(optimizer(net, entries=6), closure)
    assert bounded.feedback == 8 * (6 * 1 + 5 * 1)
    made = build("transformer")
    report = preflight(optimizer_of(made), made.closure)
    assert "block 2 of 3 by itself" in str(report) and report.reversed == 2 and "up to 2 matrix sites" in str(report)
    assert "from weights" in str(report)
    opt = optimizer_of(made)
    opt.step(made.closure)
    assert report.feedback == sum(
        state[key].nbytes for state in learned(opt).values() for key in ("B", "errors") if key in state
    )
    made = build("mlp")
    opt = GuessGradOptimizer(made.named, torch.optim.SGD, Downstream(l=2), lr=0.1)
    assert preflight(opt, made.closure).reversed == 2
