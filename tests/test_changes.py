"""The optimizer notices changes between steps that make the same calls: every step is as right as a first one."""

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from guessopt import ClosureError, GuessGradOptimizer, PartialUpdateError
from guessopt.estimators import LearnedFeedback, WPerp
from guessopt.step.plan import MAX_PLANS

from .problems import labels, of
from .test_exactness import Summing
from .test_values import assert_right

pytestmark = pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.gate = nn.Parameter(torch.zeros(1))
        self.recurrent, self.out = nn.GRU(3, 4), nn.Linear(4, 2)


Forward = Callable[[Any, Tensor, Tensor, Any], Tensor]
#: A forward, and what it is given in the first steps and afterwards.
CASES: dict[str, tuple[Forward, Any, Any]] = {}
N = 6


def case(name: str, before: Any, after: Any) -> Callable[[Forward], Forward]:
    def register(forward: Forward) -> Forward:
        CASES[name] = forward, before, after
        return forward

    return register


def generated(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


half = (torch.arange(4) < 2).double().expand(N, 4)


@case("a mask", half, 1 - half)
def _(net: Any, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(net.head(torch.tanh(net.b(torch.tanh(net.a(x)) * mask))), y)


@case("an adjacency matrix: the identity, then full", torch.eye(N).double(), torch.softmax(generated(N, N), -1))
def _(net: Any, x: Tensor, y: Tensor, adjacency: Tensor) -> Tensor:
    return F.cross_entropy(net.head(torch.tanh(net.b(adjacency @ torch.tanh(net.a(x))))), y)


@case("a layer by its number", 0, 1)
def _(net: Any, x: Tensor, y: Tensor, which: int) -> Tensor:
    return F.cross_entropy(net.head(torch.tanh([net.b, net.c][which](torch.tanh(net.a(x))))), y)


@case("one of two outputs by its number", 0, 1)
def _(net: Any, x: Tensor, y: Tensor, which: int) -> Tensor:
    h = torch.tanh(net.a(x))
    return F.cross_entropy([net.head(torch.tanh(net.b(h))), net.head(torch.tanh(net.c(h)))][which], y)


@case("one of two inner values by its number", 0, 1)
def _(net: Any, x: Tensor, y: Tensor, which: int) -> Tensor:
    h = torch.tanh(net.a(x))
    return F.cross_entropy(net.head([torch.tanh(net.b(h)), torch.tanh(net.c(h))][which]), y)


@case("what the loss reads", 0, 1)
def _(net: Any, x: Tensor, y: Tensor, which: int) -> Tensor:
    h = torch.tanh(net.a(x))
    k = torch.tanh(net.b(h))
    return F.cross_entropy(net.head(k), y) + 0.1 * [h, k][which].square().mean()


@case("a flag: batch norm by its running statistics, then by the batch's", False, True)
def _(net: Any, x: Tensor, y: Tensor, training: bool) -> Tensor:
    mean, variance = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    return F.cross_entropy(net.head(torch.tanh(F.batch_norm(net.a(x), mean, variance, training=training))), y)


@case("a mixing weight annealed from 0", 0.0, 0.5)
def _(net: Any, x: Tensor, y: Tensor, weight: float) -> Tensor:
    h = torch.tanh(net.a(x))
    return F.cross_entropy(net.head(torch.tanh(net.b(h + weight * h.mean(0)))), y)


@case("mixup whose weight is 1 at first", 1.0, 0.5)
def _(net: Any, x: Tensor, y: Tensor, weight: float) -> Tensor:
    h = torch.tanh(net.a(x))
    return F.cross_entropy(net.head(torch.tanh(net.b(weight * h + (1 - weight) * h.flip(0)))), y)


@case("mixup of three by a flip, which leaves the one in the middle", 1.0, 0.5)
def _(net: Any, x: Tensor, y: Tensor, weight: float) -> Tensor:
    h = torch.tanh(net.a(x[:3]))
    return F.cross_entropy(net.head(torch.tanh(net.b(weight * h + (1 - weight) * h.flip(0)))), y[:3])


@case("a mixing weight in a tensor", torch.zeros(1).double(), torch.ones(1).double())
def _(net: Any, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    h = torch.tanh(net.a(x))
    return F.cross_entropy(net.head(torch.tanh(net.b(h + weight * h.mean(0)))), y)


@case("where a slice begins", 0, 1)
def _(net: Any, x: Tensor, y: Tensor, start: int) -> Tensor:
    h = torch.tanh(net.a(x))
    return F.cross_entropy(net.head(torch.tanh(net.b(torch.cat([h[:, start : start + 3], h[:, :1]], 1)))), y)


@case("along which dimension a roll goes", 1, 0)
def _(net: Any, x: Tensor, y: Tensor, dim: int) -> Tensor:
    return F.cross_entropy(net.head(torch.tanh(net.b(torch.tanh(net.a(x)).roll(1, dim)))), y)


@case("an order of rows", torch.arange(N), torch.arange(N).flip(0))
def _(net: Any, x: Tensor, y: Tensor, order: Tensor) -> Tensor:
    return F.cross_entropy(net.head(torch.tanh(net.b(torch.tanh(net.a(x))[order]))), y)


@case("lengths of packed sequences", torch.tensor([3, 3, 3]), torch.tensor([3, 2, 2, 1, 1]))
def _(net: Any, x: Tensor, y: Tensor, sizes: Tensor) -> Tensor:
    return F.cross_entropy(net.out(net.recurrent(PackedSequence(generated(9, 3), sizes))[1][-1]), y[:3])


@case("an activation's name", "tanh", "relu")
def _(net: Any, x: Tensor, y: Tensor, name: str) -> Tensor:
    return F.cross_entropy(net.head(getattr(torch, name)(net.b(torch.tanh(net.a(x))))), y)


@case("detached or not", True, False)
def _(net: Any, x: Tensor, y: Tensor, detached: bool) -> Tensor:
    h = torch.tanh(net.a(x))
    return F.cross_entropy(net.head(h + torch.tanh(net.b(h.detach() if detached else h))), y)


@case("under no_grad or not", True, False)
def _(net: Any, x: Tensor, y: Tensor, stopped: bool) -> Tensor:
    h = torch.tanh(net.a(x))
    with torch.set_grad_enabled(not stopped):
        k = torch.tanh(net.b(h))
    return F.cross_entropy(net.head(h + k), y)


@case("a dtype on the way", torch.float64, torch.float32)
def _(net: Any, x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    return F.cross_entropy(net.head(torch.tanh(net.b(torch.tanh(net.a(x)).to(dtype).double()))), y)


@case("how many examples", N, N - 2)
def _(net: Any, x: Tensor, y: Tensor, count: int) -> Tensor:
    return F.cross_entropy(net.head(torch.tanh(net.b(torch.tanh(net.a(x[:count]))))), y[:count])


@case("a reduction", "mean", "sum")
def _(net: Any, x: Tensor, y: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(net.head(torch.tanh(net.a(x))), y, reduction=reduction)


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("name", CASES)
def test_a_change_is_noticed(name: str, steps: int) -> None:
    torch.manual_seed(0)
    forward, before, after = CASES[name]
    state, x, y = [before], torch.randn(N, 3, dtype=torch.float64), labels(N, 2)
    problem = of(Net(), lambda net: forward(net, x, y, state[0]))
    summing = Summing(problem)
    for _ in range(steps):
        summing.estimate((-1, 0), 1)
    state[0] = after
    tolerant = name == "a dtype on the way"
    total = summing.gradient()
    if tolerant:
        total = {k: g.float().double() for k, g in total.items()}
        reference = torch.autograd.grad(problem.closure(), problem.parameters(), allow_unused=True)
        for (k, p), g in zip(problem.named, reference, strict=True):
            torch.testing.assert_close(total[k], torch.zeros_like(p) if g is None else g, rtol=1e-4, atol=1e-5)
    else:
        assert_right(problem, total)
    state[0] = before
    assert_right(problem, summing.gradient())


def test_a_gate_that_opens_late() -> None:
    """The branch behind a gate of zero mixes the examples. The optimizer finds this once the gate has opened."""
    torch.manual_seed(0)
    x, y = torch.randn(N, 3, dtype=torch.float64), labels(N, 2)

    def forward(net: Any) -> Tensor:
        h = torch.tanh(net.a(x))
        return F.cross_entropy(net.head(h + net.gate * torch.tanh(net.b(h.roll(1, 0) + h))), y)

    problem = of(Net(), forward)
    summing = Summing(problem)
    for _ in range(9):
        summing.estimate((-1, 0), 1)
    with torch.no_grad():
        dict(problem.named)["gate"].fill_(0.7)
    for _ in range(8):  # a probe comes with the sixteenth step at the latest
        summing.estimate((-1, 0), 1)
    assert_right(problem, summing.gradient())


@pytest.mark.parametrize("estimator", [WPerp(k=2), LearnedFeedback(gamma=0)], ids=["w_perp", "learned_feedback"])
def test_guesses_are_made_from_the_masks_of_the_step(estimator: Any) -> None:
    """A masked unit gets no gradient. The mask changes in every step. Store and replay give equal gradients."""
    found: list[list[Tensor]] = []
    for memory in ("store", "replay"):
        torch.manual_seed(0)
        net, x, y, state = Net().double(), torch.randn(N, 3).double(), labels(N, 2), [half]
        own = {k: p for k, p in net.named_parameters() if k.split(".")[0] in ("a", "b", "head")}

        def closure(net: Any = net, x: Tensor = x, y: Tensor = y, state: list[Tensor] = state) -> Tensor:
            return F.cross_entropy(net.head(torch.tanh(net.b(torch.tanh(net.a(x)) * state[0]))), y)

        opt = GuessGradOptimizer(own.items(), torch.optim.SGD, estimator, lr=0.1, seed=0, memory=memory)
        for step in range(8):
            state[0] = torch.randint(2, (4,), generator=torch.Generator().manual_seed(step)).double().expand(N, 4)
            opt.step(closure)
            assert net.a.weight.grad is not None
            assert torch.equal(net.a.weight.grad[state[0][0] == 0], torch.zeros_like(net.a.weight)[state[0][0] == 0])
        found.append([p.detach() for p in own.values()])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q)


def test_plans_are_bounded_and_hold_no_batch() -> None:
    torch.manual_seed(0)
    net, frozen = Net(), nn.Linear(4, 4).requires_grad_(False)
    params = [*net.a.parameters(), *net.head.parameters()]
    opt, masks = GuessGradOptimizer(params, torch.optim.SGD, "w_perp", lr=0.1), []
    for n in range(2, 2 + 2 * MAX_PLANS):
        mask = torch.ones(n, 4)
        masks.append(weakref.ref(mask))

        def closure(n: int = n, mask: Tensor = mask) -> Tensor:
            return F.cross_entropy(net.head(torch.relu(frozen(net.a(torch.ones(n, 3)) * mask))), labels(n, 2))

        opt.step(closure)
    del closure, mask
    gc.collect()
    assert len(opt.estimation.plans) == MAX_PLANS
    assert sum(mask() is not None for mask in masks) <= 1
    assert len(opt.estimation.cache.state_dict()) == 1  # of the frozen layer, whatever the trace


def test_a_cache_filled_by_the_first_forward() -> None:
    torch.manual_seed(0)
    net, x, y, cache = Net(), torch.randn(N, 3), labels(N, 2), dict[str, Tensor]()

    def closure() -> Tensor:
        if "table" not in cache:
            cache["table"] = torch.arange(4).float().cos()
        return F.cross_entropy(net.head(torch.tanh(net.a(x)) + cache["table"]), y)

    opt = GuessGradOptimizer([*net.a.parameters(), *net.head.parameters()], torch.optim.SGD, lr=0.1)
    assert torch.isfinite(opt.step(closure))


def test_a_closure_that_never_repeats_is_refused_by_the_call_that_differs() -> None:
    net, x, y, runs = Net(), torch.randn(N, 3), labels(N, 2), itertools.count(1)

    def closure() -> Tensor:
        h = net.a(x)
        for _ in range(next(runs)):
            h = torch.tanh(h)
        return F.cross_entropy(net.head(h), y)

    opt = GuessGradOptimizer([*net.a.parameters(), *net.head.parameters()], torch.optim.SGD, lr=0.1)
    with pytest.raises(ClosureError, match=r"does not repeat.*tanh is called in place of linear"):
        opt.step(closure)


@pytest.mark.parametrize("memory", ["replay", "stream"])
@pytest.mark.parametrize("source", ["a tensor from numpy", "a number"])
def test_a_second_pass_that_differs_is_refused(memory: str, source: str) -> None:
    import numpy

    torch.manual_seed(0)
    net, x, y, runs, amount = Net(), torch.randn(N, 3), labels(N, 2), itertools.count(), [0.0]

    def closure() -> Tensor:
        noise = amount[0] * numpy.full((N, 4), next(runs), "float32")  # of which no transaction knows
        h = torch.tanh(net.a(x))
        h = h + torch.from_numpy(noise) if source.startswith("a tensor") else h * (1 + float(noise[0, 0]))
        return F.cross_entropy(net.head(h), y)

    params = [*net.a.parameters(), *net.head.parameters()]
    opt = GuessGradOptimizer(params, torch.optim.SGD, "activation_perturbation", lr=0.1, memory=memory, audit=False)
    for _ in range(3):
        opt.step(closure)
    amount[0] = 1.0
    before = [p.detach().clone() for p in params]
    with pytest.raises(PartialUpdateError if memory == "stream" else ClosureError, match="does not repeat"):
        opt.step(closure)
    if memory == "replay":
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_how_often_a_closure_runs() -> None:
    """One run a step, and more in the steps that probe the batch: after 1, 2, 4, 8, ... passes."""
    net, y, calls = Net(), labels(N, 2), itertools.count()

    def runs(x: Tensor) -> int:
        before = next(calls)

        def closure() -> Tensor:
            next(calls)
            return F.cross_entropy(net.head(torch.tanh(net.a(x))), y)

        opt.step(closure)
        return next(calls) - before - 1

    params = [*net.a.parameters(), *net.head.parameters()]
    opt = GuessGradOptimizer(params, torch.optim.SGD, "w_perp", lr=0.1, audit=False)
    counts = [runs(torch.randn(N, 3)) for _ in range(20)]
    assert all(count == 1 for step, count in enumerate(counts) if step not in (0, 1, 2, 4, 8, 16)), counts
    assert all(count <= 2 for count in counts[1:]), counts
