"""Which torch functions draw random numbers; and that calls which are run once more draw what the pass drew."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from guessopt import GuessGradOptimizer, LearnedFeedback
from guessopt.ops.base import OPS
from guessopt.rng import RandomState, draws, replayed

from .problems import labels

# --- which functions draw ---------------------------------------------------------------------------------------------

SPACES: tuple[Any, ...] = (torch, Tensor, F, torch._VF)


def _tagged() -> list[str]:
    """Names of torch's own operations that carry the tag of those which draw."""
    found = set()
    for name in torch._C._dispatch_get_all_op_names():
        space, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        if space == "aten":
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            if torch.Tag.nondeterministic_seeded in op.tags:
                found.add(packet)
    return sorted(found)


def test_every_spelling_of_what_torch_tags_is_known() -> None:
    names = _tagged()
    found = [getattr(space, name, None) for space in SPACES for name in names]
    spelled = [fn for fn in found if callable(fn)]
    assert len(spelled) > 60
    assert [fn for fn in spelled if not draws(fn)] == []
    assert all(draws(getattr(torch.ops.aten, name)) for name in names)


X = torch.full((4, 4), 0.5)
SPD = torch.eye(2)

CALLS: dict[str, Callable[[], Any]] = {
    "rand": lambda: torch.rand(2),
    "randn_like": lambda: torch.randn_like(X),
    "randint": lambda: torch.randint(5, (3,)),
    "randint_like": lambda: torch.randint_like(X, 5),
    "randperm": lambda: torch.randperm(5),
    "normal of numbers": lambda: torch.normal(0.0, 1.0, (3,)),
    "normal of tensors": lambda: torch.normal(X, X),
    "poisson": lambda: torch.poisson(X),
    "binomial": lambda: torch.binomial(X * 10, X),
    "bernoulli": lambda: torch.bernoulli(X),
    "bernoulli_": lambda: X.clone().bernoulli_(0.5),
    "random_": lambda: X.clone().random_(),
    "cauchy_": lambda: X.clone().cauchy_(),
    "multinomial": lambda: torch.multinomial(X, 2),
    "an overload": lambda: torch.ops.aten.bernoulli.p(X, 0.5),
    "a packet": lambda: torch.ops.aten.rand_like(X),
    "dropout": lambda: F.dropout(X),
    "dropout2d": lambda: F.dropout2d(X[None, None]),
    "alpha_dropout": lambda: F.alpha_dropout(X, training=True),
    "feature_dropout": lambda: torch.feature_dropout(X, 0.5, True),
    "feature_alpha_dropout": lambda: F.feature_alpha_dropout(X, training=True),
    "rrelu": lambda: F.rrelu(-X, training=True),
    "gumbel_softmax": lambda: F.gumbel_softmax(X),
    "fractional_max_pool2d": lambda: F.fractional_max_pool2d(X[None, None], 2, output_size=2),
    "attention with dropout": lambda: F.scaled_dot_product_attention(X[None], X[None], X[None], dropout_p=0.5),
    "lstm with dropout": lambda: nn.LSTM(4, 3, 2, dropout=0.5)(X[None]),
    "svd_lowrank": lambda: torch.svd_lowrank(X, 2),
    "initialisation": lambda: nn.init.trunc_normal_(X.clone()),
    "Normal.rsample": lambda: torch.distributions.Normal(X, X).rsample(),
    "Gamma.rsample": lambda: torch.distributions.Gamma(X, X).rsample(),
    "Beta.rsample": lambda: torch.distributions.Beta(X, X).rsample(),
    "Dirichlet.rsample": lambda: torch.distributions.Dirichlet(X).rsample(),
    "MultivariateNormal.rsample": lambda: torch.distributions.MultivariateNormal(X[0, :2], SPD).rsample(),
    "Poisson.sample": lambda: torch.distributions.Poisson(X).sample(),
    "RelaxedBernoulli.rsample": lambda: torch.distributions.RelaxedBernoulli(X, X).rsample(),
    "VonMises.sample": lambda: torch.distributions.VonMises(X, X).sample(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_moves_the_generator_is_known(name: str) -> None:
    moved: list[Any] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            before = torch.get_rng_state()
            out = fn(*args, **(kwargs or {}))
            if not torch.equal(before, torch.get_rng_state()):
                moved.append(fn)
            return out

    torch.manual_seed(0)
    with Watch():
        CALLS[name]()
    assert moved
    assert all(draws(fn) for fn in moved)


@pytest.mark.parametrize(
    "fn",
    [torch.relu, F.gelu, F.linear, F.layer_norm, F.cross_entropy, F.conv2d, torch.softmax, Tensor.__rand__,
     Tensor.view, F.max_pool2d, Tensor.requires_grad.__get__, F.normalize, F.poisson_nll_loss,
     torch.ops.aten.addmm.default],
    ids=lambda fn: getattr(fn, "__qualname__", None) or str(fn),
)  # fmt: skip
def test_what_draws_nothing_is_known_as_well(fn: Any) -> None:
    assert not draws(fn)


def test_of_what_torch_knows_nothing_the_answer_is_yes() -> None:
    assert draws(lambda x: x)


def test_a_generator_of_the_users_is_put_back_too() -> None:
    generator = torch.Generator().manual_seed(0)
    state = RandomState.before((), {"generator": generator})
    first = torch.rand(3, generator=generator)
    then = generator.get_state()
    with replayed(state):
        assert torch.equal(torch.rand(3, generator=generator), first)
    assert torch.equal(generator.get_state(), then)


# --- learned feedback runs calls once more ----------------------------------------------------------------------------


def _linear(*sizes: int) -> nn.Linear:
    return nn.Linear(*sizes, dtype=torch.float64)


def _rms(h: Tensor) -> Tensor:
    return h / (h.square().mean(-1, keepdim=True) + 1).sqrt()


class Coin(torch.autograd.Function):
    """Straight through a random mask."""

    @staticmethod
    def forward(h: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.bernoulli(torch.full_like(h, 0.5))
        return h * mask, mask

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Tensor:
        return g * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx: Any, dh: Tensor) -> tuple[Tensor, None]:
        return dh * ctx.saved_tensors[0], None


#: What lies between a layer and the head; each draws numbers of its own.
NOISE: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout, elementwise": lambda h: F.dropout(torch.relu(h)),
    "dropout before the activation": lambda h: F.gelu(F.dropout(h)),
    "dropout among other operations": lambda h: F.dropout(_rms(h)),
    "alpha dropout": lambda h: F.alpha_dropout(F.selu(h), training=True),
    "gaussian, its size from the network": lambda h: h + torch.randn_like(h) * torch.sigmoid(h),
    "torch.normal": lambda h: h + torch.normal(0.0, 1.0, h.shape).double() * torch.sigmoid(h),
    "normal_ in place": lambda h: h * (1 + torch.empty_like(h).normal_()),
    "rsample": lambda h: torch.distributions.Normal(h, F.softplus(h)).rsample(),
    "a mask by bernoulli": lambda h: torch.tanh(h) * torch.bernoulli(torch.full_like(h, 0.5)),
    "drop path": lambda h: h + torch.tanh(h) * h.new_empty(len(h), 1).bernoulli_(0.5) / 0.5,
    "gumbel": lambda h: F.gumbel_softmax(h),
    "randomised rectifier": lambda h: F.rrelu(h, training=True),
    "a function of the user's": lambda h: torch.tanh(Coin.apply(h)[0]),
}


def _update(net: nn.Module, closure: Callable[[], Tensor], memory: str, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """By parameter, what a step has subtracted, and autograd's gradient from the same random state."""
    params = list(net.parameters())
    torch.manual_seed(5)
    true = torch.autograd.grad(closure(), params)
    before = [p.detach().clone() for p in params]
    feedback = LearnedFeedback(gamma=0, **options)
    opt = GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, feedback, lr=1.0, seed=1, memory=memory)
    torch.manual_seed(5)
    opt.step(closure)
    return [(old - p.detach(), g) for old, p, g in zip(before, params, true, strict=True)]


@pytest.mark.parametrize("memory", ["store", "replay", "stream"])
@pytest.mark.parametrize("name", NOISE)
def test_the_layer_before_the_head_gets_the_gradient_of_what_was_drawn(name: str, memory: str) -> None:
    """Its prediction is the exact error through the head and back along the very noise that the pass has drawn."""
    torch.manual_seed(0)
    net, noise = nn.ModuleList([_linear(4, 8), _linear(8, 3)]), NOISE[name]
    x = torch.randn(6, 4, dtype=torch.float64)
    found = _update(net, lambda: F.cross_entropy(net[1](noise(net[0](x))), labels(6, 3)), memory, residual=False)
    for step, gradient in found:
        torch.testing.assert_close(step, gradient)


@pytest.mark.parametrize("memory", ["store", "replay"])
@pytest.mark.parametrize("name", ["dropout", "gaussian", "drop path", "torch.normal", "attention"])
def test_the_last_block_of_a_stream_gets_the_gradient_of_what_was_drawn(name: str, memory: str) -> None:
    branches: dict[str, Callable[[Tensor], Tensor]] = {
        "dropout": lambda h: F.dropout(torch.tanh(h)),
        "gaussian": lambda h: h + torch.randn_like(h) * torch.sigmoid(h),
        "drop path": lambda h: torch.tanh(h) * h.new_empty(len(h), *(1,) * (h.dim() - 1)).bernoulli_(0.5) / 0.5,
        "torch.normal": lambda h: h * torch.normal(1.0, 1.0, h.shape).double(),
        "attention": lambda h: F.scaled_dot_product_attention(h, h, h, dropout_p=0.5),
    }

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = _linear(4, 6), _linear(6, 4)

        def forward(self, h: Tensor) -> Tensor:
            return h + self.two(branches[name](self.one(h)))

    torch.manual_seed(0)
    net = nn.Sequential(_linear(4, 4), Block(), Block(), _linear(4, 3))
    x = torch.randn(6, 5, 4, dtype=torch.float64)
    found = _update(net, lambda: F.cross_entropy(net(x).mean(1), labels(6, 3)), memory)
    for step, gradient in found[-6:]:  # the last block and the head
        torch.testing.assert_close(step, gradient)


@pytest.mark.parametrize("name", ["dropout, elementwise", "dropout among other operations", "torch.normal"])
def test_memory_modes_learn_the_same_from_noise(name: str) -> None:
    """Each mode draws the same in all its passes, when feedback begins, when it learns and when it serves."""
    found = []
    for memory in ("store", "replay", "stream"):
        torch.manual_seed(0)
        net = nn.Sequential(_linear(4, 8), _linear(8, 7), _linear(7, 3))
        x, noise = torch.randn(6, 4, dtype=torch.float64), NOISE[name]

        def closure(net: nn.Sequential = net, x: Tensor = x, noise: Callable[[Tensor], Tensor] = noise) -> Tensor:
            return F.cross_entropy(net[2](noise(net[1](noise(net[0](x))))), labels(6, 3))

        feedback = LearnedFeedback(residual=False, source="guesses")
        opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, feedback, lr=0.1, seed=1, memory=memory)
        for _ in range(4):
            opt.step(closure)
        found.append((torch.cat([p.detach().flatten() for p in net.parameters()]), torch.get_rng_state()))
    for params, random in found[1:]:
        torch.testing.assert_close(params, found[0][0])
        assert torch.equal(random, found[0][1])


# --- torch.func draws what a plain pass draws -------------------------------------------------------------------------

DROPOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda h: F.dropout(h, 0.5),
    "torch.dropout": lambda h: torch.dropout(h, 0.5, True),
    "in place": lambda h: F.dropout(h, 0.5, inplace=True),
    "in place, the old name read": lambda h: (F.dropout(h, 0.5, inplace=True), h)[1],
    "alpha_dropout": lambda h: F.alpha_dropout(h, 0.5, training=True),
    "torch.dropout_": lambda h: torch.dropout_(h * 1, 0.5, True),
    "torch.alpha_dropout": lambda h: torch.alpha_dropout(h, 0.5, True),
    "dropout2d": lambda h: F.dropout2d(h[None], 0.5)[0],
}


def test_every_dropout_that_masks_by_shape_has_a_row() -> None:
    seen: set[Any] = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(fn)
            return fn(*args, **(kwargs or {}))

    with Watch():
        for dropout in DROPOUTS.values():
            dropout(torch.ones(2, 2, 2))
    assert {fn for fn, op in OPS.items() if op.masks_by_shape} <= seen


ORDERS = {"transposed": (1, 0, 2), "reversed": (2, 1, 0), "positions first": (1, 2, 0)}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("name", DROPOUTS)
def test_the_reference_engine_draws_the_masks_of_a_plain_pass(name: str, order: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 6)
    x = torch.randn(3, 5, 4)

    def closure() -> Tensor:
        return DROPOUTS[name](net(x).permute(order)).square().sum()

    torch.manual_seed(1)
    expected = closure()
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, "directional_descent", engine="func", lr=0.0)
    torch.manual_seed(1)
    torch.testing.assert_close(opt.step(closure), expected)
