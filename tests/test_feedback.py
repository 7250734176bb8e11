"""LearnedFeedback against a reference written by hand, and what it promises: unbiased at gamma 1, no tangents between
its forward-mode passes, resumed bit for bit, no reverse graph through two layers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import ClosureError, Downstream, GuessGradOptimizer, LearnedFeedback, preflight
from guessopt.diagnostics import cosine, estimated_gradient, expected_gradient, true_gradient
from guessopt.estimators import describe, make_estimator
from guessopt.feedback.maps import FeedbackMap, Form, Output
from guessopt.layout import Layout

from .problems import Problem, build, learned

Closure = Callable[[], Tensor]


def network(activation: type[nn.Module] = nn.ReLU, n: int = 16) -> tuple[nn.Sequential, Closure]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 3)).double()
    x = torch.randn(n, 4, dtype=torch.float64)
    return net, lambda: F.cross_entropy(net(x), torch.arange(n) % 3)


def optimizer(net: nn.Module, lr: float = 0.05, **options: Any) -> GuessGradOptimizer:
    return GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, LearnedFeedback(**options), lr=lr, seed=1)


def optimizer_of(made: Problem, **options: Any) -> GuessGradOptimizer:
    return GuessGradOptimizer(made.named, torch.optim.SGD, LearnedFeedback(**options), lr=0.01, seed=1)


#: Networks with a residual stream.
STREAMS = ("residual, batch norm in eval mode", "transformer", "prompts", "rotary language model")


def feedback(opt: GuessGradOptimizer) -> list[Tensor]:
    """The ``B`` of every hidden site, in order; there is one."""
    found = [state["B"] for state in learned(opt).values()]
    assert found
    return found


class Reference:
    """Learned feedback on an MLP of three linear layers with ReLU, line by line from docs/learned_feedback.md."""

    def __init__(self, net: nn.Sequential, gamma: float, beta: float, leak: float, ahead: int) -> None:
        self.net, self.gamma, self.beta, self.leak, self.ahead = net, gamma, beta, leak, ahead
        self.b = [torch.zeros(6, 3).double(), torch.zeros(5, 3).double()]
        self.power, self.pairs, self.amplitude, self.steps = [0.0, 0.0], [0.0, 0.0], [1.0, 1.0], 0

    def cotangents(self, x: Tensor, labels: Tensor, ys: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Of the two hidden layers, from guesses at their amplitudes; also the masks, and what was not foreseen."""
        with torch.no_grad():
            n, b, a = len(x), self.b, self.amplitude
            s1 = self.net[0](x)
            s2 = self.net[2](s1.relu())
            s3 = self.net[4](s2.relu())
            m1, m2 = (s1 > 0).double(), (s2 > 0).double()
            w2, w3 = self.net[2].weight, self.net[4].weight
            v = ((ys[0] * m1) @ w2.T + ys[1]) * m2 @ w3.T
            e = (s3.softmax(1) - F.one_hot(labels, 3)) / n
            d = v - (ys[0] * m1) @ b[0] - (ys[1] * m2) @ b[1]
            c = [m1 * (e @ b[0].T), m2 * (e @ b[1].T)]
            if self.ahead:
                c = [m1 * (c[1] @ w2), m2 * (e @ w3)]
            rest = (e * v).sum(1, keepdim=True) - sum((c[i] * ys[i]).sum(1, keepdim=True) for i in range(2))
            return [c[i] + self.gamma * rest * ys[i] / a[i] ** 2 for i in range(2)], [m1, m2], d

    def step(self, x: Tensor, labels: Tensor, ys: list[Tensor]) -> list[Tensor]:
        """The cotangents; learns."""
        g, (m1, m2), d = self.cotangents(x, labels, ys)
        with torch.no_grad():
            n, b, a = len(x), self.b, self.amplitude
            self.steps += 1
            share = max(0.02, 1 / self.steps)
            r = [ys[0] * m1 / a[0], ys[1] * m2 / a[1]]
            for i in range(2):
                self.power[i] += share * (float(r[i].square().sum(1).mean()) - self.power[i])
                pairs = (r[i] * torch.cat([r[i][-1:], r[i][:-1]])).sum(1).square().mean()
                self.pairs[i] += share * (float(pairs) - self.pairs[i])
            width = [max(self.pairs[i] / self.power[i], self.power[i] / (6, 5)[i]) for i in range(2)]
            shared_gain = 1 + sum(self.power[i] / width[i] for i in range(2)) / n
            gain = [max(self.beta, 1 / (self.steps + 1)) / (width[i] * shared_gain) for i in range(2)]
            self.b = [(1 - self.leak) * b[i] + gain[i] * r[i].T @ d / (n * a[i]) for i in range(2)]
            reach = [float(self.b[i].norm()) * width[i] ** 0.5 for i in range(2)]
            self.amplitude = [max(reach) / reach[i] for i in range(2)]
            return g


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0])
def test_the_formula(gamma: float, ahead: int) -> None:
    net, closure = network()
    opt = optimizer(net, gamma=gamma, beta=0.3, leak=0.01, clip=1e9, ahead=ahead, start="zero")
    reference = Reference(copy.deepcopy(net), gamma, 0.3, 0.01, ahead)
    noise: list[Tensor] = []
    sample = LearnedFeedback.sample

    def recording(self: LearnedFeedback, state: Any, local: Any) -> Tensor:
        y = sample(self, state, local)
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


def inputs(closure: Closure) -> Tensor:
    return next(c.cell_contents for c in closure.__closure__ or () if isinstance(c.cell_contents, Tensor))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.SiLU])
def test_unbiased_at_gamma_1(activation: type[nn.Module]) -> None:
    """With a ``B`` that has learned something: the mean estimate along the true gradient, within 5 standard errors."""
    net, closure = network(activation)
    opt = optimizer(net, gamma=1)
    for _ in range(5):
        opt.step(closure)
    assert all(bool(b.any()) for b in feedback(opt))
    true, expected = true_gradient(opt, closure), expected_gradient(opt, closure)
    draws = [estimated_gradient(opt, closure) for _ in range(400)]
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


@pytest.mark.parametrize("engine", ["dual", "func"])
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


@pytest.mark.parametrize("structure", ["auto", "position", "shared"])
@pytest.mark.parametrize("entries", [None, 20])
@pytest.mark.parametrize(
    ("shape", "maps", "positions"),
    [((5, 3, 6, 7), True, 1), ((5, 6, 4), False, 6), ((5, 4), False, 3), ((5, 9), False, 1)],
)
def test_what_b_predicts_is_what_it_foresees(
    shape: tuple[int, ...], maps: bool, positions: int, structure: str, entries: int | None
) -> None:
    """``<B e, t> = <e, B^T t>``, whatever the positions share and the output's mixtures leave out."""
    output = Output([(0, Layout.BATCH_FIRST, (5, positions, 4))], 5)
    place = FeedbackMap(Layout.BATCH_FIRST, shape, maps, output, Form(structure, entries))
    assert entries is None or place.b_shape[0] * place.b_shape[1] <= max(entries, place.b_shape[0])
    b, e, t = torch.randn(place.b_shape), torch.randn(5, positions, 4), torch.randn(shape)
    r = place.observe(t)
    torch.testing.assert_close((place.predict(e, b) * t).sum(), (e * place.foreseen(r, b)).sum())
    d = torch.randn(5, positions, 4)  # and the step of B is the gradient of how well it foresees
    b.requires_grad_()
    (slope,) = torch.autograd.grad((place.foreseen(r, b).expand_as(d) * d).sum(), b)
    scale = 1 if place.matched else positions
    torch.testing.assert_close(place.outer(r, d) * scale, slope)


def test_cells_of_a_feature_map() -> None:
    output = Output([(0, Layout.BATCH_FIRST, (5, 10))], 5)
    shapes = {
        structure: FeedbackMap(Layout.BATCH_FIRST, (5, 3, 8, 6), True, output, Form(structure, None)).b_shape
        for structure in ("auto", "position", "shared")
    }
    assert shapes == {"auto": (4 * 4 * 3, 10), "position": (48 * 3, 10), "shared": (3, 10)}


def test_the_mean_of_a_cell() -> None:
    """What ``B e`` puts at every position of a cell is that cell's mean, however large the cell is."""
    output = Output([(0, Layout.BATCH_FIRST, (5, 10))], 5)
    for structure, shape in (("auto", (5, 3, 7, 6)), ("shared", (5, 3, 7, 6)), ("position", (5, 3, 3, 2))):
        place = FeedbackMap(Layout.BATCH_FIRST, shape, True, output, Form(structure, None))
        b, e = torch.randn(place.b_shape), torch.randn(5, 1, 10)
        torch.testing.assert_close(place.mean(place.predict(e, b))[:, 0], e[:, 0] @ b.T)


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


def convolutions(n: int = 8) -> tuple[nn.Sequential, Closure]:
    """One way to the next matrix site is elementwise, one holds pooling."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 3),
    ).double()  # fmt: skip
    x = torch.randn(n, 1, 7, 7, dtype=torch.float64)
    return net, lambda: F.cross_entropy(net(x), torch.arange(n) % 3)


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
    wide = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 129)).double()
    opt = optimizer(wide, source="weights")
    with pytest.raises(ValueError, match="source: 'weights' needs weights"):
        opt.step(lambda: wide(torch.randn(16, 4).double()).square().mean())
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
