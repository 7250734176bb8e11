"""The closure may overwrite a value after a call has read it; a refused write stays refused."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import ActivationPerturbation, ClosureError, GuessGradOptimizer, WPerp


class Net(nn.Module):
    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.o, self.table = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2), nn.Embedding(6, 4)
        self.norm, self.scale = nn.LayerNorm(4), nn.Parameter(torch.rand(4) + 0.5)
        self.register_buffer("state", torch.randn(5, 4))


def residual(net: Any, x: Tensor) -> Tensor:
    h = net.e(x)
    h += net.a(h)
    return net.o(h.tanh())  # type: ignore[no-any-return]


def normed(net: Any, x: Tensor) -> Tensor:
    h = net.e(x)
    h += net.a(net.norm(h)).tanh()
    return net.o(h)  # type: ignore[no-any-return]


def scaled(net: Any, x: Tensor) -> Tensor:
    h = net.e(x)
    z = h * net.scale
    h.mul_(0.5)
    return net.o((h + z).tanh())  # type: ignore[no-any-return]


def indices(net: Any, x: Tensor) -> Tensor:
    ids = torch.tensor([0, 1, 2, 0, 1])
    h = net.table(ids) + net.e(x)
    ids += 3
    return net.o(h.tanh())  # type: ignore[no-any-return]


def recurrent(net: Any, x: Tensor) -> Tensor:
    r = torch.tanh(net.e(x) + net.a(net.state))
    with torch.no_grad():
        net.state.copy_(r)
    return net.o(r)  # type: ignore[no-any-return]


@pytest.mark.parametrize("estimator", [WPerp(k=2), ActivationPerturbation()], ids=["w_perp", "activation perturbation"])
@pytest.mark.parametrize("forward", [residual, normed, scaled, indices, recurrent])
def test_an_input_that_is_written_later(forward: Callable[[Any, Tensor], Tensor], estimator: Any) -> None:
    found = []
    for memory in ("store", "replay"):
        torch.manual_seed(0)
        net, x, y = Net().double(), torch.randn(5, 3).double(), torch.randn(5, 2).double()
        opt = GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, estimator, lr=0.1, seed=0, memory=memory)
        for _ in range(3):
            opt.step(lambda net=net, x=x, y=y: F.mse_loss(forward(net, x), y))
        found.append([p.detach() for p in net.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_what_was_refused_stays_refused_if_the_closure_catches_it() -> None:
    net, x, y = Net(), torch.randn(5, 3), torch.randn(5, 2)

    def closure() -> Tensor:
        h = net.e(x)
        with suppress(RuntimeError):
            h.register_hook(lambda g: 2 * g)
        return F.mse_loss(net.o(h), y)

    with pytest.raises(ClosureError, match="register_hook"):
        GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=0.1).step(closure)


def test_a_parameter_may_be_assigned_in_the_closure() -> None:
    net, x, y = Net(), torch.randn(5, 3), torch.randn(5, 2)

    def closure() -> Tensor:
        net.o.bias = net.o.bias
        return F.mse_loss(net.o(net.e(x)), y)

    assert torch.isfinite(GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=0.1).step(closure))


@pytest.mark.parametrize("engine", ["fast", "func"])
@pytest.mark.parametrize("memory", ["store", "replay"])
def test_an_activation_is_no_leaf(engine: str, memory: str) -> None:
    net, x, y = Net(), torch.randn(5, 3), torch.randn(5, 2)

    def closure() -> Tensor:
        h = net.e(x)
        if h.is_leaf or h.grad_fn is None:
            h = h * 2
        return F.mse_loss(net.o(h.tanh()), y)

    expected = closure().detach()
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=0.1, engine=engine, memory=memory)
    torch.testing.assert_close(opt.step(closure), expected)
