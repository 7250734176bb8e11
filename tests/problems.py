"""Problems as data: name -> a function that builds a ``Problem``. Problems are small, seeded, and in float64.

One more row in ``PROBLEMS`` is one more case of every test that runs over the table.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import GuessGradOptimizer


@dataclass
class Problem:
    """Parameters and a closure of them.

    Args:
        named: Pairs of name and parameter.
        closure: Computes the loss.
        batch: The number of examples that the engine should find. None: any.
        model, loss: ``closure()`` is ``loss(model)``. None where there is no module.
    """

    named: list[tuple[str, nn.Parameter]]
    closure: Callable[[], Tensor]
    batch: int | None = None
    model: nn.Module | None = None
    loss: Callable[[nn.Module], Tensor] | None = None

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.named]


def of(model: nn.Module, closure: Callable[[nn.Module], Tensor], batch: int | None = None) -> Problem:
    model.double()
    return Problem(list(model.named_parameters()), lambda: closure(model), batch, model, closure)


def seeded(seed: int = 0) -> None:
    """Sets the global random states of torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def labels(n: int, classes: int) -> Tensor:
    return torch.arange(n) % classes


def learned(opt: GuessGradOptimizer) -> dict[str, Any]:
    """What the optimizer's estimators have learned, by site."""
    cache = opt.state_dict()["guessopt"]["cache"]
    return {key: entry["state"] for key, entry in cache.items() if key.startswith("learned: ")}


class Cube(torch.autograd.Function):
    """``x ** 3`` with a ``jvp``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * g * x * x

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * t * x * x


class PassedThrough(torch.autograd.Function):
    """A base class: the derivative is the identity in both modes."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g

    @staticmethod
    def jvp(ctx: Any, v: Tensor) -> Tensor:
        return v.clone()


def mlp() -> Problem:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(7, 4, dtype=torch.float64)
    return of(model, lambda m: F.cross_entropy(m(x), labels(7, 3)), 7)


def gelu_mlp() -> Problem:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    return of(model, lambda m: F.mse_loss(m(x), y), 6)


def cnn() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, stride=2, groups=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    return of(model, lambda m: F.cross_entropy(m(x), labels(5, 3), label_smoothing=0.1), 5)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        h = self.bn2(self.conv2(h))
        h += x
        return F.relu(h)


def residual() -> Problem:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), Block(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=0.3)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.normal_(m.weight)
    model.eval()
    x = torch.randn(4, 1, 5, 5, dtype=torch.float64)
    return of(model, lambda m: F.cross_entropy(m(x), labels(4, 3)), 4)


class Attention(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        a = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
        x = x + self.proj(a.transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, vocabulary: int = 7, d: int = 4, tokens: int = 3, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.position = nn.Embedding(tokens, d)
        self.block = Attention(d, 2)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.block(x)))


def transformer(tied: bool = False) -> Problem:
    ids = torch.randint(7, (5, 3))

    def closure(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(ids).flatten(0, 1), ids.roll(-1, 1).flatten(), ignore_index=3)

    return of(Transformer(tied=tied), closure, 5)


def functional() -> Problem:
    """No layer at all: products, casts, views and expressions of parameters."""
    shapes = {"w1": (3, 6), "b1": (6,), "w2": (6, 4), "scale": (4,), "gate": (2, 2)}
    model = nn.ParameterDict({name: torch.randn(shape) for name, shape in shapes.items()})
    model["temperature"] = torch.tensor(0.5)
    x, y = torch.randn(6, 3, dtype=torch.float64), labels(6, 4)

    def closure(m: Any) -> Tensor:
        h = torch.tanh(x @ m["w1"] + m["b1"])
        h = F.linear(h, (1 + m["w2"]).t()) * m["scale"].exp() + m["gate"].view(-1)
        log_p = torch.log_softmax(h * m["temperature"], -1)
        return -log_p[torch.arange(6), y].mean() + 0.01 * m["w1"].square().sum()

    return of(model, closure, 6)


class Prompted(nn.Module):
    """A class token and prompts in front of patches, learned positions: the parameters reach slices only."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.prompt = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(2, 4))
        self.position = nn.Parameter(torch.randn(1, 6, 4))
        self.patch, self.block, self.head = nn.Linear(3, 4), Attention(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        h = torch.cat([self.token.expand(n, -1, -1), self.prompt.expand(n, -1, -1), self.patch(x)], 1) + self.position
        out: Tensor = self.head(self.block(h)[:, 0])
        return out


def prompted() -> Problem:
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    return of(Prompted(), lambda m: F.cross_entropy(m(x), labels(5, 3)), 5)


class Rotary(nn.Module):
    """A block of a language model: RMSNorm, rotary positions, fused causal attention, a gated MLP."""

    def __init__(self, d: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.RMSNorm(d), nn.RMSNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(d, 6), nn.Linear(d, 6), nn.Linear(6, d)

    @staticmethod
    def rotate(x: Tensor) -> Tensor:
        t, e = x.shape[-2:]
        angle = torch.arange(t, dtype=x.dtype)[:, None] / 10 ** torch.arange(0, e, 2, dtype=x.dtype)
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotary() -> Problem:
    embed = nn.Embedding(7, 4)
    model = nn.Sequential(embed, Rotary(), nn.RMSNorm(4), nn.Linear(4, 7, bias=False))
    ids = torch.randint(7, (5, 3))
    return of(model, lambda m: F.cross_entropy(m(ids).flatten(0, 1), ids.roll(-1, 1).flatten()), 5)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(2, 3, batch_first=False), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.cell(x)
        out: Tensor = self.head(h[0])
        return out


def lstm() -> Problem:
    x = torch.randn(4, 5, 2, dtype=torch.float64)
    return of(Recurrent(), lambda m: F.cross_entropy(m(x), labels(5, 2)), 5)


def unfollowed(f: Callable[..., Any]) -> Callable[..., Any]:
    """Hide ``f`` from the transaction: a failed step does not undo the changes that ``f`` makes to a test's own
    lists."""
    return lru_cache(maxsize=0)(f)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mlp": mlp,
    "gelu mlp": gelu_mlp,
    "cnn": cnn,
    "residual, batch norm in eval mode": residual,
    "transformer": transformer,
    "tied transformer": lambda: transformer(tied=True),
    "functional": functional,
    "prompts": prompted,
    "rotary language model": rotary,
    "lstm": lstm,
}


def build(name: str, seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    return PROBLEMS[name]()
