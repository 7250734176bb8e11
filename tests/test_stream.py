"""Learned feedback along residual streams: what the tracer finds, and the formulas of docs/learned_feedback.md."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from guessopt import GuessGradOptimizer, GuessWarning, LearnedFeedback
from guessopt.chains import ResidualChain
from guessopt.diagnostics import cosine, estimated_gradient, true_gradient
from guessopt.memory_plan import cpu_peak

from .problems import build, labels, learned

Closure = Callable[[], Tensor]


class Residual(nn.Module):
    """``h + W2 phi(W1 h)``, with a rectifier after the addition if asked; ``apart``: the branch reads ``h`` without
    derivative."""

    def __init__(self, d: int, rectified: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.rectified = nn.Linear(d, 7), nn.Linear(7, d), rectified
        self.apart = False

    def forward(self, h: Tensor) -> Tensor:
        out = h + self.two(torch.tanh(self.one(h.detach() if self.apart else h)))
        return F.relu(out) if self.rectified else out


def stack(blocks: int, rectified: bool = False, n: int = 12) -> tuple[nn.Sequential, Closure]:
    torch.manual_seed(0)
    layers = [Residual(5, rectified) for _ in range(blocks)]
    net = nn.Sequential(nn.Linear(4, 5), *layers, nn.LayerNorm(5), nn.Linear(5, 3)).double()
    x = torch.randn(n, 4, dtype=torch.float64)
    return net, lambda: F.cross_entropy(net(x), labels(n, 3))


def optimizer(named: Any, lr: float = 0.05, **options: Any) -> GuessGradOptimizer:
    return GuessGradOptimizer(named, torch.optim.SGD, LearnedFeedback(**options), lr=lr, seed=1)


def stream_of(opt: GuessGradOptimizer, closure: Closure) -> ResidualChain | None:
    estimated_gradient(opt, closure)
    return opt.estimation.plans[0].graph.chain


def shortcut_net(projected: bool) -> tuple[nn.Module, Closure]:
    """Two stages; the shortcut between them strides and pads, or projects."""

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
            self.project = nn.Conv2d(2, 4, 1, stride=2) if projected else None

        def forward(self, x: Tensor) -> Tensor:
            skip = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)) if self.project is None else self.project(x)
            h = self.norm(self.conv(x))
            h += skip
            return F.relu(h, inplace=True)

    class Plain(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.norm(self.conv(x)), inplace=True)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Plain(2), Stage(), Plain(4), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(8, 1, 8, 8, dtype=torch.float64)
    net.double()
    return net, lambda: F.cross_entropy(net(x), labels(8, 3))


# --- what is found ----------------------------------------------------------------------------------------------------


def test_blocks_of_a_stack() -> None:
    net, closure = stack(3)
    stream = stream_of(optimizer(net.named_parameters()), closure)
    assert stream is not None
    assert [block.matrices for block in stream.blocks] == [0, 2, 2, 2, 1]  # the input layer opens, the head is last
    assert [block.skip for block in stream.blocks] == [None, (), (), (), None]
    assert [len(block.sites) for block in stream.blocks] == [1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("mlp", 0), ("cnn", 0), ("lstm", 0), ("transformer", 4), ("rotary language model", 4), ("prompts", 4)],
)
def test_networks(name: str, blocks: int) -> None:
    made = build(name)
    stream = stream_of(optimizer(made.named), made.closure)
    assert (len(stream.blocks) if stream is not None else 0) == blocks


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize("projected", [False, True])
def test_shortcuts(projected: bool) -> None:
    """A strided slice with padding carries the error on; a projection does not where no deeper way lies beside it."""
    net, closure = shortcut_net(projected)
    stream = stream_of(optimizer(net.named_parameters()), closure)
    assert stream is not None
    skips = [block.skip is not None for block in stream.blocks]
    assert skips == [False, True, not projected, True, False]


def test_adapters_in_a_frozen_model_begin_with_one_block() -> None:
    """The first adapter adds to what is not trained, which is no state: its own values would pass for states, and leave
    it to an error that nothing carries back."""
    net, closure = stack(3)
    net.requires_grad_(False)
    for layer in net[1:4]:
        layer.one = nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 7)).double()
    stream = stream_of(opt := optimizer(net.named_parameters(), gamma=0.0), closure)
    assert stream is not None
    assert [block.skip for block in stream.blocks] == [None, (), (), None]
    assert [len(block.sites) for block in stream.blocks] == [2, 2, 2, 0]
    assert cosine(opt, closure).per_site["1.one.0.weight"] > 0.9  # all but what the last block does to the second's


@pytest.mark.parametrize(("layers", "found"), [(6, True), (7, False)])
def test_a_block_that_is_a_network_is_none(layers: int, found: bool) -> None:
    """A skip around everything would leave backpropagation inside a single block."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(layers)))

        def forward(self, h: Tensor) -> Tensor:
            return h + self.body(h)

    net = nn.Sequential(nn.Linear(4, 5), Deep(), nn.Linear(5, 3))
    x = torch.randn(12, 4)
    opt = optimizer(net.named_parameters())
    assert (stream_of(opt, lambda: net(x).square().mean()) is not None) == found
    opt.step(lambda: net(x).square().mean())


def test_two_heads_of_one_layer_each() -> None:
    """Several cuts, one stream."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 5), Residual(5), Residual(5)).double()
    heads = nn.ModuleList([nn.Linear(5, 3), nn.Sequential(nn.Linear(5, 4), nn.Tanh())]).double()
    named = [*body.named_parameters("body"), *heads.named_parameters("heads")]
    x = torch.randn(12, 4, dtype=torch.float64)

    def two() -> Tensor:
        h = body(x)
        return F.cross_entropy(heads[0](h), labels(12, 3)) + heads[1](h).square().mean()

    opt = optimizer(named, gamma=0)
    stream = stream_of(opt, two)
    assert stream is not None and len(stream.blocks) == 4
    true, found = true_gradient(opt, two), estimated_gradient(opt, two)
    for name, g in true.items():
        if "body.0" not in name:
            torch.testing.assert_close(found[name], g, rtol=1e-9, atol=1e-12)


def test_a_head_of_two_layers() -> None:
    """Its first layer becomes a block without a skip; the stream goes on before it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), Residual(5), Residual(5), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(12, 4)
    stream = stream_of(optimizer(net.named_parameters()), lambda: F.cross_entropy(net(x), labels(12, 3)))
    assert stream is not None
    assert [(block.skip, block.matrices) for block in stream.blocks] == [
        (None, 0),
        ((), 2),
        ((), 2),
        (None, 1),
        (None, 1),
    ]


def test_it_can_be_refused() -> None:
    net, closure = stack(2)
    assert stream_of(optimizer(net.named_parameters(), residual=False), closure) is None


# --- what is estimated ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("ahead", [0, 1])
def test_the_formula(ahead: int, rectified: bool) -> None:
    """Every block's parameters from the predicted cotangent of its output, by torch's own autograd inside the block."""
    net, closure = stack(3, rectified)
    opt = optimizer(net.named_parameters(), gamma=0, beta=0, ahead=ahead)
    found = estimated_gradient(opt, closure)
    x = next(c.cell_contents for c in closure.__closure__ or () if isinstance(c.cell_contents, Tensor))
    h = [net[0](x)]
    inputs = []
    for block in list(net)[1:-2]:
        inputs.append(h[-1].detach().requires_grad_())
        h.append(block(inputs[-1]))
    last = h[-1].detach().requires_grad_()
    e = torch.autograd.grad(F.cross_entropy(net[-1](net[-2](last)), labels(12, 3)), last)[0]
    c = p = e
    for number in (3, 2, 1):
        block, start, out = net[number], inputs[number - 1], h[number]
        for name, g in zip(
            dict(block.named_parameters()),
            torch.autograd.grad(out, block.parameters(), c, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(found[f"{number}.{name}"], g, rtol=1e-9, atol=1e-12)
        mask = (out > 0).double() if rectified else 1.0
        if ahead:
            whole = torch.autograd.grad(out, start, p)[0]
            c, p = mask * (c - p) + whole, mask * p
        else:
            c = p = mask * p
    for name, g in zip(("0.weight", "0.bias"), torch.autograd.grad(h[0], net[0].parameters(), c), strict=True):
        torch.testing.assert_close(found[name], g, rtol=1e-9, atol=1e-12)


class Projected(nn.Module):
    """``P h + W2 tanh(W1 h)``; ``apart``: the branch reads ``h`` without derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.project = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(5, 6)
        self.apart = False

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.project(h) + self.two(torch.tanh(self.one(h.detach() if self.apart else h)))
        return out


class Between(nn.Module):
    """Three stretches without a layer, the middle one an addition."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(h * 2 + torch.ones(6, dtype=h.dtype))


@pytest.mark.parametrize("between", [False, True])
def test_a_projection_carries_the_error_on(between: bool) -> None:
    """The block before it gets the exact gradient of the network in which the branch beside it stops the derivative."""
    torch.manual_seed(0)
    more = [Between(), Residual(6)] if between else []
    net = nn.Sequential(nn.Linear(4, 5), Residual(5), Projected(), *more, nn.Linear(6, 3)).double()
    x = torch.randn(12, 4, dtype=torch.float64)

    def closure() -> Tensor:
        return F.cross_entropy(net(x), labels(12, 3))

    opt = optimizer(net.named_parameters(), gamma=0, beta=0, ahead=0)
    stream = stream_of(opt, closure)
    assert stream is not None
    assert [block.matrices for block in stream.blocks] == [0, 2, 2, *([2] if between else []), 1]
    ops = ["linear", "add", *(["mul", "add", "tanh"] if between else [])]
    assert [call.op for call in stream.blocks[2].skip or ()] == ops
    found, true = estimated_gradient(opt, closure), true_gradient(opt, closure)
    net[2].apart = net[-2].apart = True
    wanted = dict(zip(true, torch.autograd.grad(closure(), list(net.parameters())), strict=True))
    for name in (name for name in wanted if name[0] in "12345"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found["1.one.weight"], true["1.one.weight"])


def test_head_and_last_blocks_are_exact() -> None:
    """The head's norm takes the exact error; so does the last block; with ``ahead=1`` the block before it as well."""
    net, closure = stack(3)
    true = true_gradient(optimizer(net.named_parameters()), closure)
    for ahead, exact in ((0, (3, 4, 5)), (1, (2, 3, 4, 5))):
        found = estimated_gradient(optimizer(net.named_parameters(), gamma=0, ahead=ahead), closure)
        for name, g in true.items():
            close = torch.allclose(found[name], g, rtol=1e-9, atol=1e-12)
            assert close == (int(name[0]) in exact), (ahead, name)


def test_the_head_is_exact_whatever_exact_last_says() -> None:
    net, closure = stack(1)
    opt = GuessGradOptimizer(
        net.named_parameters(), torch.optim.SGD, LearnedFeedback(gamma=0), exact_last=False, lr=0.1, seed=1
    )
    true, found = true_gradient(opt, closure), estimated_gradient(opt, closure)
    torch.testing.assert_close(found["3.weight"], true["3.weight"], rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize("projected", [False, True])
def test_batch_statistics_and_writing_in_place(projected: bool) -> None:
    """The last block's estimate is exact although its batch norm couples the examples and its sum is overwritten."""
    net, closure = shortcut_net(projected)
    opt = optimizer(net.named_parameters(), gamma=0)
    true, found = true_gradient(opt, closure), estimated_gradient(opt, closure)
    for name, g in true.items():
        if int(name[0]) >= 2:  # one block later than the last: ``ahead=1``
            torch.testing.assert_close(found[name], g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ahead", [0, 1])
def test_unbiased_at_gamma_1(ahead: int) -> None:
    net, closure = stack(3)
    opt = optimizer(net.named_parameters(), gamma=1, ahead=ahead)
    for _ in range(5):
        opt.step(closure)
    true = true_gradient(opt, closure)
    draws = [estimated_gradient(opt, closure) for _ in range(150)]
    for name, g in true.items():
        each = torch.stack([(draw[name] * g).sum() / g.square().sum() for draw in draws])
        assert abs(float(each.mean()) - 1) <= 5 * float(each.std()) / len(each) ** 0.5 + 1e-9, name


@pytest.mark.parametrize(("ahead", "source", "steps"), [(0, "auto", 400), (1, "guesses", 400), (1, "weights", 6)])
def test_learns_the_deviation_of_a_linear_network(ahead: int, source: str, steps: int) -> None:
    """There every deviation is one matrix, and the predictions become exact; from weights, a block a step."""
    torch.manual_seed(0)

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(5, 5)

        def forward(self, h: Tensor) -> Tensor:
            return h + self.f(h)

    net = nn.Sequential(nn.Linear(4, 5), Linear(), Linear(), Linear(), nn.Linear(5, 3)).double()
    x = torch.randn(64, 4, dtype=torch.float64)

    def closure() -> Tensor:
        return net(x).square().mean()

    opt = optimizer(net.named_parameters(), lr=0.0, gamma=0, ahead=ahead, leak=0.0, source=source)
    before = cosine(opt, closure).per_site["0.weight"]
    for _ in range(steps):
        opt.step(closure)
    after = cosine(opt, closure).per_site["0.weight"]
    assert before < 0.95 and after > 0.98


def test_a_deviation_that_foresees_nothing_is_not_used() -> None:
    """Blocks that do nothing: the skips are exact, and what is learned from noise gets no weight."""
    net, closure = stack(3)
    for block in list(net)[1:-2]:
        nn.init.zeros_(block.two.weight)
    opt = optimizer(net.named_parameters(), lr=0.0, gamma=0, ahead=0)
    for _ in range(30):
        opt.step(closure)
    assert cosine(opt, closure).total > 0.999


def test_feedback_from_weights_is_a_least_squares_fit() -> None:
    """Of what the last block by itself makes of the exact error, to that error."""
    net, closure = stack(3, n=64)
    opt = optimizer(net.named_parameters(), lr=0.0, gamma=0, leak=0.0)
    for _ in range(3):
        opt.step(closure)
    x = closure.__closure__[-1].cell_contents  # type: ignore[index]
    start = net[:3](x).detach().requires_grad_()
    last = net[3](start)
    (e,) = torch.autograd.grad(F.cross_entropy(net[4:](last), labels(64, 3)), last)
    (wanted,) = torch.autograd.grad(last, start, e)
    wanted = wanted - e  # the skip is the identity
    # The one before the last block keeps them.
    (b,) = [state["B"] for state in learned(opt).values() if "errors" in state]
    best = e @ torch.linalg.lstsq(e, wanted).solution
    assert float((e @ b.T - best).norm() / best.norm()) < 0.05
    assert float((wanted - best).norm() / wanted.norm()) > 0.05  # one matrix for all examples does not say everything


def test_a_bad_batch_does_no_harm_to_feedback_from_weights() -> None:
    """Targets scaled by 1e4, then inputs, then examples that are all alike: the prediction stays as good as it was."""
    net, _ = stack(3)
    net.float()
    x, y = torch.randn(64, 4), torch.randn(64, 3)
    opt = GuessGradOptimizer(net.named_parameters(), torch.optim.AdamW, LearnedFeedback(gamma=0), lr=1e-3, seed=1)
    for _ in range(30):
        opt.step(lambda: F.mse_loss(net(x), y))
    before = cosine(opt, lambda: F.mse_loss(net(x), y)).total
    for a, b in ((x, y * 1e4), (x * 1e4, y), (x, y * 1e4), (x[:1].expand(64, 4), y[:1].expand(64, 3))):
        opt.step(lambda: F.mse_loss(net(a), b))  # noqa: B023 (called at once)
    for _ in range(30):
        opt.step(lambda: F.mse_loss(net(x), y))
    assert cosine(opt, lambda: F.mse_loss(net(x), y)).total > min(before, 0.95) - 0.05


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("engine", ["dual", "func"])
def test_engines_agree(engine: str, ahead: int) -> None:
    found = []
    for each in ("fast", engine):
        net, closure = stack(3, rectified=True)
        estimator = LearnedFeedback(gamma=1, ahead=ahead)
        opt = GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, estimator, lr=0.05, seed=1, engine=each)
        for _ in range(4):
            opt.step(closure)
        found.append([p.detach() for p in net.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("options", "tangents"), [({"beta": 0}, False), ({}, False), ({"source": "guesses"}, True)])
def test_no_tangents_where_nothing_is_corrected_or_learned_from_them(
    options: dict[str, Any], tangents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import guessopt.step.modes as module

    net, closure = stack(2)
    opt = optimizer(net.named_parameters(), gamma=0, **options)
    guesses: list[bool] = []
    estimated = module.estimated_cotangents

    def spy(graph: Any, record: Any, formed: Any) -> Any:
        guesses.append(bool(record.states))
        return estimated(graph, record, formed)

    monkeypatch.setattr(module, "estimated_cotangents", spy)
    for _ in range(3):
        opt.step(closure)
    assert guesses == [tangents] * 3


@pytest.mark.parametrize(("memory", "every", "states"), [("store", 10**6, 2.4), ("replay", 10**6, 1), ("replay", 1, 2)])
def test_memory_grows_by_what_blocks_compute_or_by_states_alone(memory: str, every: int, states: float) -> None:
    """``"store"``: of each block what its graph saves, the state and the tanh (1.4 times the state), as backprop does;
    ``"replay"`` the state and, with guesses, its tangent: no layer's input or output, guess or cotangent."""
    peaks, n = [], 4096
    for blocks in (4, 12):
        net, closure = stack(blocks, n=n)
        opt = optimizer(net.named_parameters(), gamma=0, every=every, source="guesses")
        opt.memory = memory
        for _ in range(9):  # past the probes
            opt.step(closure)
        peaks.append(cpu_peak(lambda opt=opt, closure=closure: opt.step(closure))[1])
    state = n * 5 * 8
    assert (peaks[1] - peaks[0]) / 8 == pytest.approx(states * state, rel=0.1)


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize("options", [{}, {"source": "guesses", "every": 2}, {"gamma": 1, "every": 2}], ids=str)
@pytest.mark.parametrize("model", ["rectified", "in place", "projected", "drawing"])
def test_replay_makes_the_updates_of_store(model: str, options: dict[str, Any]) -> None:
    """Whether a block's graph was kept or made once more; parameters, ``B`` and buffers."""
    ends = []
    for memory in ("store", "replay"):
        if model == "rectified":
            net, closure = stack(4, rectified=True)
            named = list(net.named_parameters())
        elif model == "drawing":
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(4, 5), *(Awkward("drawing") for _ in range(3)), nn.Linear(5, 3)).double()
            x = torch.randn(12, 4, dtype=torch.float64)
            named, closure = list(net.named_parameters()), lambda net=net, x=x: F.cross_entropy(net(x), labels(12, 3))
        else:
            net, closure = shortcut_net(model == "projected")
            named = list(net.named_parameters())
        opt = optimizer(named, **{"gamma": 0, **options})
        opt.memory = memory
        losses = [opt.step(closure).item() for _ in range(6)]
        ends.append((losses, [p.detach().clone() for _, p in named], [state["B"] for state in learned(opt).values()]))
    (losses, params, feedback), other = ends
    assert losses[-1] < losses[0] and feedback
    torch.testing.assert_close(losses, other[0], rtol=1e-9, atol=1e-12)
    for a, b in zip(params + feedback, other[1] + other[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


class Awkward(nn.Module):
    """``h + W2 tanh(W1 h)``, in ways that a kept graph has to get right."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.one, self.two, self.way = nn.Linear(5, 7), nn.Linear(7, 5), way
        self.scale = nn.Parameter(torch.ones(5))
        if way == "weight norm":
            self.one = nn.utils.parametrizations.weight_norm(self.one)
        if way == "frozen":
            self.requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        if self.way == "rectified in place":
            F.relu_(h)
        read = h.to(h.dtype) if self.way == "same tensor" else h
        out: Tensor = self.two(torch.tanh(self.one(read))) * self.scale
        if self.way == "drawing":
            out = F.dropout(out, 0.2) * (torch.rand(len(h), 1, dtype=h.dtype) < 0.7)
            return F.dropout(h, 0.1) + F.dropout(out, 0.3, True, True)
        if self.way == "sum in place":
            out += h
            return F.relu_(out)
        if self.way == "state in place":
            h += out
            return h
        if self.way == "views":
            return (h.view(-1, 1, 5) + out.view(-1, 1, 5)).reshape(-1, 5)
        if self.way == "checkpoint":
            return h + checkpoint(lambda t: self.two(torch.tanh(self.one(t))) * self.scale, h, use_reentrant=False)
        return h + out


#: Torch's own backward refuses them.
SPOILED = ("state in place",)
AWKWARD = (
    "drawing",
    "same tensor",
    "rectified in place",
    "sum in place",
    "state in place",
    "views",
    "weight norm",
    "frozen",
    "shared",
    "checkpoint",
)


@pytest.mark.filterwarnings("ignore:torch.compile")
@pytest.mark.parametrize("options", [{}, {"gamma": 1, "every": 2}], ids=str)
@pytest.mark.parametrize("way", AWKWARD)
def test_kept_graphs_of_awkward_blocks(way: str, options: dict[str, Any]) -> None:
    """The updates of an engine that keeps none. A network that writes into what its own backward reads is told so, and
    trains all the same."""
    ends = []
    for engine in ("dual", "fast"):
        torch.manual_seed(0)
        blocks = [Awkward("plain" if way == "frozen" and k in (0, 3) else way) for k in range(4)]
        blocks = blocks[:1] * 4 if way == "shared" else blocks
        net = nn.Sequential(nn.Linear(4, 5), *blocks, nn.Linear(5, 3)).double()
        x = torch.randn(12, 4, dtype=torch.float64)
        torch.manual_seed(1)
        named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
        opt = GuessGradOptimizer(
            named, torch.optim.SGD, LearnedFeedback(**{"gamma": 0, **options}), lr=0.05, seed=1, engine=engine
        )
        spoiled = engine == "fast" and way in SPOILED
        with pytest.warns(GuessWarning, match="writes into memory") if spoiled else nullcontext():
            for _ in range(5):
                opt.step(lambda net=net, x=x: F.cross_entropy(net(x), labels(12, 3)))
        assert opt.estimation.plans[0].graph.chain is not None
        ends.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_kept_graph_passes_dropout_as_it_was_drawn() -> None:
    """The last two blocks' gradients are exact."""
    net, closure = stack(2)
    for block in (net[1], net[2]):
        block.two = nn.Sequential(nn.Dropout(0.5), block.two)
    opt = optimizer(net.named_parameters(), gamma=0)
    true, found = true_gradient(opt, closure), estimated_gradient(opt, closure)
    for name in (name for name in true if name[0] != "0"):
        torch.testing.assert_close(found[name], true[name], rtol=1e-9, atol=1e-12)


def test_autocast() -> None:
    """States are bfloat16 there, weights float32; the last block's estimate is that of autograd, up to rounding."""
    net, _ = stack(2)
    net.float()
    x = torch.randn(12, 4)

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(net(x).float(), labels(12, 3))

    opt = optimizer(net.named_parameters(), gamma=0, every=2)
    found = cosine(opt, closure)
    assert opt.estimation.plans[0].graph.chain is not None
    assert found.per_parameter["2.one.weight"] > 0.99
    opt.step(closure)


@pytest.mark.parametrize("source", ["weights", "guesses"])
def test_autocast_around_the_step(source: str) -> None:
    """As inside the closure: what is learned stays float32."""
    ends = []
    for around in (False, True):
        net, _ = stack(3)
        net.float()
        x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
        opt = optimizer(net.named_parameters(), gamma=0, source=source)
        low = torch.autocast("cpu", dtype=torch.bfloat16)
        inside, outside = (nullcontext(), low) if around else (low, nullcontext())

        def closure() -> Tensor:
            with inside:  # noqa: B023 (called at once)
                return F.cross_entropy(net(x).float(), labels(12, 3))  # noqa: B023

        for _ in range(4):
            with outside:
                opt.step(closure)
        assert all(state["B"].dtype == torch.float32 for state in learned(opt).values())
        ends.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class Queries(nn.Module):
    """Attention of learned queries to given keys and learned values, grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(4, 8), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in (x, self.v(x)))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("every", [1, 2])
def test_attention_on_a_skip(every: int) -> None:
    """Where keys are constant the queries are a state, and attention, whose fused kernels have no second derivative, is
    the way to the next one."""
    torch.manual_seed(0)
    net = nn.Sequential(Queries(), *(Residual(8) for _ in range(3)), nn.Linear(8, 3))
    x, y = torch.randn(6, 5, 4), labels(6, 3)
    opt = optimizer(net.named_parameters(), gamma=0, every=every, source="guesses")

    def closure() -> Tensor:
        return F.cross_entropy(net(x).mean(1), y)

    stream = stream_of(opt, closure)
    assert stream is not None and any(
        F.scaled_dot_product_attention in [c.fn for c in b.skip or ()] for b in stream.blocks
    )
    opt.zero_grad()
    losses = [float(opt.step(closure)) for _ in range(60)]
    assert losses[-1] < losses[0] and cosine(opt, closure).total > 0.9
