"""Guesses built from the next weights, on awkward networks: every estimator, in every memory mode."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import ClosureError, GuessGradOptimizer, GuessWarning, LearnedFeedback, WPerp, WPerpNS, WPreconditioned
from guessopt.estimators import ActivationMixing, WTranspose, estimator_names

from . import awkward
from .awkward import N, Net, lin
from .problems import labels, learned

#: The registered names, as they are and with other options.
NAMES = estimator_names()
ESTIMATORS: dict[str, Any] = {
    **{name: name for name in NAMES},
    "w_perp, masked": WPerp(k=2, basis="masked"),
    "w_perp, by example": WPerp(k=2, basis="example"),
    "w_perp, bottom": WPerp(k=2, select="bottom", basis="example"),
    "w_perp, debiased": WPerp(debias=True),
    "w_transpose, power": WTranspose(power=2.0),
    "w_perp_ns, by example": WPerpNS(k=2, basis="example"),
    "w_preconditioned, shared": WPreconditioned(basis="shared"),
    "activation_mixing, plain": ActivationMixing(normalise=False),
    "learned_feedback, site by site": LearnedFeedback(residual=False),
    "learned_feedback, W-perp": LearnedFeedback("w_perp", residual=False),
}

#: Options of the optimizer. An estimator that learns takes one guess at a time.
MODES: dict[str, dict[str, Any]] = {
    "store": {},
    "replay": {"memory": "replay"},
    "stream": {"memory": "stream"},
    "three guesses": {"guesses": 3},
    "three guesses in turn": {"guesses": 3, "stack_guesses": False},
    "three guesses, replay": {"guesses": 3, "memory": "replay"},
}

Closure = Callable[[], Tensor]
Network = tuple[nn.Module, Closure]


def of(run: Callable[..., Tensor], *shape: int, **layers: Callable[[], nn.Module]) -> Callable[[], Network]:
    """``awkward.of``, as a pair of network and closure."""

    def build() -> Network:
        problem = awkward.of(run, *shape, **layers)()
        assert problem.model is not None
        return problem.model, problem.closure

    return build


def recurrence(m: Any, x: Tensor) -> Tensor:
    h = c = x.new_zeros(len(x), 5)
    for t in range(x.shape[1]):
        h, c = m.cell(x[:, t], (h, c))
    return m.h(torch.relu(m.b(torch.cat([h, c], -1))))


def modes_of(estimator: str) -> list[str]:
    """The modes of an estimator. Along a residual stream learned feedback has two."""
    if estimator.startswith("learned"):
        return ["store", "replay"] if estimator == "learned_feedback" else ["store", "replay", "stream"]
    return list(MODES)


def update(network: Network, estimator: Any, scale: float = 1.0, **options: Any) -> Tensor:
    """The change of the parameters in one step, old minus new."""
    net, closure = network
    before = torch.cat([p.detach().double().flatten() for p in net.parameters()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuessWarning)
        opt = GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, estimator, lr=1.0, seed=3, **options)
        opt.step(lambda: scale * closure())
    return before - torch.cat([p.detach().double().flatten() for p in net.parameters()])


# --- networks on which guesses used to crash, or were refused without need --------------------------------------------


def experts(m: Any, x: Tensor) -> Tensor:
    """Three experts; one gets no example."""
    out = torch.zeros(len(x), 8, dtype=x.dtype)
    for k, expert in enumerate((m.a, m.b, m.c)):
        chosen = torch.tensor([i for i in range(len(x)) if i % 2 == k])
        out = out.index_add(0, chosen.long(), expert(x[chosen.long()]))
    return m.h(torch.relu(out))


def adapter(m: Any, x: Tensor) -> Tensor:
    """A float32 low-rank adapter in a bfloat16 network."""
    h = torch.relu(m.a(x))
    return m.h(torch.relu(m.b(h) + m.up(m.down(h.float())).to(h.dtype))).float()


def seq2seq(m: Any, x: Tensor) -> Tensor:
    _, state = m.encoder(x)
    return m.h(torch.relu(m.b(m.decoder(x.flip(1), state)[0][:, -1])))


def graph_of(kind: str) -> Callable[[], Network]:
    """Examples mixed by a sparse matrix."""

    def build() -> Network:
        dense = (torch.ones(N, N) / N + torch.eye(N)).double()
        a = dense.to_sparse_csr() if kind == "csr" else dense.to_sparse()
        mix: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "coo": lambda h, x: a @ h,
            "csr": lambda h, x: a @ h,
            "mm": lambda h, x: torch.sparse.mm(a, h),
            "spmm": lambda h, x: torch.spmm(a, h),
            "addmm": lambda h, x: torch.sparse.addmm(x[:, :1], a, h),
        }
        run = lambda m, x: m.h(torch.relu(m.b(torch.relu(mix[kind](m.a(x), x)))))  # noqa: E731
        return of(run, a=lin(4, 8), b=lin(8, 8), h=lin(8, 3))()

    return build


def zeros() -> nn.Module:
    layer = nn.Linear(8, 8)
    nn.init.zeros_(layer.weight)
    return layer


def mixed(run: Callable[..., Tensor], **layers: tuple[Callable[[], nn.Module], torch.dtype]) -> Callable[[], Network]:
    """Layers of different dtypes. The input has the first layer's."""

    def build() -> Network:
        torch.manual_seed(0)
        net = Net(run, **{name: layer().to(dtype) for name, (layer, dtype) in layers.items()})
        x = torch.randn(N, 4).to(next(dtype for _, dtype in layers.values()))
        return net, lambda: F.cross_entropy(net(x), labels(N, 3))

    return build


B, S, D = torch.bfloat16, torch.float32, torch.float64

AWKWARD: dict[str, Callable[[], Network]] = {
    "a weight of zeros": of(
        lambda m, x: m.h(torch.relu(m.b(torch.relu(m.a(x))))), a=lin(4, 8), b=zeros, h=lin(8, 3)
    ),
    "an expert without a token": of(experts, a=lin(4, 8), b=lin(4, 8), c=lin(4, 8), h=lin(8, 3)),
    "a bfloat16 network, a float32 head": mixed(
        lambda m, x: m.h(torch.relu(m.b(torch.relu(m.a(x)))).float()), a=(lin(4, 16), B), b=(lin(16, 16), B),
        h=(lin(16, 3), S),
    ),
    "a float32 network, a bfloat16 middle": mixed(
        lambda m, x: m.h(torch.relu(m.b(torch.relu(m.a(x)).bfloat16())).float()), a=(lin(4, 16), S),
        b=(lin(16, 16), B), h=(lin(16, 3), S),
    ),
    "a float32 network, a float64 head": mixed(
        lambda m, x: m.h(torch.relu(m.b(torch.relu(m.a(x)))).double()), a=(lin(4, 16), S), b=(lin(16, 16), S),
        h=(lin(16, 3), D),
    ),
    "a float32 adapter in a bfloat16 network": mixed(
        adapter, a=(lin(4, 16), B), b=(lin(16, 16), B), down=(lin(16, 2), S), up=(lin(2, 16), S), h=(lin(16, 3), B)
    ),
    "a loop over an LSTM cell": of(
        recurrence, 3, 4, cell=lambda: nn.LSTMCell(4, 5), b=lin(10, 8), h=lin(8, 3)
    ),
    "an LSTM that begins with another's state": of(
        seq2seq, 3, 4, encoder=lambda: nn.LSTM(4, 5, batch_first=True), decoder=lambda: nn.LSTM(4, 5, batch_first=True),
        b=lin(5, 8), h=lin(8, 3),
    ),
    **{
        f"a sparse matrix, {kind}": graph_of(kind)
        for kind in ("coo", "csr", "mm", "spmm", "addmm")
    },
    "noise made by weight.new": of(
        lambda m, x: m.h(F.linear(torch.relu(m.a(x)), m.b.weight + m.b.weight.new(m.b.weight.shape).fill_(0.1))),
        a=lin(4, 8), b=lin(8, 8), h=lin(8, 3),
    ),
    "noise on weights": of(
        lambda m, x: m.h(torch.relu(F.linear(torch.relu(m.a(x)), m.b.weight + 0.1 * torch.randn_like(m.b.weight)))),
        a=lin(4, 8), b=lin(8, 8), h=lin(8, 3),
    ),
    "dropout on weights": of(
        lambda m, x: m.h(torch.relu(F.linear(torch.relu(m.a(x)), F.dropout(m.b.weight)))),
        a=lin(4, 8), b=lin(8, 8), h=lin(8, 3),
    ),
    "noise made by h.new": of(
        lambda m, x: m.h(torch.tanh((h := m.a(x)) + h.new(h.size()).fill_(0.1))), a=lin(4, 8), h=lin(8, 3)
    ),
}  # fmt: skip


NUMBERS = [name for name in AWKWARD if "float" in name or "zeros" in name]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(
    ("estimator", "network"), [(e, n) for e in ESTIMATORS for n in (AWKWARD if e in NAMES else NUMBERS)]
)
def test_awkward_networks(estimator: str, network: str) -> None:
    """The estimate is finite. Where the network draws random numbers, the memory modes agree."""
    chosen = ESTIMATORS[estimator]
    modes = [mode for mode in modes_of(estimator) if "guesses" not in mode]
    if not any(word in network for word in ("noise", "dropout")):
        modes = [modes[(len(estimator) + len(network)) % len(modes)]]
    first, *others = (update(AWKWARD[network](), chosen, **MODES[mode]) for mode in modes)
    assert bool(torch.isfinite(first).all())
    assert bool(first.any())
    for other in others:
        torch.testing.assert_close(other, first)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("kind", ["coo", "listed", "csr"])
@pytest.mark.parametrize("memory", ["store", "replay"])
def test_trainable_values_of_a_sparse_matrix(kind: str, memory: str) -> None:
    """Learned feedback is exact at the site before the head."""
    torch.manual_seed(0)
    values, head = nn.Parameter(torch.rand(N, dtype=torch.float64)), nn.Linear(4, 3).double()
    x, rows, columns = torch.randn(N, 4, dtype=torch.float64), torch.arange(N), torch.arange(N).flip(0)
    make = {
        "coo": lambda: torch.sparse_coo_tensor(torch.stack([rows, columns]), values, (N, N)),
        "listed": lambda: torch.sparse_coo_tensor([rows.tolist(), columns.tolist()], values, (N, N)),
        "csr": lambda: torch.sparse_csr_tensor(torch.arange(N + 1), columns, values, (N, N)),
    }[kind]

    def closure() -> Tensor:
        return F.cross_entropy(head(torch.tanh(make() @ x)), labels(N, 3))

    (true,) = torch.autograd.grad(closure(), [values])
    named = [("values", values), *head.named_parameters()]
    feedback = LearnedFeedback(gamma=0, residual=False)
    opt = GuessGradOptimizer(named, torch.optim.SGD, feedback, lr=1.0, seed=1, memory=memory)
    before = values.detach().clone()
    opt.step(closure)
    torch.testing.assert_close(before - values.detach(), true)


def test_an_empty_batch_is_refused_all_the_same() -> None:
    net, _ = of(lambda m, x: m.h(torch.relu(m.a(x))), a=lin(4, 8), h=lin(8, 3))()
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=0.1, seed=1)
    with pytest.raises(ClosureError, match="the batch is empty"):
        opt.step(lambda: net(torch.zeros(0, 4, dtype=torch.float64)).square().sum())


def test_an_output_that_is_empty_at_times() -> None:
    """A second head gets no example in this batch: its loss and its gradients are zero."""
    net, _ = of(lambda m, x: m.h(x), a=lin(4, 8), h=lin(8, 3), box=lin(8, 2))()
    x = torch.randn(N, 4, dtype=torch.float64)

    def closure() -> Tensor:
        h = torch.relu(net.a(x))
        return F.cross_entropy(net.h(h), labels(N, 3)) + net.box(h[h[:, 0] > 1e6]).square().sum()

    opt = GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, "activation_perturbation", lr=0.1, seed=1)
    opt.estimate(closure)
    assert net.box.weight.grad is None or not bool(net.box.weight.grad.any())
    assert bool(net.a.weight.grad.any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("way", ["model.to", "checkpoint"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_model_in_another_dtype(estimator: str, way: str, dtype: torch.dtype) -> None:
    """Bases and feedback made of float32 weights work when the model changes its dtype."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(N, 4)

    def closure() -> Tensor:
        return F.cross_entropy(net(x.to(net[0].weight.dtype)).float(), labels(N, 3))

    def made() -> GuessGradOptimizer:
        return GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, ESTIMATORS[estimator], lr=0.01, seed=1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuessWarning)
        opt = made()
        for _ in range(2):
            opt.step(closure)
        state = copy.deepcopy(opt.state_dict())
        net.to(dtype)
        if way == "checkpoint":
            opt = made()
            opt.load_state_dict(state)
        for _ in range(2):
            opt.step(closure)
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())


# --- batches that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["store", "replay", "stream"])
@pytest.mark.parametrize("options", [{}, {"gamma": 0.0}, {"residual": True}, {"source": "guesses"}], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_teaches_nothing(memory: str, options: dict[str, Any], bad: float) -> None:
    """As the first batch and as a later one, with ``check_finite=False``."""
    options = {"residual": False} | options
    if options["residual"] and memory == "stream":
        pytest.skip("a residual stream is taken in store and replay")

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, h: Tensor) -> Tensor:
            return h + self.two(torch.tanh(self.one(h)))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), Block(), Block(), nn.Linear(8, 3)).double()
    good, x = copy.deepcopy(net.state_dict()), torch.randn(N, 4, dtype=torch.float64)
    opt = GuessGradOptimizer(
        net.named_parameters(), torch.optim.SGD, LearnedFeedback(**options), lr=0.0, seed=1, memory=memory,
        check_finite=False,
    )  # fmt: skip

    def step(shift: float) -> None:
        opt.step(lambda: F.cross_entropy(net(x + shift), labels(N, 3)))
        net.load_state_dict(good)

    step(bad)
    assert learned(opt) == {}
    for _ in range(2):
        step(0.0)
    before = copy.deepcopy(learned(opt))
    assert before
    step(bad)
    for key, state in learned(opt).items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, before[key][name]), (key, name)
    step(0.0)


@pytest.mark.parametrize("memory", ["store", "replay"])
@pytest.mark.parametrize("norm", [nn.InstanceNorm1d, nn.BatchNorm1d])
@pytest.mark.parametrize("estimator", ["activation_perturbation", "w_perp", "downstream", "learned_feedback"])
def test_running_statistics_move_once_a_step(estimator: str, norm: type[nn.InstanceNorm1d], memory: str) -> None:
    """Guesses and rules run the norm more than once."""
    made = of(
        lambda m, x: m.h(torch.relu(m.b(m.n(m.a(x)))).flatten(1)), 4, 5,
        a=lambda: nn.Conv1d(4, 4, 1), n=lambda: norm(4, affine=True, track_running_stats=True),
        b=lambda: nn.Conv1d(4, 4, 1), h=lin(20, 3),
    )  # fmt: skip
    net, closure = made()
    closure()
    moved = [net.n.running_mean.clone(), net.n.running_var.clone()]
    net, closure = made()
    update((net, closure), ESTIMATORS[estimator], memory=memory)
    torch.testing.assert_close([net.n.running_mean, net.n.running_var], moved)
