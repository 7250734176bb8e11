"""Networks with a residual stream, for the tests of learned feedback."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import GuessGradOptimizer, LearnedFeedback
from guessopt.chains import ResidualChain
from guessopt.diagnostics import estimated_gradient

from .problems import labels

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
