"""Networks in which two layers share a guess, or in which a guess is an expanded tensor or a view."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import problems
from .problems import Problem, labels

N = 6


class Net(nn.Module):
    """Named layers and a function of them."""

    def __init__(self, forward: Callable[..., Tensor], **layers: Any) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def of(run: Callable[..., Tensor], *shape: int, **layers: Callable[[], nn.Module]) -> Callable[[], Problem]:
    """``shape``: of one example, ``[4]`` by default."""

    def build() -> Problem:
        torch.manual_seed(0)
        made = {name: layer() for name, layer in layers.items()}
        x = torch.randn(N, *(shape or (4,)), dtype=torch.float64)
        return problems.of(Net(run, **made), lambda net: F.cross_entropy(net(x), labels(N, 3)), N)

    return build


def lin(a: int, b: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(a, b)


def attention(m: Any, x: Tensor) -> Tensor:
    a = torch.softmax(m.q(x) @ m.k(x).mT, -1) @ m.v(x)
    return m.h(m.o(a).mean(1))


NETWORKS: dict[str, Callable[[], Problem]] = {
    "sum of two layers": of(
        lambda m, x: m.h(torch.relu(m.c(m.a(x) + m.b(x)))), a=lin(4, 8), b=lin(4, 8), c=lin(8, 8), h=lin(8, 3)
    ),
    "difference of two layers": of(
        lambda m, x: m.h(torch.relu(m.c(m.a(x) - m.b(x)))), a=lin(4, 8), b=lin(4, 8), c=lin(8, 8), h=lin(8, 3)
    ),
    "sum of three layers of two inputs": of(
        lambda m, x: m.h(torch.relu(m.c(m.a(x) + m.b(x) + m.d(x.tanh())))),
        a=lin(4, 8), b=lin(4, 8), c=lin(8, 8), d=lin(4, 8), h=lin(8, 3),
    ),
    "queries, keys and values": of(attention, 3, 4, q=lin(4, 5), k=lin(4, 5), v=lin(4, 5), o=lin(5, 8), h=lin(8, 3)),
    "gate and up": of(
        lambda m, x: m.h(m.down(F.silu(m.gate(x)) * m.up(x))), gate=lin(4, 8), up=lin(4, 8), down=lin(8, 6), h=lin(6, 3)
    ),
    "shared weights": of(lambda m, x: m.h(torch.tanh(m.a(torch.tanh(m.a(x))))), a=lin(4, 4), h=lin(4, 3)),
    "one layer twice, added": of(lambda m, x: m.h(torch.relu(m.b(m.a(x) + m.a(2 * x)))), a=lin(4, 8), b=lin(8, 8),
                                 h=lin(8, 3)),
    "residual": of(lambda m, x: m.h(x + m.b(torch.relu(m.a(x)))), a=lin(4, 8), b=lin(8, 4), h=lin(4, 3)),
    "cat": of(
        lambda m, x: m.h(torch.relu(m.c(torch.cat([m.a(x), m.b(x)], -1)))), a=lin(4, 5), b=lin(4, 5), c=lin(10, 8),
        h=lin(8, 3),
    ),
    "sum pooling": of(lambda m, x: m.h(torch.relu(m.b(m.a(x).sum(1)))), 5, 4, a=lin(4, 8), b=lin(8, 8), h=lin(8, 3)),
    "mean pooling": of(lambda m, x: m.h(torch.relu(m.b(m.a(x).mean(1)))), 5, 4, a=lin(4, 8), b=lin(8, 8), h=lin(8, 3)),
    "broadcast": of(
        lambda m, x: m.h(torch.relu(m.b(m.a(x)[:, None] + m.c(x)[:, None].expand(-1, 3, -1))).sum(1)),
        a=lin(4, 8), b=lin(8, 8), c=lin(4, 8), h=lin(8, 3),
    ),
    "halves": of(lambda m, x: m.h(torch.relu(m.b(sum(m.a(x).chunk(2, -1))))), a=lin(4, 16), b=lin(8, 8), h=lin(8, 3)),
    "convolutions, added": of(
        lambda m, x: m.h(torch.relu(m.c(m.a(x) + m.b(x))).flatten(1)), 2, 4, 4,
        a=lambda: nn.Conv2d(2, 3, 3), b=lambda: nn.Conv2d(2, 3, 3), c=lambda: nn.Conv2d(3, 3, 1), h=lin(12, 3),
    ),
    "norm": of(
        lambda m, x: m.h(torch.relu(m.b(m.n(m.a(x))))), 5, 4,
        a=lin(4, 8), n=lambda: nn.LayerNorm(8), b=lin(8, 8), h=lambda: nn.Sequential(nn.Flatten(), nn.Linear(40, 3)),
    ),
}  # fmt: skip
