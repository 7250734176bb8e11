"""Position credit: where the positions lie, which sites are causal, and what the estimate then expects."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import GuessGradOptimizer, LearnedFeedback, WPerp, preflight
from guessopt.credit import DiscountChoice, discounted
from guessopt.diagnostics import estimated_gradient, expected_gradient, true_gradient
from guessopt.engine.positions import joined
from guessopt.graph import Positions
from guessopt.layout import Layout
from guessopt.sites import Influence

from .problems import Problem
from .test_exactness import Summing

pytestmark = pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")

N, T, C, V = 3, 4, 2, 5


class Block(nn.Module):
    """Attention and an MLP on a residual stream, ``[N, T, C]``. ``own``: keys and values of other positions are
    detached, so that no derivative crosses positions."""

    def __init__(self, width: int = C, causal: bool = True, own: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.mlp = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, width)
        self.causal, self.own = causal, own

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.own:
            x = x + self.out(_own_attention(q, k, v))
        else:
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal))
        return x + torch.tanh(self.mlp(x))


def _own_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention. Each position reads the keys and values of the others as constants."""
    eye, t = torch.eye(q.shape[1], dtype=q.dtype), q.shape[1]
    scores = q @ k.detach().mT * (1 - eye) + (q * k).sum(-1, keepdim=True) * eye
    scores = scores / q.shape[-1] ** 0.5
    p = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf).softmax(-1)
    return (p * (1 - eye)) @ v.detach() + p.diagonal(dim1=1, dim2=2)[..., None] * v


class Mixing(nn.Module):
    """A residual block whose input is mixed across positions by ``mix``."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.mix = nn.Linear(C, C), mix

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(self.mix(x)))


def masked(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


class LanguageModel(nn.Module):
    def __init__(self, *blocks: nn.Module, width: int = C, vocabulary: int = V, length: int = T) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(width, vocabulary)

    def features(self, ids: Tensor) -> Tensor:
        x: Tensor = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        result: Tensor = self.blocks(x)
        return result

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(ids))
        return logits


def language_model(*blocks: nn.Module, **sizes: int) -> tuple[LanguageModel, Tensor, Tensor]:
    shape = sizes.pop("batch", N), sizes.get("length", T)
    model = LanguageModel(*(blocks or (Block(),)), **sizes).double()
    vocabulary = sizes.get("vocabulary", V)
    return model, torch.randint(vocabulary, shape), torch.randint(vocabulary, shape)


def of(model: nn.Module, loss: Callable[[], Tensor], batch: int = N) -> Problem:
    return Problem(list(model.named_parameters()), loss, batch)


def plain(*blocks: nn.Module) -> Problem:
    model, x, y = language_model(*blocks)
    return of(model, lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten()))


def transposed_logits() -> Problem:
    model, x, y = language_model()
    return of(model, lambda: F.cross_entropy(model(x).transpose(1, 2), y))


def ignored_positions() -> Problem:
    model, x, y = language_model()
    y[:, 1] = -100
    return of(model, lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100))


def shifted_targets() -> Problem:
    """As language models of the hub do: the last logits have no target."""
    model, x, _ = language_model()
    return of(model, lambda: F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()))


def time_first() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.block, self.head = nn.Linear(3, C), Block(), nn.Linear(C, V)

        def forward(self, x: Tensor) -> Tensor:  # [T, N, 3]
            h = self.block(torch.tanh(self.inner(x)).transpose(0, 1)).transpose(0, 1)
            out: Tensor = self.head(h)
            return out

    model, x, y = Model().double(), torch.randn(T, N, 3).double(), torch.randint(V, (T, N))
    return of(model, lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten()))


def merged() -> Problem:
    """Linear layers on ``[N * T, C]``."""
    first, block, last = nn.Linear(3, C).double(), Block().double(), nn.Linear(C, V).double()
    x, y = torch.randn(N, T, 3).double(), torch.randint(V, (N * T,))
    model = nn.ModuleList([first, block, last])

    def loss() -> Tensor:
        h = torch.tanh(first(x.flatten(0, 1))).view(N, T, C)
        return F.cross_entropy(last(block(h).flatten(0, 1)), y)

    return of(model, loss)


def causal_convolutions() -> Problem:
    """``[N, C, T]``: the positions come last."""
    a, b = nn.Conv1d(3, C, 2).double(), nn.Conv1d(C, V, 2).double()
    x, y = torch.randn(N, 3, T).double(), torch.randint(V, (N, T))
    model = nn.ModuleList([a, b])
    return of(model, lambda: F.cross_entropy(b(F.pad(torch.tanh(a(F.pad(x, (1, 0)))), (1, 0))), y))


def recurrent() -> Problem:
    cell, head = nn.LSTM(3, C, batch_first=True).double(), nn.Linear(C, V).double()
    x, y = torch.randn(N, T, 3).double(), torch.randint(V, (N, T))
    model = nn.ModuleList([cell, head])
    return of(model, lambda: F.cross_entropy(head(cell(x)[0]).transpose(1, 2), y))


def without_mask() -> Problem:
    return plain(Block(causal=False))


def dense_prediction() -> Problem:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, V, 3, padding=1)).double()
    x, y = torch.randn(N, 2, 16, 2).double(), torch.randint(V, (N, 16, 2))
    return of(net, lambda: F.cross_entropy(net(x), y))


def one_example() -> Problem:
    model, x, y = language_model(batch=1)
    return of(model, lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten()), 1)


def equal_sizes() -> Problem:
    """Examples, positions, features and classes are all three."""
    model, x, y = language_model(Block(3), width=3, vocabulary=3, length=3)
    return of(model, lambda: F.cross_entropy(model(x).transpose(1, 2), y))


def an_average_beside() -> Problem:
    """A part of the loss has no positions."""
    model, x, y = language_model()

    def loss() -> Tensor:
        h = model.features(x)
        return F.cross_entropy(model.head(h).flatten(0, 1), y.flatten()) + h.mean(1).square().mean()

    return of(model, loss)


def two_losses() -> Problem:
    model, x, y = language_model()
    other = nn.Linear(C, 2).double()

    def loss() -> Tensor:
        h = model.features(x)
        return F.cross_entropy(model.head(h).flatten(0, 1), y.flatten()) + other(h).square().mean()

    return of(nn.ModuleList([model, other]), loss)


def regression() -> Problem:
    """One number for each position."""
    net = nn.Sequential(nn.Linear(3, C), nn.Tanh(), Block(), nn.Linear(C, 1)).double()
    x, y = torch.randn(N, T, 3).double(), torch.randn(N, T).double()
    return of(net, lambda: (net(x)[..., 0] - y).square().mean())


def encoder_and_decoder() -> Problem:
    """As many positions in the encoder as in the decoder. Each of the encoder's moves all of the decoder's."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.block = nn.Linear(3, C), Block()
            self.q, self.kv, self.head = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(C, V)

        def forward(self, source: Tensor, x: Tensor) -> Tensor:
            h, memory = self.block(x), torch.tanh(self.encoder(source))
            k, v = self.kv(memory.roll(1, 1)).chunk(2, -1)
            out: Tensor = self.head(h + F.scaled_dot_product_attention(self.q(h), k, v))
            return out

    model = Model().double()
    source, x, y = torch.randn(N, T, 3).double(), torch.randn(N, T, C).double(), torch.randint(V, (N, T))
    return of(model, lambda: F.cross_entropy(model(source, x).transpose(1, 2), y))


def gru_cell() -> Problem:
    """The closure calls the cell once for each position: no site has positions."""
    cell, head = nn.GRUCell(3, C).double(), nn.Linear(C, V).double()
    x, y = torch.randn(N, T, 3).double(), torch.randint(V, (N, T))

    def loss() -> Tensor:
        state, states = torch.zeros(N, C).double(), []
        for t in range(T):
            state = cell(x[:, t], state)
            states.append(state)
        return F.cross_entropy(head(torch.stack(states, 1)).transpose(1, 2), y)

    return of(nn.ModuleList([cell, head]), loss)


def judged(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Problem]:
    """A language model with another loss of its logits."""

    def make() -> Problem:
        model, x, y = language_model()
        return of(model, lambda: loss(model(x), y))

    return make


_t = torch.arange(T)
_causal = _t[:, None] >= _t


def _blocks(*lengths: int) -> Tensor:
    """A mask of blocks along the diagonal."""
    return torch.block_diag(*(torch.ones(length, length) for length in lengths)).bool()


#: Influences on earlier positions, and losses that mix positions: nothing is added to the bias.
UNUSUAL: dict[str, Callable[[], Problem]] = {
    "a window": lambda: plain(Mixing(masked(_causal & (_t[:, None] - _t < 2)))),
    "a prefix": lambda: plain(Mixing(masked(_causal | (_t < 2))), Mixing(masked(_causal | (_t < 2)))),
    "the first two mix": lambda: plain(Mixing(masked(_causal | ((_t[:, None] < 2) & (_t < 2))))),
    "two in the middle mix": lambda: plain(Mixing(masked(_causal | ((_t[:, None] == 1) & (_t == 2))))),
    "a block in the middle": lambda: plain(Mixing(masked(_blocks(1, 2, 1) | _causal)), Mixing(lambda x: x)),
    "documents": lambda: plain(Mixing(masked(_blocks(1, 2, 1) & _causal)), Mixing(masked(_blocks(1, 2, 1) & _causal))),
    "documents without a mask": lambda: plain(Mixing(masked(_blocks(1, 2, 1))), Mixing(masked(_blocks(1, 2, 1)))),
    "two positions swapped": lambda: plain(Mixing(lambda x: x[:, [0, 2, 1, 3]])),
    "reversed": lambda: plain(Mixing(masked(_causal.T))),
    "one ahead": lambda: plain(Mixing(lambda x: x.roll(-1, 1))),
    "one behind": lambda: plain(Mixing(lambda x: x.roll(1, 1))),
    "a running sum": lambda: plain(Mixing(lambda x: x.cumsum(1))),
    "norm over time": lambda: plain(Mixing(lambda x: F.layer_norm(x.mT, (T,)).mT)),
    "batch norm": lambda: plain(Mixing(lambda x: F.batch_norm(x.flatten(0, 1), None, None, training=True).view_as(x))),
    "recurrent cells": gru_cell,
    "the mean of the logits": judged(lambda logits, y: F.cross_entropy(logits.mean(1), y[:, 0])),
    "sums of the logits": judged(lambda logits, y: F.cross_entropy(logits.cumsum(1).transpose(1, 2), y)),
    "the last logits": judged(lambda logits, y: F.cross_entropy(logits[:, -1], y[:, 0])),
    "differences of logits": judged(lambda logits, y: (logits[:, 1:] - logits[:, :-1]).square().mean()),
    "softmax over time": judged(lambda logits, y: -(logits[..., 0].softmax(1) * y).sum(1).mean()),
}


#: By name: the problem, T, and whether all sites are causal, or some.
WITH_POSITIONS: dict[str, tuple[Callable[[], Problem], int, str]] = {
    "language model": (plain, T, "all"),
    "two blocks": (lambda: plain(Block(), Block()), T, "all"),
    "transposed logits": (transposed_logits, T, "all"),
    "ignored positions": (ignored_positions, T, "all"),
    "shifted targets": (shifted_targets, T, "all"),
    "time first": (time_first, T, "all"),
    "merged": (merged, T, "all"),
    "causal convolutions": (causal_convolutions, T, "all"),
    "recurrent": (recurrent, T, "all"),
    "one example": (one_example, T, "all"),
    "equal sizes": (equal_sizes, 3, "all"),
    "an average beside": (an_average_beside, T, "all"),
    "two losses": (two_losses, T, "all"),
    "regression": (regression, T, "all"),
    "without a mask": (without_mask, T, "some"),
    "dense prediction": (dense_prediction, 16, "some"),
    "encoder and decoder": (encoder_and_decoder, T, "some"),
}


def classifier(width: int) -> Problem:
    net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, V)).double()
    x, y = torch.randn(6, 4).double(), torch.arange(6) % V
    return of(net, lambda: F.cross_entropy(net(x), y), 6)


def pooled() -> Problem:
    net = nn.Sequential(nn.Linear(3, C), Block()).double()
    head = nn.Linear(C, T).double()  # as many classes as positions
    x, y = torch.randn(N, T, 3).double(), torch.arange(N) % T
    return of(nn.ModuleList([net, head]), lambda: F.cross_entropy(head(net(x).mean(1)), y))


def image_classifier() -> Problem:
    net = nn.Sequential(
        nn.Conv2d(2, V, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(V, V)
    ).double()
    x, y = torch.randn(N, 2, V, V).double(), torch.arange(N) % V
    return of(net, lambda: F.cross_entropy(net(x), y))


def class_token() -> Problem:
    """As many tokens as classes, of which one token is read."""
    net, head = nn.Sequential(nn.Linear(3, 8), Block(8, causal=False)).double(), nn.Linear(8, T).double()
    x, y = torch.randn(N, T, 3).double(), torch.arange(N) % T
    return of(nn.ModuleList([net, head]), lambda: F.cross_entropy(head(net(x)[:, 0]), y))


WITHOUT_POSITIONS: dict[str, Callable[[], Problem]] = {
    "classifier": lambda: classifier(7),
    "as many features as classes": lambda: classifier(V),
    "pooled": pooled,
    "class token": class_token,
    "image classifier": image_classifier,
}


def build(name: str) -> Problem:
    torch.manual_seed(0)
    return ({**UNUSUAL, **WITHOUT_POSITIONS}.get(name) or WITH_POSITIONS[name][0])()


def sgd(problem: Problem, estimator: Any = "activation_perturbation", **options: Any) -> GuessGradOptimizer:
    return GuessGradOptimizer(problem.named, torch.optim.SGD, estimator, lr=0.1, seed=0, **options)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, rtol=tolerance, atol=tolerance * largest, msg=name)


# --- where the positions lie ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["store", pytest.param("stream", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", WITH_POSITIONS)
def test_positions_are_found(name: str, memory: str) -> None:
    problem, (_, count, causal) = build(name), WITH_POSITIONS[name]
    opt = sgd(problem, discount=0.5, memory=memory)
    for _ in range(3):  # probes come before the first, the second and the third step
        opt.estimate(problem.closure)
    graph = opt.estimation.plans[0].graph
    assert graph.positions == count and graph.batch == problem.batch
    causal_sites = [s.influence is not Influence.ALL for s in graph.sites if s.shares is None]
    assert any(causal_sites) and all(causal_sites) == (causal == "all")
    if name in ("without a mask", "dense prediction"):
        assert graph.has_uncausal_sites


@pytest.mark.parametrize("name", WITHOUT_POSITIONS)
def test_no_positions_where_there_are_none(name: str) -> None:
    problem = build(name)
    found = []
    for discount in (None, 0.5):
        opt = sgd(problem, discount=discount)
        found.append(estimated_gradient(opt, problem.closure))
        assert opt.estimation.plans[0].graph.positions == 0
    for key, g in found[0].items():
        assert torch.equal(g, found[1][key])


def test_an_influence_that_came_with_an_earlier_batch_is_kept() -> None:
    known = Positions(T, {9: 0}, {1: 0, 2: 0, 3: 0}, {1: Influence.ALL, 2: Influence.OWN, 3: Influence.LATER})
    new = Positions(T, {9: 0}, {1: 0, 2: 0, 4: 0}, {1: Influence.OWN, 2: Influence.LATER, 4: Influence.OWN})
    both = joined(known, new)
    assert both.dims == {1: 0, 2: 0} and both.influence == {1: Influence.ALL, 2: Influence.LATER}
    assert joined(Positions(T + 1, {9: 0}, {1: 0}, {1: Influence.ALL}), new) == new


def test_the_encoder_keeps_one_derivative_for_each_example() -> None:
    problem = build("encoder and decoder")
    opt = sgd(problem, discount=0.5)
    opt.estimate(problem.closure)
    names = {opt.estimation.names[s.params[0]]: s.position_dim for s in opt.estimation.plans[0].graph.sites}
    assert names["encoder.weight"] is None and names["block.qkv.weight"] == 0


def test_last_layers_answer_for_their_own_position() -> None:
    problem = build("two blocks")
    opt = sgd(problem, discount=1.0)
    opt.estimate(problem.closure)
    own = {opt.estimation.names[s.params[0]]: s.influence is Influence.OWN for s in opt.estimation.plans[0].graph.sites}
    assert [name for name, alone in own.items() if alone] == [
        "blocks.1.out.weight",
        "blocks.1.mlp.weight",
        "head.weight",
    ]


@pytest.mark.parametrize("layout", [x for x in Layout if x is not Layout.COUPLED])
@pytest.mark.parametrize("dim", [0, 1])
def test_spreading_undoes_summing(layout: Layout, dim: int) -> None:
    row = (T, 5) if dim == 0 else (5, T)
    shape = {"[N, ...]": (N, *row), "[T, N, ...]": (row[0], N, *row[1:])}.get(layout.value, (N * row[0], *row[1:]))
    d = torch.randn(N, T).double()
    spread = layout.spread_positions(d, shape, N, dim).expand(shape)
    torch.testing.assert_close(layout.sum_positions(spread, N, dim), 5 * d)


# --- what the estimate expects ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "discount", [pytest.param(0.0, marks=pytest.mark.slow), 0.5, pytest.param(1.0, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", WITH_POSITIONS)
def test_the_sum_over_one_hot_guesses_is_the_discounted_gradient(name: str, discount: float) -> None:
    """The reference takes one reverse pass for each position."""
    problem = build(name)
    summing = Summing(problem, discount=discount)
    found = summing.gradient()
    reference = sgd(problem, discount=discount)
    assert_close(found, expected_gradient(reference, problem.closure))
    if discount == 1:
        assert_close(found, true_gradient(reference, problem.closure))


@pytest.mark.parametrize("name", UNUSUAL)
def test_no_bias_where_positions_act_in_unusual_ways(name: str) -> None:
    problem = build(name)
    found = Summing(problem, discount=1.0).gradient()
    assert_close(found, true_gradient(sgd(problem), problem.closure))


def test_without_discount_keys_and_values_of_other_positions_are_constants() -> None:
    """``discount=0`` against autograd through a network whose keys and values of other positions are detached."""
    torch.manual_seed(0)
    model, x, y = language_model(Block(), Block())
    detached, *_ = language_model(Block(own=True), Block(own=True))
    detached.load_state_dict(model.state_dict())

    def loss(network: nn.Module) -> Tensor:
        return F.cross_entropy(network(x).flatten(0, 1), y.flatten())

    problem = of(model, lambda: loss(model))
    own = dict(
        zip(
            dict(detached.named_parameters()),
            torch.autograd.grad(loss(detached), [*detached.parameters()]),
            strict=True,
        )
    )
    assert_close(Summing(problem, discount=0.0).gradient(), own)
    assert_close(expected_gradient(sgd(problem, discount=0.0), problem.closure), own)


@pytest.mark.parametrize(
    ("estimator", "draws"),
    [("activation_perturbation", 100), (WPerp(k=1), 100), ("w_transpose", 100), ("downstream", 100),
     (LearnedFeedback(gamma=1, residual=False), 250), (LearnedFeedback(gamma=1), 250)],
    ids=["activation_perturbation", "w_perp", "w_transpose", "downstream", "feedback", "feedback, chain"],
)  # fmt: skip
@pytest.mark.parametrize("discount", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_the_mean_is_the_declared_one(estimator: Any, draws: int, discount: float) -> None:
    """Along the declared expectation, within five standard errors."""
    problem = build("two blocks")
    opt = sgd(problem, estimator, discount=discount, guesses=1 if isinstance(estimator, LearnedFeedback) else 4)
    for _ in range(4 if isinstance(estimator, LearnedFeedback) else 0):
        opt.estimate(problem.closure)
    expected = expected_gradient(opt, problem.closure)
    estimates = [estimated_gradient(opt, problem.closure) for _ in range(draws)]
    for name, e in expected.items():
        each = torch.stack([(one[name] * e).sum() for one in estimates]) / e.square().sum()
        assert abs(float(each.mean()) - 1) <= 5 * float(each.std()) / draws**0.5, name


def test_credit_lowers_the_noise() -> None:
    problem = build("two blocks")
    noise = {}
    for discount in (None, 1.0, 0.5):
        opt = sgd(problem, discount=discount)
        draws = [estimated_gradient(opt, problem.closure) for _ in range(80)]
        noise[discount] = sum(float(torch.stack([d[k] for d in draws]).var(0).sum()) for k in draws[0])
    assert noise[0.5] < 0.9 * noise[1.0] and noise[1.0] < 0.8 * noise[None]


# --- engines, memory modes, K guesses ---------------------------------------------------------------------------------


#: By estimator and number of guesses: other ways to make the estimate.
WAYS: list[tuple[str, int, dict[str, Any]]] = [
    ("w_perp", 1, {"engine": "func"}),
    ("w_perp", 1, {"memory": "stream"}),
    ("w_perp", 3, {"engine": "dual"}),
    ("w_perp", 3, {"memory": "replay"}),
    ("w_perp", 3, {"stack_guesses": False}),
    ("directional_descent", 1, {"memory": "replay"}),
]


@pytest.mark.parametrize("name", WITH_POSITIONS)
def test_engines_modes_and_guesses_agree(name: str) -> None:
    problem, expected = build(name), dict[tuple[str, int], dict[str, Tensor]]()
    for estimator, guesses, other in WAYS:
        options = {"discount": 0.7, "guesses": guesses}
        if (estimator, guesses) not in expected:
            expected[estimator, guesses] = estimated_gradient(sgd(problem, estimator, **options), problem.closure)
        found = estimated_gradient(sgd(problem, estimator, **options, **other), problem.closure)
        assert_close(found, expected[estimator, guesses], 1e-8)


@pytest.mark.parametrize("gamma", [1.0, "auto"])
@pytest.mark.parametrize("options", [{"residual": False}, {}], ids=["sitewise", "chain"])
def test_learned_feedback_agrees_in_every_mode(options: dict[str, Any], gamma: Any) -> None:
    found = []
    for memory in ("store", "replay") if not options else ("store", "replay", "stream"):
        problem = build("two blocks")
        opt = sgd(problem, LearnedFeedback(gamma=gamma, **options), discount=0.7, memory=memory)
        for _ in range(4):
            opt.step(problem.closure)
        found.append({name: p.detach().clone() for name, p in problem.named})
    for other in found[1:]:
        assert_close(other, found[0], 1e-8)


def test_three_times_the_loss_gives_three_times_the_estimate() -> None:
    problem = build("language model")
    one = estimated_gradient(sgd(problem, "w_perp", discount=0.3), problem.closure)
    three = estimated_gradient(sgd(problem, "w_perp", discount=0.3), lambda: 3 * problem.closure())
    assert_close(three, {k: 3 * g for k, g in one.items()})


# --- the option -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "match"), [
    ({"discount": 1.5}, "discount: 1.5"), ({"discount": "much"}, "discount: 'much'"),
    ({"discount": 0.5, "guesses": 2, "orthogonal": True}, "discount: orthogonal"),
])  # fmt: skip
def test_what_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        sgd(build("classifier"), **options)


def test_the_discount_may_be_set_between_steps() -> None:
    problem = build("language model")
    opt = sgd(problem)
    opt.estimate(problem.closure)
    assert opt.discount is None and opt.estimation.plans[0].graph.positions == 0
    opt.discount = 0.5
    opt.zero_grad()
    opt.estimate(problem.closure)
    assert opt.estimation.plans[0].graph.positions == T


def test_preflight_shows_the_positions() -> None:
    problem = build("language model")
    report = preflight(sgd(problem, discount=0.5), problem.closure)
    assert report.positions == T and {site.positions for site in report.sites} == {
        "dim 0: positions from t on",
        "dim 0: position t",
    }
    assert f"positions: {T}, discount 0.5" in str(report)
    assert preflight(sgd(problem), problem.closure).positions == 0


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("both", [False, True])
def test_long_sequences_are_discounted_block_by_block(discount: float, both: bool) -> None:
    each, t = torch.randn(2, 3, 600).double(), torch.arange(600)
    distance = t[:, None] - t  # [t', t]
    weights = torch.where((distance >= 0) | both, discount ** distance.abs().double(), 0.0)
    torch.testing.assert_close(discounted(each, discount, both), each @ weights, rtol=1e-9, atol=1e-9)


# --- discount="auto" --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["activation_perturbation", "w_perp"])
def test_auto_measures_what_each_discount_is_worth(estimator: str) -> None:
    """The measured quality orders three discounts as the mean cosine of 80 estimates does; the best is taken."""
    problem = build("two blocks")
    opt = sgd(problem, estimator, discount="auto")
    for _ in range(17):
        opt.estimate(problem.closure)
    choice, grid = opt.estimation.choice, list(DiscountChoice.GRID)
    assert choice.measured_at == 16
    true = torch.cat([g.flatten() for g in true_gradient(opt, problem.closure).values()])
    measured, found = [], []
    for discount in (0.0, 0.7, 1.0):
        k = grid.index(discount)
        measured.append(choice.signal[k] / choice.noise[k] ** 0.5)
        other = sgd(problem, estimator, discount=discount)
        draws = [estimated_gradient(other, problem.closure) for _ in range(80)]
        each = torch.stack([torch.cat([g.flatten() for g in draw.values()]) for draw in draws])
        found.append(F.cosine_similarity(each, true[None]))
    order = sorted(range(3), key=measured.__getitem__)
    for worse, better in itertools.pairwise(order):
        difference = found[better] - found[worse]
        assert float(difference.mean()) > -3 * float(difference.std()) / 80**0.5
    quality = [a / b**0.5 for a, b in zip(choice.signal, choice.noise, strict=True)]
    assert opt.estimation.gamma == grid[quality.index(max(quality))]


@pytest.mark.parametrize("memory", ["store", "replay", "stream"])
def test_auto_resumes_bit_for_bit_and_survives_a_failed_step(memory: str) -> None:
    def start() -> tuple[Problem, GuessGradOptimizer]:
        problem = build("language model")
        return problem, sgd(problem, "w_perp", discount="auto", memory=memory)

    problem, opt = start()
    for _ in range(3):
        opt.step(problem.closure)
    model = [p.detach().clone() for p in problem.parameters()]
    saved, choice = opt.state_dict(), opt.estimation.choice

    def failing() -> Tensor:
        problem.closure()
        raise KeyError("the batch")

    with pytest.raises(KeyError):
        opt.step(failing)
    assert opt.estimation.choice == choice
    for _ in range(3):
        opt.step(problem.closure)
    other, resumed = start()
    with torch.no_grad():
        for p, value in zip(other.parameters(), model, strict=True):
            p.copy_(value)
    resumed.load_state_dict(saved)
    assert resumed.estimation.choice == choice
    for _ in range(3):
        resumed.step(other.closure)
    for p, q in zip(problem.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_damaged_choice_is_refused() -> None:
    problem = build("language model")
    opt = sgd(problem, discount="auto")
    opt.step(problem.closure)
    state = opt.state_dict()
    state["guessopt"]["discount"]["signal"] = [1.0]
    with pytest.raises(ValueError, match="not one figure for each discount"):
        opt.load_state_dict(state)


def test_auto_has_no_effect_without_positions() -> None:
    problem = build("classifier")
    opt = sgd(problem, discount="auto")
    opt.estimate(problem.closure)
    assert opt.estimation.choice == DiscountChoice()
    assert "none found" in str(preflight(opt, problem.closure))


def test_preflight_shows_the_measured_discount() -> None:
    problem = build("language model")
    opt = sgd(problem, discount="auto")
    report = preflight(opt, problem.closure)
    assert report.measured is not None and report.discount == report.measured.discount
    assert "(measured)" in str(report) and opt.estimation.choice == DiscountChoice()
