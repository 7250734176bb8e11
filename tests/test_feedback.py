"""LearnedFeedback against a reference written by hand, and what it promises: unbiased at gamma 1, no tangents between
its forward-mode passes, resumed bit for bit, no reverse graph through two layers."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import ClosureError, GuessGradOptimizer, LearnedFeedback
from guessopt.diagnostics import cosine, estimated_gradient, expected_gradient, true_gradient
from guessopt.estimators import describe, make_estimator

from .feedback_networks import (
    STREAMS,
    Closure,
    Reference,
    feedback,
    inputs,
    network,
    optimizer,
    optimizer_of,
)
from .problems import build


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0])
def test_the_formula(gamma: float, ahead: int) -> None:
    net, closure = network()
    opt = optimizer(net, gamma=gamma, beta=0.3, leak=0.01, clip=1e9, ahead=ahead, start="zero")
    reference = Reference(copy.deepcopy(net), gamma, 0.3, 0.01, ahead)
    noise: list[Tensor] = []
    sample = LearnedFeedback.sample

    def recording(self: LearnedFeedback, state: Any, ctx: Any) -> Tensor:
        y = sample(self, state, ctx)
        noise.append(y.clone())
        return y

    x = inputs(closure)
    for _ in range(6):
        noise.clear()
        reference.net.load_state_dict(net.state_dict())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LearnedFeedback, "sample", recording)
            opt.step(closure)
        g1, g2 = reference.step(x, torch.arange(16) % 3, noise)
        torch.testing.assert_close(net[0].weight.grad, g1.T @ x, rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            x2 = reference.net[0](x).relu()
        torch.testing.assert_close(net[2].weight.grad, g2.T @ x2, rtol=1e-9, atol=1e-12)
        for b, expected in zip(feedback(opt), reference.b, strict=True):
            torch.testing.assert_close(b, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.SiLU])
def test_unbiased_at_gamma_1(activation: type[nn.Module]) -> None:
    """With a ``B`` that has learned something: the mean estimate along the true gradient, within 5 standard errors."""
    net, closure = network(activation)
    opt = optimizer(net, gamma=1)
    for _ in range(5):
        opt.step(closure)
    assert all(bool(b.any()) for b in feedback(opt))
    true, expected = true_gradient(opt, closure), expected_gradient(opt, closure)
    draws = [estimated_gradient(opt, closure) for _ in range(800)]
    for name, g in true.items():
        torch.testing.assert_close(expected[name], g, rtol=1e-9, atol=1e-12)
        each = torch.stack([(draw[name] * g).sum() / g.square().sum() for draw in draws])
        assert abs(float(each.mean()) - 1) <= 5 * float(each.std()) / len(each) ** 0.5 + 1e-9, name


@pytest.mark.parametrize("name", ["cnn", "residual, batch norm in eval mode", "transformer", "prompts", "functional"])
def test_unbiased_on_other_networks(name: str) -> None:
    made = build(name)
    opt = GuessGradOptimizer(made.named, torch.optim.SGD, LearnedFeedback(gamma=1), lr=0.01, seed=1)
    for _ in range(5):
        opt.step(made.closure)
    true = true_gradient(opt, made.closure)
    draws = [estimated_gradient(opt, made.closure) for _ in range(150)]
    for key, g in true.items():
        each = torch.stack([(draw[key] * g).sum() / g.square().sum() for draw in draws])
        assert abs(float(each.mean()) - 1) <= 5 * float(each.std()) / len(each) ** 0.5 + 1e-9, key


def test_a_look_at_the_estimate_teaches_nothing() -> None:
    net, closure = network()
    opt = optimizer(net)
    opt.step(closure)
    before = [b.clone() for b in feedback(opt)]
    estimated_gradient(opt, closure)
    cosine(opt, closure)
    assert all(torch.equal(a, b) for a, b in zip(before, feedback(opt), strict=True))


@pytest.mark.parametrize("gamma", [1.0, 0.0, "auto"])
@pytest.mark.parametrize("guess", ["activation_perturbation", {"name": "w_perp", "k": 2}])
def test_resumes_bit_for_bit(guess: Any, gamma: Any) -> None:
    def start() -> tuple[nn.Sequential, Closure, GuessGradOptimizer]:
        net, closure = network()
        return net, closure, optimizer(net, guess=guess, gamma=gamma, every=2)

    net, closure, opt = start()
    for _ in range(5):
        opt.step(closure)
    saved = copy.deepcopy((net.state_dict(), opt.state_dict()))
    for _ in range(6):
        opt.step(closure)
    other, again, resumed = start()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for _ in range(6):
        resumed.step(again)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert len(feedback(opt)) == 2
    assert all(torch.equal(a, b) for a, b in zip(feedback(opt), feedback(resumed), strict=True))


def test_a_failed_step_leaves_the_feedback_alone() -> None:
    net, closure = network()
    opt = optimizer(net)
    opt.step(closure)
    before = feedback(opt)
    kept = [b.clone() for b in before]
    with pytest.raises(ClosureError, match="finite"):
        opt.step(lambda: closure() * float("inf"))
    assert all(a is b and torch.equal(b, c) for a, b, c in zip(feedback(opt), before, kept, strict=True))


def test_no_tangents_between_forward_mode_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    import guessopt.step.modes as module

    net, closure = network()
    opt = optimizer(net, gamma=0.0, every=4)
    moved: list[bool] = []
    estimated = module.estimated_cotangents

    def spy(graph: Any, record: Any, formed: Any) -> Any:
        moved.append(any(t is not None for t in record.tangents) or bool(record.guesses))
        return estimated(graph, record, formed)

    monkeypatch.setattr(module, "estimated_cotangents", spy)
    kept = []
    for _ in range(8):
        opt.step(closure)
        kept.append(feedback(opt))
    assert moved == [True, False, False, False] * 2
    assert all(a is b for a, b in zip(kept[0], kept[3], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(kept[3], kept[4], strict=True))
    assert net[0].weight.grad is not None and bool(net[0].weight.grad.any())


@pytest.mark.parametrize(("n", "period"), [(16, 16), (4, 8), (1024, 16)])
def test_forward_mode_passes_as_often_as_samples_are_wanted(n: int, period: int) -> None:
    """``every="auto"``: 11 rows of ``B``, so that ``period * 11 / n`` is at most 32."""
    net, closure = network(n=n)
    opt = optimizer(net, gamma=0.0, every="auto")
    kept = []
    for _ in range(2 * period + 1):
        opt.step(closure)
        kept.append(feedback(opt))
    changed = [step for step in range(1, len(kept)) if kept[step][0] is not kept[step - 1][0]]
    assert changed == [period, 2 * period]


def test_the_last_site_takes_its_exact_error() -> None:
    net, closure = network()
    opt = optimizer(net, gamma=0.0)
    torch.testing.assert_close(estimated_gradient(opt, closure)["4.weight"], true_gradient(opt, closure)["4.weight"])


def test_a_bad_batch_does_no_harm() -> None:
    """Targets scaled by 1e4, then inputs: ``B`` stays of the size it had, and goes on learning."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))
    x, y = torch.randn(64, 8), torch.randn(64, 4)
    opt = GuessGradOptimizer(net.named_parameters(), torch.optim.AdamW, LearnedFeedback(gamma=0.0), lr=1e-3, seed=1)
    for _ in range(60):
        opt.step(lambda: F.mse_loss(net(x), y))
    before = [b.norm() for b in feedback(opt)]
    for scale_x, scale_y in ((1, 1e4), (1e4, 1), (1, 1e4)):
        opt.step(lambda: F.mse_loss(net(x * scale_x), y * scale_y))  # noqa: B023 (called at once)
    for b, old in zip(feedback(opt), before, strict=True):
        assert bool(b.isfinite().all()) and float(b.norm()) < 3 * float(old)
    for _ in range(60):
        opt.step(lambda: F.mse_loss(net(x), y))
    assert cosine(opt, lambda: F.mse_loss(net(x), y)).total > 0.8


PRODUCTS = ("AddmmBackward", "MmBackward", "ConvolutionBackward", "LinearBackward", "MkldnnLinearBackward")


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("name", ["mlp", "gelu mlp", "cnn", *STREAMS])
def test_no_reverse_graph_holds_two_matrix_sites(name: str, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is differentiated in reverse, no path of its graph passes two products with weights, but for those of
    one block of a residual stream."""
    depths: list[int] = []
    grad = torch.autograd.grad

    def depth(node: Any, known: dict[Any, int]) -> int:
        if node is None:
            return 0
        if node not in known:
            below = max((depth(child, known) for child, _ in node.next_functions), default=0)
            known[node] = below + any(product in node.name() for product in PRODUCTS)
        return known[node]

    def watched(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        for out in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            depths.append(depth(out.grad_fn, {}))
        return grad(outputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    made = build(name)
    opt = optimizer_of(made, gamma=1, every=2, ahead=ahead)
    for _ in range(4):
        opt.step(made.closure)
    stream = opt.estimation.plans[0].graph.chain
    assert (stream is not None) == (name in STREAMS)
    assert depths and max(depths) <= (1 if stream is None else max(block.matrices for block in stream.blocks))
    whole = depth(made.closure().grad_fn, {})
    assert stream is None or max(block.matrices for block in stream.blocks) < whole


def test_a_handful_of_examples() -> None:
    """Moments measured on so few that no two guesses overlap must not make a step without bound."""
    made = build("cnn")
    opt = GuessGradOptimizer(made.named, torch.optim.SGD, LearnedFeedback(gamma=1), lr=0.01, seed=1)
    for _ in range(20):
        opt.step(made.closure)
    assert all(float(b.norm()) < 100 for b in feedback(opt))


def test_learns_the_product_of_the_weights_of_a_linear_network() -> None:
    """There ``B_i^T`` is the product of the later weights for every example."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 5), nn.Linear(5, 3)).double()
    x = torch.randn(64, 5, dtype=torch.float64)
    opt = optimizer(net, lr=0.0, gamma=0.0, beta=0.1, leak=0.0)
    for _ in range(300):
        opt.step(lambda: net(x).square().mean())
    w2, w3 = net[1].weight.detach(), net[2].weight.detach()
    b1, b2 = feedback(opt)  # both predict the cotangent of the next layer's input
    torch.testing.assert_close(b1, (w3 @ w2).T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(b2, w3.T, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("engine", ["fast", "dual", "func"])
def test_engines_agree(engine: str) -> None:
    found = []
    for each in ("fast", engine):
        net, closure = network(nn.GELU)
        opt = GuessGradOptimizer(
            net.named_parameters(), torch.optim.SGD, LearnedFeedback(gamma=1, every=2), lr=0.05, seed=1, engine=each
        )
        for _ in range(4):
            opt.step(closure)
        found.append([p.detach() for p in net.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_activations_in_place() -> None:
    """What the closure overwrites after a site is kept as it was."""
    grads = []
    for in_place in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.SiLU(in_place), nn.Linear(6, 5), nn.SiLU(in_place), nn.Linear(5, 3))
        x = torch.randn(16, 4)
        opt = optimizer(net, gamma=0.0)
        for _ in range(3):
            opt.step(lambda: F.cross_entropy(net(x), torch.arange(16) % 3))  # noqa: B023 (called at once)
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_options_survive_a_round_trip() -> None:
    one = LearnedFeedback(guess={"name": "w_perp", "k": 3}, gamma="auto", every=4)
    assert make_estimator(describe(one)) == one and hash(make_estimator(describe(one))) == hash(one)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"guess": "directional_descent"}, "guess"),
        ({"guess": "learned_feedback"}, "guess"),
        ({"guess": {"name": "w_perp", "debias": True}}, "guess"),
        ({"gamma": 2}, "gamma"),
        ({"gamma": "some"}, "gamma"),
        ({"every": 0}, "every"),
        ({"every": "often"}, "every"),
        ({"beta": -1}, "beta"),
        ({"ahead": 2}, "ahead"),
        ({"start": "ones"}, "start"),
        ({"entries": 0}, "entries"),
        ({"structure": "dense"}, "structure"),
        ({"leak": 1}, "leak"),
        ({"clip": 0.5}, "clip"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        LearnedFeedback(**options)
