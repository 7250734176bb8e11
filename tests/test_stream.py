"""Learned feedback along residual streams: what the tracer finds, and the formulas of
docs/learned_feedback_derivation.md."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import GuessGradOptimizer, LearnedFeedback
from guessopt.diagnostics import cosine, estimated_gradient, true_gradient

from .problems import build, labels, learned
from .stream_networks import Residual, optimizer, shortcut_net, stack, stream_of

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
    draws = [estimated_gradient(opt, closure) for _ in range(300)]
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
def test_resumes_bit_for_bit(ahead: int) -> None:
    net, closure = stack(2)
    opt = optimizer(net.named_parameters(), every=2, ahead=ahead)
    for _ in range(3):
        opt.step(closure)
    saved = copy.deepcopy((net.state_dict(), opt.state_dict()))
    for _ in range(4):
        opt.step(closure)
    other, again = stack(2)
    resumed = optimizer(other.named_parameters(), every=2, ahead=ahead)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for _ in range(4):
        resumed.step(again)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


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
