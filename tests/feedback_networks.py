"""Networks, optimizers and a slow reference for the tests of learned feedback."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import GuessGradOptimizer, LearnedFeedback

from .problems import Problem, learned

Closure = Callable[[], Tensor]


def network(activation: type[nn.Module] = nn.ReLU, n: int = 16) -> tuple[nn.Sequential, Closure]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 3)).double()
    x = torch.randn(n, 4, dtype=torch.float64)
    return net, lambda: F.cross_entropy(net(x), torch.arange(n) % 3)


def optimizer(net: nn.Module, lr: float = 0.05, **options: Any) -> GuessGradOptimizer:
    return GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, LearnedFeedback(**options), lr=lr, seed=1)


def optimizer_of(made: Problem, **options: Any) -> GuessGradOptimizer:
    return GuessGradOptimizer(made.named, torch.optim.SGD, LearnedFeedback(**options), lr=0.01, seed=1)


#: Networks with a residual stream.
STREAMS = ("residual, batch norm in eval mode", "transformer", "prompts", "rotary language model")


def feedback(opt: GuessGradOptimizer) -> list[Tensor]:
    """The ``B`` of every hidden site, in order."""
    return [state["B"] for state in learned(opt).values()]


class Reference:
    """Learned feedback on an MLP of three linear layers with ReLU, by docs/learned_feedback_derivation.md."""

    def __init__(self, net: nn.Sequential, gamma: float, beta: float, leak: float, ahead: int) -> None:
        self.net, self.gamma, self.beta, self.leak, self.ahead = net, gamma, beta, leak, ahead
        self.b = [torch.zeros(6, 3).double(), torch.zeros(5, 3).double()]
        self.power, self.pairs, self.amplitude, self.steps = [0.0, 0.0], [0.0, 0.0], [1.0, 1.0], 0

    def cotangents(self, x: Tensor, labels: Tensor, ys: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Of the two hidden layers, from guesses at their amplitudes; also the masks, and what was not foreseen."""
        with torch.no_grad():
            n, b, a = len(x), self.b, self.amplitude
            s1 = self.net[0](x)
            s2 = self.net[2](s1.relu())
            s3 = self.net[4](s2.relu())
            m1, m2 = (s1 > 0).double(), (s2 > 0).double()
            w2, w3 = self.net[2].weight, self.net[4].weight
            v = ((ys[0] * m1) @ w2.T + ys[1]) * m2 @ w3.T
            e = (s3.softmax(1) - F.one_hot(labels, 3)) / n
            d = v - (ys[0] * m1) @ b[0] - (ys[1] * m2) @ b[1]
            c = [m1 * (e @ b[0].T), m2 * (e @ b[1].T)]
            if self.ahead:
                c = [m1 * (c[1] @ w2), m2 * (e @ w3)]
            rest = (e * v).sum(1, keepdim=True) - sum((c[i] * ys[i]).sum(1, keepdim=True) for i in range(2))
            return [c[i] + self.gamma * rest * ys[i] / a[i] ** 2 for i in range(2)], [m1, m2], d

    def step(self, x: Tensor, labels: Tensor, ys: list[Tensor]) -> list[Tensor]:
        """The cotangents; learns."""
        g, (m1, m2), d = self.cotangents(x, labels, ys)
        with torch.no_grad():
            n, b, a = len(x), self.b, self.amplitude
            self.steps += 1
            share = max(0.02, 1 / self.steps)
            r = [ys[0] * m1 / a[0], ys[1] * m2 / a[1]]
            for i in range(2):
                self.power[i] += share * (float(r[i].square().sum(1).mean()) - self.power[i])
                pairs = (r[i] * torch.cat([r[i][-1:], r[i][:-1]])).sum(1).square().mean()
                self.pairs[i] += share * (float(pairs) - self.pairs[i])
            width = [max(self.pairs[i] / self.power[i], self.power[i] / (6, 5)[i]) for i in range(2)]
            shared_gain = 1 + sum(self.power[i] / width[i] for i in range(2)) / n
            gain = [max(self.beta, 1 / (self.steps + 1)) / (width[i] * shared_gain) for i in range(2)]
            self.b = [(1 - self.leak) * b[i] + gain[i] * r[i].T @ d / (n * a[i]) for i in range(2)]
            reach = [float(self.b[i].norm()) * width[i] ** 0.5 for i in range(2)]
            self.amplitude = [max(reach) / reach[i] for i in range(2)]
            return g


def inputs(closure: Closure) -> Tensor:
    return next(c.cell_contents for c in closure.__closure__ or () if isinstance(c.cell_contents, Tensor))


def convolutions(n: int = 8) -> tuple[nn.Sequential, Closure]:
    """One way to the next matrix site is elementwise, one holds pooling."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 3),
    ).double()  # fmt: skip
    x = torch.randn(n, 1, 7, 7, dtype=torch.float64)
    return net, lambda: F.cross_entropy(net(x), torch.arange(n) % 3)
