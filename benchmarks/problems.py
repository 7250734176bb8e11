"""The networks that the experiments train, and batches of random data for them.

Every network is an ``nn.Sequential``, so that checkpointing can cut any of them into layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def relu_mlp(width: int, depth: int = 3, *, inputs: int = 40, classes: int = 10) -> nn.Sequential:
    """`depth` hidden ReLU layers of `width` units and a linear head, with torch's default initialisation."""
    layers: list[nn.Module] = []
    for fan_in in [inputs] + [width] * (depth - 1):
        layers += [nn.Linear(fan_in, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def cnn(channels: int = 32, classes: int = 10) -> nn.Sequential:
    """Four 3x3 convolutions with ReLU on 32x32 images, halved in size after each pair, and a linear head."""
    layers: list[nn.Module] = []
    for fan_in, fan_out, stride in [(3, 1, 1), (1, 1, 2), (1, 2, 1), (2, 2, 2)]:
        inputs = 3 if fan_in == 3 else fan_in * channels
        layers += [nn.Conv2d(inputs, fan_out * channels, 3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(2 * channels * 16, classes))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, added to the input; where the shape changes, to its projection."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(fan_out), nn.BatchNorm2d(fan_out)
        self.shortcut = nn.Sequential()
        if fan_in != fan_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(fan_in, fan_out, 1, stride=stride, bias=False), nn.BatchNorm2d(fan_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


def resnet(channels: int = 16, depth: int = 2, classes: int = 10) -> nn.Sequential:
    """A residual network for 32x32 images: three stages of `depth` blocks, of 1, 2 and 4 times the channels."""
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    for stage in range(3):
        width = channels * 2**stage
        layers.append(BasicBlock(width if stage == 0 else width // 2, width, 1 if stage == 0 else 2))
        layers += [BasicBlock(width, width, 1) for _ in range(depth - 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * channels, classes))


class Attention(nn.Module):
    """Multi-head self-attention by ``scaled_dot_product_attention``; ``rotate`` turns queries and keys first."""

    def __init__(self, dim: int, heads: int, *, bias: bool, rotate: nn.Module | None = None) -> None:
        super().__init__()
        self.heads, self.rotate = heads, rotate
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.rotate is not None:
            q, k = self.rotate(q), self.rotate(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.rotate is not None)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, t, d))
        return out


class Rotary(nn.Module):
    """Rotary positions: entries i and i + d/2 of a head are one plane, turned by an angle that grows with the token."""

    cos: Tensor
    sin: Tensor

    def __init__(self, tokens: int, head_dim: int) -> None:
        super().__init__()
        frequencies = 10000 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(tokens), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-second, first], dim=-1) * self.sin


class SwiGLU(nn.Module):
    """``down(silu(gate x) * up x)``: two parallel matrices read the same input."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, norm: Callable[[], nn.Module], mix: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.norm1, self.mix, self.norm2, self.feed_forward = norm(), mix, norm(), feed_forward

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x))
        out: Tensor = x + self.feed_forward(self.norm2(x))
        return out


class PatchTokens(nn.Module):
    """Images to tokens: one a patch, the class token in front, learned positions added."""

    def __init__(self, dim: int, patch: int, size: int) -> None:
        super().__init__()
        tokens = (size // patch) ** 2 + 1
        self.project = nn.Conv2d(3, dim, patch, stride=patch)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, dim))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.project(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls.expand(len(x), -1, -1), patches], dim=1) + self.position


class FirstToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class MeanToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def vit(
    dim: int = 192,
    depth: int = 6,
    heads: int = 3,
    *,
    patch: int = 4,
    size: int = 32,
    classes: int = 10,
    token: type[nn.Module] = FirstToken,
) -> nn.Sequential:
    """A vision transformer that classifies by its class token, or by the mean of all; its defaults give 65 tokens."""

    def block() -> Block:
        feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        return Block(lambda: nn.LayerNorm(dim), Attention(dim, heads, bias=True), feed_forward)

    blocks = [block() for _ in range(depth)]
    return nn.Sequential(PatchTokens(dim, patch, size), *blocks, nn.LayerNorm(dim), token(), nn.Linear(dim, classes))


def causal_lm(
    vocabulary: int = 65, dim: int = 128, depth: int = 4, heads: int = 4, *, tokens: int = 64, hidden: int = 344
) -> nn.Sequential:
    """A Llama-like language model: RMSNorm, rotary positions, SwiGLU, no biases. Logits are ``[N, vocabulary, T]``, as
    cross-entropy takes them."""

    def block() -> Block:
        mix = Attention(dim, heads, bias=False, rotate=Rotary(tokens, dim // heads))
        return Block(lambda: nn.RMSNorm(dim), mix, SwiGLU(dim, hidden))

    blocks = [block() for _ in range(depth)]
    head = nn.Linear(dim, vocabulary, bias=False)
    return nn.Sequential(nn.Embedding(vocabulary, dim), *blocks, nn.RMSNorm(dim), head, VocabularySecond())


class VocabularySecond(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits.transpose(1, 2)


# --- a network with one batch -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A network and one batch for it."""

    model: nn.Sequential
    x: Tensor
    y: Tensor

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def copy(self) -> Problem:
        """A copy of the network with the same batch."""
        return Problem(copy.deepcopy(self.model), self.x, self.y)

    def to(self, device: str) -> Problem:
        return Problem(self.model.to(device), self.x.to(device), self.y.to(device))


def layers(model: nn.Sequential) -> list[nn.Sequential]:
    """The model in pieces. Each piece starts with a module that has parameters, and holds the modules without
    parameters that follow (a ReLU)."""
    pieces: list[list[nn.Module]] = []
    for child in model:
        if not pieces or any(True for _ in child.parameters()):
            pieces.append([])
        pieces[-1].append(child)
    return [nn.Sequential(*piece) for piece in pieces]


def mlp(width: int, depth: int, batch: int) -> Problem:
    return Problem(relu_mlp(width, depth, inputs=width), torch.randn(batch, width), torch.randint(10, (batch,)))


def images(model: nn.Sequential, batch: int) -> Problem:
    return Problem(model, torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,)))


def text(batch: int, tokens: int = 64, dim: int = 128, depth: int = 4) -> Problem:
    ids = torch.randint(65, (batch, tokens + 1))
    model = causal_lm(dim=dim, depth=depth, tokens=tokens)
    return Problem(model, ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
