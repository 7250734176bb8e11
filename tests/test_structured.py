"""Guesses built from the next weights, on networks that are awkward for them: every estimator, every memory mode."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import ClosureError, GuessGradOptimizer, GuessWarning, LearnedFeedback, WPerp, WPerpNS, WPreconditioned
from guessopt.estimators import ActivationMixing, WTranspose, estimator_names

from .awkward_networks import (
    AWKWARD,
    NETWORKS,
    NUMBERS,
    N,
    Network,
    lin,
    of,
)
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


def modes_of(estimator: str) -> list[str]:
    """Those that an estimator can serve in: along a residual stream none but two."""
    if estimator.startswith("learned"):
        return ["store", "replay"] if estimator == "learned_feedback" else ["store", "replay", "stream"]
    return list(MODES)


def update(network: Network, estimator: Any, scale: float = 1.0, **options: Any) -> Tensor:
    """What one step subtracts from the parameters."""
    net, closure = network
    before = torch.cat([p.detach().double().flatten() for p in net.parameters()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuessWarning)
        opt = GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, estimator, lr=1.0, seed=3, **options)
        opt.step(lambda: scale * closure())
    return before - torch.cat([p.detach().double().flatten() for p in net.parameters()])


def cases() -> list[Any]:
    """Every name on every network, other options on some; each in the next of its modes."""
    found, some = [], ("sum of two layers", "sum pooling", "gate and up")
    for k, estimator in enumerate(ESTIMATORS):
        for j, network in enumerate(NETWORKS if estimator in NAMES else some):
            modes = modes_of(estimator)
            mode = modes[(k + j) % len(modes)]
            found.append(pytest.param(estimator, network, mode, id=f"{estimator}-{network}-{mode}"))
    return found


@pytest.mark.parametrize(("estimator", "network", "mode"), cases())
def test_three_times_the_loss_gives_three_times_the_estimate(estimator: str, network: str, mode: str) -> None:
    build, chosen = NETWORKS[network], ESTIMATORS[estimator]
    once, thrice = (update(build(), chosen, scale, **MODES[mode]) for scale in (1.0, 3.0))
    assert bool(torch.isfinite(once).all())
    assert bool(once.any())
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-6, atol=1e-9)


# --- networks on which guesses used to crash, or were refused without need --------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(
    ("estimator", "network"), [(e, n) for e in ESTIMATORS for n in (AWKWARD if e in NAMES else NUMBERS)]
)
def test_awkward_networks(estimator: str, network: str) -> None:
    """A finite estimate; where the network draws numbers, the same in every memory mode."""
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
    """Before the head, learned feedback is exact."""
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
    """A second head that finds nothing in this batch: its loss is zero, and so are its gradients."""
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
    """Bases and feedback that were made of float32 weights serve the same model in another dtype."""
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
    """As the first batch, and as a later one; with ``check_finite=False`` nobody looks at it."""
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
    """However often guesses and rules run the norm once more."""
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
