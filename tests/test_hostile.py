"""Closures that are easy to get wrong. Either the gradient is right, or an error names the cause and the remedy.

The gradient is right if the sum over one-hot guesses is the gradient that autograd computes, as in ``test_exactness``.
"""

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from guessopt import ClosureError, GuessGradOptimizer
from guessopt.layout import Layout
from guessopt.step.guessing import directions

from .problems import Attention, Cube, Problem, Transformer, labels, of
from .test_exactness import Summing, sum_over_one_hots

pytestmark = pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")  # some of these couple the examples

Forward = Callable[[nn.Module], Any]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


class Lambda(nn.Module):
    """A function of named layers and the input, as a module."""

    def __init__(self, f: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.f = f
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *args: Any) -> Any:
        return self.f(self, *args)


# ------------------------------------------------------------------------------------- where the examples lie


def causal_lm(n: int, tokens: int, d: int = 4) -> Problem:
    ids = torch.randint(5, (n, tokens))
    return of(Transformer(5, d, tokens), lambda m: F.cross_entropy(m(ids).flatten(0, 1), ids.roll(-1, 1).flatten()), n)


def encoder(n: int = 3, tokens: int = 2, *, batch_first: bool = False, dropout: float = 0.0) -> Problem:
    """Two layers: after the attention, the operations of a layer treat tokens like examples."""
    layers = [nn.TransformerEncoderLayer(4, 2, 3, dropout=dropout, batch_first=batch_first) for _ in range(2)]
    x = randn(n, tokens, 4) if batch_first else randn(tokens, n, 4)

    def closure(m: nn.Module) -> Tensor:
        torch.manual_seed(1)
        return F.cross_entropy(m(x).mean(1 if batch_first else 0), labels(n, 4))

    return of(net(*layers), closure, n)


def flattened(order: str) -> Problem:
    """Linear layers on ``[T*N, d]`` or ``[N*T, d]``, after a layer on ``[N, T, d]``."""
    model = nn.ModuleList([nn.Linear(3, 4), net(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))])
    x, y = randn(4, 3, 3), randn(12, 2)

    def closure(m: Any) -> Tensor:
        h = torch.tanh(m[0](x))
        return F.mse_loss(m[1](h.transpose(0, 1).reshape(12, 4) if order == "time" else h.reshape(12, 4)), y)

    return of(model, closure, 4)


def only_flattened(order: str) -> Problem:
    """The input is flattened: only the losses tell the number of examples, and every divisor is right."""
    model = net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = randn(3, 2, 3), randn(6, 2)
    return of(model, lambda m: F.mse_loss(m((x.transpose(0, 1) if order == "time" else x).reshape(6, 3)), y))


def mixed_flattening() -> Problem:
    """A batch-major and a time-major flatten in one network, attention between."""
    parts = {"first": nn.Linear(2, 4), "attention": Attention(4, 2), "last": nn.Linear(4, 3)}
    x = randn(3, 2, 2)

    def forward(m: Any) -> Tensor:
        h = m.first(x.reshape(6, 2)).view(3, 2, 4)
        h = m.attention(h)
        return F.cross_entropy(m.last(h.transpose(0, 1).reshape(6, 4)), labels(6, 3))

    return of(Lambda(forward, **parts), lambda m: m(), 3)


def contrastive(norm: bool = False) -> Problem:
    """InfoNCE: every example's loss reads every example's output."""
    model = net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    one, two = randn(4, 3), randn(4, 3)

    def closure(m: nn.Module) -> Tensor:
        a, b = F.normalize(m(one), dim=-1), F.normalize(m(two), dim=-1)
        return F.cross_entropy(a @ b.T / 0.2, torch.arange(4))

    return of(model, closure, 4)


def similarity_network() -> Problem:
    """A layer reads the similarities: the examples interact before the loss."""
    parts = {"encode": net(nn.Linear(3, 4), nn.Tanh()), "read": nn.Linear(4, 2)}
    x = randn(4, 3)

    def forward(m: Any) -> Tensor:
        z = m.encode(x)
        return F.cross_entropy(m.read(z @ z.T), labels(4, 2))

    return of(Lambda(forward, **parts), lambda m: m(), 4)


class MixtureOfExperts(nn.Module):
    def __init__(self, d: int = 3) -> None:
        super().__init__()
        self.embed, self.router = nn.Linear(d, d), nn.Linear(d, 2)
        self.experts = nn.ModuleList(net(nn.Linear(d, 4), nn.GELU(), nn.Linear(4, d)) for _ in range(2))
        self.head = nn.Linear(d, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        tokens = self.embed(x).reshape(n * t, d)
        weight, chosen = self.router(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for k, expert in enumerate(self.experts):
            where = (chosen == k).nonzero().squeeze(1)
            part = expert(tokens.index_select(0, where)) * weight[where, None]
            out.index_add_(0, where, part)
        return self.head((tokens + out).view(n, t, d).mean(1))


def mixture(n: int = 4, tokens: int = 2) -> Problem:
    x = randn(n, tokens, 3)
    return of(MixtureOfExperts(), lambda m: F.cross_entropy(m(x), labels(n, 2)), n)


# ------------------------------------------------------------------------------- how parameters meet activations


def layouts_of_one_weight() -> Problem:
    """One layer as ``[N, T, d]``, as ``[N*T, d]`` and as ``[T*N, d]``."""
    parts = {"mix": nn.Linear(3, 3), "head": nn.Linear(3, 2)}
    x = randn(4, 2, 3)

    def forward(m: Any) -> Tensor:
        h = torch.tanh(m.mix(x)).reshape(8, 3)
        h = torch.tanh(m.mix(h)).view(4, 2, 3).transpose(0, 1).reshape(8, 3)
        h = torch.tanh(m.mix(h)).view(2, 4, 3)
        return F.cross_entropy(m.head(h.mean(0)), labels(4, 2))

    return of(Lambda(forward, **parts), lambda m: m(), 4)


def tied() -> Problem:
    ids = torch.randint(4, (3, 2))
    parts = {"embed": nn.Embedding(4, 3), "mix": nn.Linear(3, 3)}

    def forward(m: Any) -> Tensor:
        h = torch.tanh(m.mix(m.embed(ids)))
        return F.cross_entropy((h @ m.embed.weight.t()).transpose(1, 2), ids.roll(-1, 1))

    return of(Lambda(forward, **parts), lambda m: m(), 3)


def attention(*, need_weights: bool, batch_first: bool, dropout: float = 0.0, causal: bool = False) -> Problem:
    parts = {
        "attend": nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=batch_first),
        "head": nn.Linear(4, 2),
    }
    x = randn(3, 2, 4)
    mask = nn.Transformer.generate_square_subsequent_mask(2, dtype=torch.float64) if causal else None

    def forward(m: Any) -> Tensor:
        torch.manual_seed(1)
        h = x if batch_first else x.transpose(0, 1)
        h, weights = m.attend(h, h, h, need_weights=need_weights, attn_mask=mask, is_causal=causal)
        loss = F.cross_entropy(m.head(h.mean(1 if batch_first else 0)), labels(3, 2))
        return loss + weights.square().mean() if need_weights else loss

    return of(Lambda(forward, **parts), lambda m: m(), 3)


def fused_attention(**options: Any) -> Problem:
    parts = {"qkv": nn.Linear(4, 12), "head": nn.Linear(4, 2)}
    x = randn(3, 2, 4)

    def forward(m: Any) -> Tensor:
        torch.manual_seed(1)
        q, k, v = m.qkv(x).view(3, 2, 3, 2, 2).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).reshape(3, 2, 4)
        return F.cross_entropy(m.head(h.mean(1)), labels(3, 2))

    return of(Lambda(forward, **parts), lambda m: m(), 3)


def recurrent(kind: Any, *, batch_first: bool, hidden: bool, **options: Any) -> Problem:
    parts = {"cell": kind(2, 3, batch_first=batch_first, **options)}
    width = (2 if options.get("bidirectional") else 1) * 3
    parts["head"] = nn.Linear(3 if hidden else width, 2)
    x = randn(4, 3, 2) if batch_first else randn(3, 4, 2)

    def forward(m: Any) -> Tensor:
        out, state = m.cell(x)
        h = state[0] if isinstance(state, tuple) else state
        h = h[-1] if hidden else out.mean(1 if batch_first else 0)
        return F.cross_entropy(m.head(h), labels(4, 2))

    return of(Lambda(forward, **parts), lambda m: m(), 4)


def recurrent_cell() -> Problem:
    parts = {"cell": nn.LSTMCell(2, 3), "head": nn.Linear(3, 2)}
    x = randn(4, 3, 2)

    def forward(m: Any) -> Tensor:
        state = None
        for t in range(3):
            state = m.cell(x[:, t], state)
        assert state is not None
        return F.cross_entropy(m.head(state[0]), labels(4, 2))

    return of(Lambda(forward, **parts), lambda m: m(), 4)


def classifier(forward: Callable[..., Tensor], n: int = 4, *, classes: int = 2, **parts: Any) -> Problem:
    """Cross-entropy of ``forward(module)``, ``[n, classes]``."""
    return of(Lambda(forward, **parts), lambda m: F.cross_entropy(m(), labels(n, classes)), n)


def simple(*layers: nn.Module, shape: tuple[int, ...] = (4, 3)) -> Problem:
    """``layers``, cross-entropy of the flattened output."""
    x = randn(*shape)

    def closure(m: nn.Module) -> Tensor:
        out = m(x).flatten(1)
        return F.cross_entropy(out, labels(shape[0], out.shape[1]))

    return of(net(*layers), closure, shape[0])


def bag() -> Problem:
    ids, offsets = torch.randint(5, (9,)), torch.tensor([0, 2, 5, 6])
    return classifier(lambda m: m.head(m.bag(ids, offsets)), bag=nn.EmbeddingBag(5, 3), head=nn.Linear(3, 2))


def bag_of_rows(mode: str) -> Problem:
    ids = torch.randint(5, (4, 3))
    return classifier(lambda m: m.head(m.bag(ids)), bag=nn.EmbeddingBag(5, 3, mode=mode), head=nn.Linear(3, 2))


def bilinear() -> Problem:
    a, b = randn(4, 3), randn(4, 2)
    return classifier(
        lambda m: m.join(m.one(a), m.two(b)), one=nn.Linear(3, 2), two=nn.Linear(2, 3), join=nn.Bilinear(2, 3, 2)
    )


def einsum(equation: str = "ntd,dhk->nthk") -> Problem:
    x = randn(4, 2, 3)
    return classifier(
        lambda m: m.head(torch.tanh(torch.einsum(equation, m.first(x), m.w)).flatten(2).mean(1)),
        first=nn.Linear(3, 3), w=torch.randn(3, 2, 2), head=nn.Linear(4, 2),
    )  # fmt: skip


def bias_in_place(how: str) -> Problem:
    x = randn(4, 3)

    def forward(m: Any) -> Tensor:
        h = m.first(x)
        if how == "add_":
            h.add_(m.bias)
        elif how == "mul_":
            h.mul_(m.bias)
        else:
            h += m.bias
        return m.head(torch.tanh(h))

    return classifier(forward, first=nn.Linear(3, 3, bias=False), bias=torch.randn(3), head=nn.Linear(3, 2))


def bias_in_place_of_the_input() -> Problem:
    """The closure's own buffer, not made by any site."""
    x = randn(4, 3)

    def forward(m: Any) -> Tensor:
        h = x.clone()
        h += m.bias
        return m.head(h)

    return classifier(forward, bias=torch.randn(3), head=nn.Linear(3, 2))


def class_token(how: str) -> Problem:
    x = randn(4, 2, 3)

    def forward(m: Any) -> Tensor:
        h = m.first(x)
        if how == "cat":
            h = torch.cat([m.token.expand(4, -1, -1), h], 1)
        elif how == "stack":
            h = torch.stack([m.token[0, 0].expand(4, -1), h[:, 0], h[:, 1]], 1)
        else:
            buf = h.new_zeros(4, 3, 3)
            buf[:, 1:] = h
            buf[:, 0] = m.token[0, 0]
            h = buf
        h = m.attend(h + m.position[:, : h.shape[1]])
        return m.head(h[:, 0])

    return classifier(
        forward, first=nn.Linear(3, 3), token=torch.randn(1, 1, 3), position=torch.randn(1, 5, 3),
        attend=net(Lambda(lambda m, h: h + torch.softmax(h @ h.mT, -1) @ h), nn.Linear(3, 3)), head=nn.Linear(3, 2),
    )  # fmt: skip


def prompt() -> Problem:
    """Only the prompt is trained; the network is frozen."""
    frozen = net(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double().requires_grad_(False)
    x = randn(4, 2, 3)
    return classifier(
        lambda m: frozen(torch.cat([m.prompt.expand(4, -1, -1), x], 1).cumsum(1)).mean(1), prompt=torch.randn(1, 2, 3)
    )


def batch_norm() -> Problem:
    return simple(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Linear(2, 2))


def affine_norms() -> Problem:
    return simple(
        nn.Conv1d(2, 4, 1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3),
        nn.RMSNorm(3), nn.Linear(3, 2), shape=(3, 2, 2),
    )  # fmt: skip


def randomised_norms() -> Problem:
    problem = affine_norms()
    with torch.no_grad():
        for p in problem.parameters():
            p.normal_()
    return problem


def normed(norm: Any) -> Problem:
    return simple(norm(nn.Linear(3, 4)), nn.Tanh(), norm(nn.Linear(4, 2)))


def spectral_norm() -> Problem:
    """In eval mode. In training mode each forward moves the power iteration, and with it the loss."""
    x, norm = randn(4, 3), torch.nn.utils.parametrizations.spectral_norm
    model = net(norm(nn.Linear(3, 4)), nn.Tanh(), norm(nn.Linear(4, 2))).eval()
    return of(model, lambda m: F.cross_entropy(m(x), labels(4, 2)), 4)


def masked_weight() -> Problem:
    """A constant mask on a square weight, its first dimension as long as the batch."""
    x, mask = randn(4, 4), (torch.rand(4, 4) > 0.4).double()
    return classifier(
        lambda m: m.head(torch.tanh(F.linear(m.first(x), m.w * mask))),
        first=nn.Linear(4, 4), w=torch.randn(4, 4), head=nn.Linear(4, 2),
    )  # fmt: skip


def merged_update() -> Problem:
    """A frozen weight plus a trainable one of low rank, merged before use."""
    x, frozen = randn(4, 4), randn(8, 4)
    return classifier(
        lambda m: m.head(torch.tanh(F.linear(x, frozen + m.b @ m.a))),
        a=torch.randn(2, 4),
        b=torch.randn(8, 2),
        head=nn.Linear(8, 2),
    )


def pruned() -> Problem:
    convolution = nn.Conv1d(2, 4, 1)
    torch.nn.utils.prune.random_unstructured(convolution, "weight", 0.3)
    return simple(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(8, 2), shape=(4, 2, 2))


def masked_bias() -> Problem:
    """A constant mask on a parameter with one row per example: its product looks like an activation."""
    x, mask = randn(4, 4), (torch.rand(4, 3) > 0.4).double()
    return classifier(lambda m: m.head(torch.tanh(m.first(x) + m.w * mask)), first=nn.Linear(4, 3),
        w=torch.randn(4, 3), head=nn.Linear(3, 2))  # fmt: skip


def expressions() -> Problem:
    x = randn(4, 3)

    def forward(m: Any) -> Tensor:
        h = x * (1 + m.gain)
        h = torch.tanh(h @ m.w.t() + m.b.view(-1)[:3])
        return F.linear(h, torch.cat([m.w[:1], m.w[1:2] * 2]))

    return classifier(forward, gain=torch.randn(3), w=torch.randn(3, 3), b=torch.randn(2, 2))


def dropped_weight() -> Problem:
    x = randn(4, 3)

    def forward(m: Any) -> Tensor:
        torch.manual_seed(1)
        h = torch.tanh(F.linear(x, F.dropout(m.w, 0.5)))
        return m.head(F.dropout(h, 0.3))

    return classifier(forward, w=torch.randn(4, 3), head=nn.Linear(4, 2))


# ------------------------------------------------------------------------------------------ losses and control


def auxiliary() -> Problem:
    """A second loss on a hidden output that the network goes on to use."""
    parts = {"first": nn.Linear(3, 4), "second": nn.Linear(4, 2), "probe": nn.Linear(4, 1)}
    x = randn(4, 3)

    def forward(m: Any) -> Tensor:
        h = torch.tanh(m.first(x))
        penalty = h.square().mean() + F.mse_loss(m.probe(h)[:, 0], x[:, 0])
        return F.cross_entropy(m.second(h), labels(4, 2)) + 0.3 * penalty

    return of(Lambda(forward, **parts), lambda m: m(), 4)


def weighted_losses() -> Problem:
    x = randn(4, 3)

    def forward(m: Any) -> Tensor:
        out = m.head(torch.tanh(m.first(x)))
        one, two = F.cross_entropy(out[:, :2], labels(4, 2)), F.mse_loss(out[:, 2:], x[:, :1])
        return m.a * one + m.b.exp() * two + m.a.square() - 0.5 * m.b

    return of(
        Lambda(forward, first=nn.Linear(3, 4), head=nn.Linear(4, 3), a=torch.tensor(0.7), b=torch.tensor(-0.2)),
        lambda m: m(), 4,
    )  # fmt: skip


def per_example() -> Problem:
    model = net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = randn(4, 3)
    return of(model, lambda m: F.cross_entropy(m(x), labels(4, 2), reduction="none"), 4)


@dataclasses.dataclass
class Output:
    loss: Tensor
    logits: Tensor


def output_object() -> Problem:
    def forward(m: Any) -> dict[str, Any]:
        logits = m.head(torch.tanh(m.first(x)))
        return {"out": Output(F.cross_entropy(logits, labels(4, 2)), logits), "hidden": [logits]}

    x = randn(4, 3)
    return of(Lambda(forward, first=nn.Linear(3, 4), head=nn.Linear(4, 2)), lambda m: m()["out"].loss, 4)


def logging() -> Problem:
    model = net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, log = randn(4, 3), []

    def closure(m: nn.Module) -> Tensor:
        out = m(x)
        loss = F.cross_entropy(out, labels(4, 2))
        accuracy = (out.argmax(-1) == labels(4, 2)).float().mean()
        log.append((loss.item(), float(accuracy), out.detach().cpu().numpy(), f"{loss:.3f}", out.tolist()))
        return loss

    return of(model, closure, 4)


def teacher(how: str) -> Problem:
    """A target without gradient, computed with the trained weights."""
    parts = {"first": nn.Linear(3, 4), "head": nn.Linear(4, 2)}
    x, y = randn(4, 3), randn(4, 3)

    def forward(m: Any) -> Tensor:
        out = m.head(torch.tanh(m.first(x)))
        if how == "detach":
            target = m.head(torch.tanh(m.first(y))).detach()
        elif how == "data":
            target = m.head(torch.tanh(m.first(y))).data
        elif how == "detached weights":
            target = F.linear(torch.tanh(m.first(y)), m.head.weight.detach(), m.head.bias.detach())
        elif how == "no_grad hidden":
            with torch.no_grad():
                h = torch.tanh(m.first(y))
            target = m.head(h)
        else:
            with torch.no_grad():
                target = m.head(torch.tanh(m.first(y)))
        return F.mse_loss(out, target)

    return of(Lambda(forward, **parts), lambda m: m(), 4)


def checkpointed(use_reentrant: bool) -> Problem:
    x = randn(4, 3)
    return classifier(
        lambda m: m.head(checkpoint(m.block, m.first(x), use_reentrant=use_reentrant)),
        first=nn.Linear(3, 4),
        block=net(nn.Linear(4, 4), nn.Tanh()),
        head=nn.Linear(4, 2),
    )


class StraightThrough(torch.autograd.Function):
    """A backward that is not the derivative of the forward; no ``jvp``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Scale(torch.autograd.Function):
    """Reads a parameter; no ``jvp``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


class Once(StraightThrough):
    """A backward that cannot be differentiated."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def straight_through() -> Problem:
    x = randn(4, 3)
    return classifier(lambda m: m.head(StraightThrough.apply(m.first(x))), first=nn.Linear(3, 4), head=nn.Linear(4, 2))


def profiled() -> Problem:
    """``record_function`` names a stretch of the closure for the profiler."""
    x = randn(4, 3)

    def forward(m: Any) -> Tensor:
        with torch.profiler.record_function("first"):
            h = torch.relu(m.first(x))
        return m.head(h)

    return classifier(forward, first=nn.Linear(3, 4), head=nn.Linear(4, 2))


def untouched() -> Problem:
    """Calls that return their argument: nothing is written."""
    x = randn(4, 3)

    def forward(m: Any) -> Tensor:
        h = m.first(x)
        r = h
        h = F.dropout(torch.relu(h.contiguous()).to(torch.float64), 0.0)
        return m.head(m.second(h) + r.contiguous())

    return classifier(forward, first=nn.Linear(3, 4), second=nn.Linear(4, 4), head=nn.Linear(4, 2))


def custom_function() -> Problem:
    x = randn(4, 3)
    return classifier(lambda m: m.head(Cube.apply(m.first(x))), first=nn.Linear(3, 4), head=nn.Linear(4, 2))


def custom_function_of_weights() -> Problem:
    x = randn(4, 3)
    return classifier(
        lambda m: m.head(F.linear(x, StraightThrough.apply(3 * m.w))), w=torch.randn(4, 3), head=nn.Linear(4, 2)
    )


def custom_site() -> Problem:
    x = randn(4, 3)
    return classifier(lambda m: m.head(Scale.apply(x, m.w)), w=torch.randn(3), head=nn.Linear(3, 2))


def at_kinks(f: Callable[[Tensor], Tensor]) -> Problem:
    """``f`` of numbers of which every third is 0."""
    x = randn(4, 6)
    x[:, ::3] = 0.0
    width = f(x).shape[1]
    return classifier(lambda m: m.head(f(x + m.w)), w=torch.zeros(6), head=nn.Linear(width, 2))


def _products(x: Tensor) -> Tensor:
    return x.new_ones(len(x), 2).scatter_reduce(1, torch.arange(6).remainder(2).expand(len(x), 6), x, "prod")


KINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "prelu at 0": lambda x: F.prelu(x, torch.tensor([0.25], dtype=x.dtype)),
    "fmax of equals": lambda x: torch.fmax(x, torch.zeros_like(x)),
    "maximum of equals": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "products with zeros": lambda x: x.unflatten(1, (2, 3)).prod(2),
    "scattered products with zeros": _products,
    "relu at 0": torch.relu,
    "abs at 0": torch.abs,
    "clamp at its ends": lambda x: x.clamp(0, 1),
    "amax of equals": lambda x: x.clamp(max=0).unflatten(1, (2, 3)).amax(2),
}


def channels_as_many_as_examples() -> Problem:
    x = randn(2, 2, 4, 4)
    return classifier(lambda m: m.norm(x).flatten(1)[:, :2], n=2, norm=nn.BatchNorm2d(2))


def one_image() -> Problem:
    x, target = randn(1, 2, 4, 4), randn(1, 2, 4, 4)
    return of(net(nn.BatchNorm2d(2)), lambda m: F.mse_loss(m(x), target))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "batch = heads": lambda: causal_lm(2, 3),
    "batch = tokens": lambda: causal_lm(3, 3),
    "batch = features": lambda: causal_lm(4, 2),
    "batch = tokens = heads": lambda: causal_lm(2, 2),
    "batch of 1": lambda: causal_lm(1, 3),
    "sequence first": encoder,
    "sequence first, batch = tokens": lambda: encoder(2, 2),
    "batch-first encoder": lambda: encoder(batch_first=True),
    "encoder with dropout": lambda: encoder(dropout=0.3),
    "T-major flatten": lambda: flattened("time"),
    "batch-major flatten": lambda: flattened("batch"),
    "T-major flatten from the input on": lambda: only_flattened("time"),
    "batch-major flatten from the input on": lambda: only_flattened("batch"),
    "both flattens": mixed_flattening,
    "in-batch contrastive loss": contrastive,
    "layer on in-batch similarities": similarity_network,
    "mixture of experts": mixture,
    "one weight, three layouts": layouts_of_one_weight,
    "tied embedding": tied,
    **{
        f"MultiheadAttention, {need_weights=}, {batch_first=}, {dropout=}": (
            partial(attention, need_weights=need_weights, batch_first=batch_first, dropout=dropout)
        )
        for need_weights in (True, False)
        for batch_first in (True, False)
        for dropout in (0.0, 0.4)
    },
    "MultiheadAttention, causal": lambda: attention(need_weights=False, batch_first=True, causal=True),
    "fused attention": fused_attention,
    "fused attention, causal": lambda: fused_attention(is_causal=True),
    "fused attention, mask": lambda: fused_attention(attn_mask=torch.tensor([[True, False], [True, True]])),
    "fused attention, dropout": lambda: fused_attention(dropout_p=0.3),
    **{
        f"{kind.__name__}, {batch_first=}, {hidden=}": (
            partial(recurrent, kind, batch_first=batch_first, hidden=hidden)
        )
        for kind in (nn.LSTM, nn.GRU)
        for batch_first in (True, False)
        for hidden in (True, False)
    },
    "RNN": lambda: recurrent(nn.RNN, batch_first=True, hidden=False),
    "LSTM, bidirectional": lambda: recurrent(nn.LSTM, batch_first=True, hidden=False, bidirectional=True),
    "LSTM, two layers": lambda: recurrent(nn.LSTM, batch_first=True, hidden=True, num_layers=2),
    "LSTMCell": recurrent_cell,
    "EmbeddingBag": bag,
    "EmbeddingBag, rows": lambda: bag_of_rows("mean"),
    "EmbeddingBag, max": lambda: bag_of_rows("max"),
    "Bilinear": bilinear,
    "einsum": einsum,
    "bias.add_": lambda: bias_in_place("add_"),
    "gain.mul_": lambda: bias_in_place("mul_"),
    "+= bias": lambda: bias_in_place("+="),
    "+= bias on a clone": bias_in_place_of_the_input,
    "class token by cat": lambda: class_token("cat"),
    "class token by stack": lambda: class_token("stack"),
    "class token by setitem": lambda: class_token("setitem"),
    "prompt": prompt,
    "batch norm in training mode": batch_norm,
    "affine norms": randomised_norms,
    "weight_norm": lambda: normed(torch.nn.utils.parametrizations.weight_norm),
    "weight_norm, old": lambda: normed(torch.nn.utils.weight_norm),
    "spectral_norm": spectral_norm,
    "mask on a weight": masked_weight,
    "mask with a row per example": masked_bias,
    "merged low-rank update": merged_update,
    "pruned convolution": pruned,
    "expressions": expressions,
    "dropout of weights": dropped_weight,
    "auxiliary loss": auxiliary,
    "learned loss weights": weighted_losses,
    "per-example losses": per_example,
    "output object": output_object,
    "logging": logging,
    **{f"target: {how}": partial(teacher, how) for how in (
        "detach", "data", "no_grad", "no_grad hidden", "detached weights")},
    "checkpoint": lambda: checkpointed(False),
    "checkpoint, reentrant": lambda: checkpointed(True),
    "autograd.Function with jvp": custom_function,
    "calls that touch nothing": untouched,
    **{name: partial(at_kinks, f) for name, f in KINKS.items()},
    "batch norm, batch = channels": channels_as_many_as_examples,
    "batch norm of one image": one_image,
    "autograd.Function without jvp": straight_through,
    "autograd.Function of weights": custom_function_of_weights,
    "autograd.Function that reads a parameter": custom_site,
    "named for the profiler": profiled,
}  # fmt: skip


#: Examples interact before the loss.
COUPLED = {"layer on in-batch similarities", "mixture of experts", "batch norm in training mode"}


def assert_gradient(problem: Problem, found: dict[str, Tensor], rtol: float = 1e-9) -> None:
    for p in problem.parameters():
        p.grad = None
    problem.closure().mean().backward()
    for name, p in problem.named:
        g = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found[name], g, rtol=rtol, atol=rtol * (float(g.abs().max()) + 1e-2), msg=name)


#: Many guesses on networks of the kind of another one: two layers of an encoder, and a causal language model.
DEAR = ("encoder with dropout", "batch-first encoder", "sequence first", "batch = heads", "batch = tokens",
        "batch = features")  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in DEAR else name for name in PROBLEMS]
)
def test_the_gradient_is_right(name: str) -> None:
    problem = PROBLEMS[name]()
    found, opt = sum_over_one_hots(problem, "fast")
    assert_gradient(problem, found)
    graph = opt.estimation.plans[0].graph
    assert problem.batch in (None, graph.batch)
    assert any(site.layout is Layout.COUPLED for site in graph.sites) == (name in COUPLED)


# ------------------------------------------------------------------------------- closures that change on the way


def test_a_zero_initialised_head() -> None:
    """The first step's probe sees no derivative and guesses a wrong layout: there are as many examples as tokens."""
    layers = [nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0) for _ in range(2)]
    head, x = nn.Linear(4, 2), randn(2, 2, 4)
    model = net(*layers, head)
    nn.init.zeros_(head.weight)
    problem = of(model, lambda m: F.cross_entropy(m(x).mean(0), labels(2, 2)), 2)
    summing = Summing(problem)
    with torch.no_grad():
        head.weight.normal_()
    assert_gradient(problem, summing.gradient())
    assert {site.layout for site in summing.opt.estimation.plans[0].graph.sites} <= {Layout.BATCH_SECOND, Layout.FLAT_T}


def test_a_branch_taken_on_some_steps_only() -> None:
    parts = {"first": nn.Linear(3, 4), "extra": nn.Linear(4, 4), "head": nn.Linear(4, 2)}
    x, calls, state = randn(4, 3), count(), {"branch": False}

    def forward(m: Any) -> Tensor:
        next(calls)
        h = torch.tanh(m.first(x))
        if state["branch"]:
            h = torch.tanh(m.extra(h))
        return F.cross_entropy(m.head(h), labels(4, 2))

    problem = of(Lambda(forward, **parts), lambda m: m(), 4)
    summing = Summing(problem)
    for branch in (True, False, True):
        state["branch"] = branch
        assert_gradient(problem, summing.gradient())
    assert len(summing.opt.estimation.plans) == 2

    def calls_of_a_step() -> int:
        before = next(calls)
        summing.estimate((-1, 0), 4)
        return next(calls) - before - 1

    for plan in summing.opt.estimation.plans:
        plan.uses = 100  # no probe is due
    state["branch"] = True
    assert [calls_of_a_step() for _ in range(4)] == [1] * 4
    for _ in range(6):
        state["branch"] = not state["branch"]
        assert calls_of_a_step() == 2  # the plan of the step before is tried first, as far as it goes
    assert len(summing.opt.estimation.plans) == 2


@pytest.mark.parametrize("kind", ["last batch", "sequence length"])
def test_shapes_that_change(kind: str) -> None:
    model = net(nn.Embedding(5, 3), Lambda(lambda m, h: torch.tanh(h.cumsum(1))), nn.Linear(3, 5))
    full = torch.randint(5, (4, 3))
    state = {"ids": full}

    def closure(m: nn.Module) -> Tensor:
        ids = state["ids"]
        return F.cross_entropy(m(ids).flatten(0, 1), ids.roll(-1, 1).flatten())

    problem = of(model, closure)
    summing = Summing(problem)
    for ids in (full, torch.randint(5, (3, 3) if kind == "last batch" else (4, 2)), full):
        state["ids"] = ids
        assert_gradient(problem, summing.gradient())
        assert summing.opt.estimation.plans[0].graph.batch == len(ids)
    assert len(summing.opt.estimation.plans) == 2


def test_numbers_that_change_from_step_to_step() -> None:
    model, x, state = net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), randn(4, 3), {"scale": 1.0}

    def closure(m: Any) -> Tensor:
        return state["scale"] * F.cross_entropy(m[2](m[1](m[0](x)) * state["scale"]), labels(4, 2))

    problem = of(model, closure, 4)
    summing = Summing(problem)
    for scale in (0.5, -3.0):
        state["scale"] = scale
        assert_gradient(problem, summing.gradient())
    assert len(summing.opt.estimation.plans) == 1


def test_rows_whose_order_depends_on_the_data() -> None:
    """Sorted by length, or sent to experts: the data tell the place of an example, the shapes do not."""
    parts = {"first": nn.Linear(3, 4), "second": nn.Linear(4, 4), "head": nn.Linear(4, 2)}
    x, state = randn(4, 3), {"order": torch.arange(4)}

    def forward(m: Any) -> Tensor:
        h = torch.tanh(m.first(x))[state["order"]]
        h = torch.tanh(m.second(h))[state["order"].argsort()]
        return F.cross_entropy(m.head(h), labels(4, 2))

    problem = of(Lambda(forward, **parts), lambda m: m(), 4)
    summing = Summing(problem)
    summing.gradient()
    state["order"] = torch.tensor([1, 2, 3, 0])
    assert_gradient(problem, summing.gradient())


def test_gradient_accumulation() -> None:
    model, x = net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(8, 3)

    def optimizer() -> GuessGradOptimizer:
        model.zero_grad()
        return GuessGradOptimizer(model.parameters(), lr=0.1, seed=0, estimator="activation_perturbation")

    def estimate(opt: GuessGradOptimizer, part: Tensor) -> None:
        opt.estimate(lambda: F.cross_entropy(model(part), labels(4, 2)) / 2)

    opt, parts = optimizer(), []
    for part in x.split(4):
        opt.zero_grad()
        estimate(opt, part)
        parts.append([p.grad for p in model.parameters()])
    opt = optimizer()
    for part in x.split(4):
        estimate(opt, part)
    for p, one, two in zip(model.parameters(), *parts, strict=True):
        torch.testing.assert_close(p.grad, one + two)


def test_what_touches_nothing_stands_in_no_segments_way() -> None:
    problem = untouched()
    opt = GuessGradOptimizer(problem.named, torch.optim.SGD, "w_transpose", lr=0.1)
    opt.estimate(problem.closure)
    graph = opt.estimation.plans[0].graph
    assert graph.blocked == {} and [site.is_last for site in graph.sites] == [False, False, True]


def test_code_that_asks_whether_activations_require_grad() -> None:
    """``requires_grad`` is equal in every run, although only the tracer marks activations."""
    x = randn(4, 3)

    def forward(m: Any) -> Tensor:
        h = m.first(x)
        return m.head(torch.tanh(h) if h.requires_grad else h)

    problem = classifier(forward, first=nn.Linear(3, 4), head=nn.Linear(4, 2))
    found, opt = sum_over_one_hots(problem, "fast")
    assert_gradient(problem, found)
    assert any(fn is torch.tanh for fn in opt.estimation.plans[0].graph.functions)


@pytest.mark.parametrize("engine", ["fast", "dual", "func"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_directional_descent_through_an_embedding_bag(mode: str, engine: str) -> None:
    """torch has no forward derivative for it. The estimate must be ``<v, g> v``."""
    model, ids = net(nn.EmbeddingBag(5, 3, mode=mode), nn.Linear(3, 2)).double(), torch.randint(5, (6, 4))
    opt = GuessGradOptimizer(model.parameters(), torch.optim.SGD, "directional_descent", lr=0.1, seed=0, engine=engine)
    opt.estimation.noise.follow()
    before = opt.estimation.noise.snapshot()
    opt.estimate(lambda: F.cross_entropy(model(ids), labels(6, 2)))
    opt.estimation.noise.restore(before)
    vs = list(directions(opt.estimation, 1, opt.estimation.noise).values())
    gs = torch.autograd.grad(F.cross_entropy(model(ids), labels(6, 2)), list(model.parameters()))
    slope = sum(float((v * g).sum()) for v, g in zip(vs, gs, strict=True))
    for p, v in zip(model.parameters(), vs, strict=True):
        torch.testing.assert_close(p.grad, slope * v)


def test_autocast() -> None:
    x = torch.randn(8, 3)
    model = net(nn.Linear(3, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, 2))

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x), labels(8, 2))

    problem = Problem(list(model.named_parameters()), closure, 8)
    found, _ = sum_over_one_hots(problem, "fast")
    reference = torch.autograd.grad(F.cross_entropy(model(x), labels(8, 2)), problem.parameters())
    for (name, p), g in zip(problem.named, reference, strict=True):
        assert found[name].dtype is p.dtype
        assert float((found[name] - g).norm()) <= 0.02 * float(g.norm()), name


def test_a_compiled_module_runs_as_written() -> None:
    x, gradients = torch.randn(4, 3), []
    model = net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for run in (model, torch.compile(model)):
        opt = GuessGradOptimizer(model.parameters(), lr=0.1, seed=0)
        opt.zero_grad()
        opt.estimate(partial(lambda f: F.cross_entropy(f(x), labels(4, 2)), run))
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_power_iterations_move_once_a_step() -> None:
    """``spectral_norm`` in training mode writes its buffers in each forward."""
    x, norm = torch.randn(4, 3), torch.nn.utils.parametrizations.spectral_norm
    model = net(norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))
    twin = copy.deepcopy(model)
    opt = GuessGradOptimizer(model.parameters(), torch.optim.SGD, lr=0.0, seed=0)
    for _ in range(3):
        opt.step(lambda: F.cross_entropy(model(x), labels(4, 2)))
        twin(x)
        torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_a_guess_survives_what_is_done_to_the_output() -> None:
    """An activation in place writes into the tangent. The guess must not change with it."""
    x, gradients = torch.randn(4, 3), []
    first, last = nn.Linear(3, 4), nn.Linear(4, 2)
    for inplace in (True, False):
        model = net(first, nn.SiLU(inplace=inplace), last)
        opt = GuessGradOptimizer(model.parameters(), lr=0.1, seed=0, estimator="activation_perturbation")
        opt.zero_grad()
        opt.estimate(partial(lambda f: F.cross_entropy(f(x), labels(4, 2)), model))
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


# --------------------------------------------------------------------------------------------------- refused

X = torch.randn(4, 3)
EARLY = Cube.apply


def loss_of(out: Tensor) -> Tensor:
    return F.cross_entropy(out, labels(4, 2))


def jagged(m: Any) -> Tensor:
    x = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged)
    out: Tensor = m.first(x).values().square().mean()
    return out


def in_inference_mode(m: Any) -> Tensor:
    with torch.inference_mode():
        target = m.last(m.first(X))
    return F.mse_loss(m.last(m.first(X)), target)


def higher_order(m: Any) -> Tensor:
    """``flex_attention`` as an accelerator calls it. On a CPU torch refuses it earlier."""
    mask = torch.nn.attention.flex_attention.create_block_mask(lambda b, h, q, k: q >= k, None, None, 4, 4, "cpu")
    h = m.first(X)[None, None]
    hop = torch.ops.higher_order.flex_attention
    out: Tensor = hop(h, h, h, lambda s, *_: s, mask.as_tuple(), 1.0, {})[0]
    return loss_of(m.last(out[0, 0]))


#: name -> (closure of a module with the parts first [3, 4] and last [4, 2]), what the message speaks of
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "scripted module": (lambda m: loss_of(m.scripted[0](X)), "TorchScript.*original module"),
    "scripted layer": (lambda m: loss_of(m.last(m.scripted[1](m.first(X)))), "TorchScript.*original module"),
    "traced module": (lambda m: loss_of(m.scripted[2](m.first(X))), "TorchScript.*original module"),
    "scripted loss": (lambda m: m.scripted[1](m.last(m.first(X)).mean()), "TorchScript.*original module"),
    "computed before the closure": (lambda m: loss_of(m.last(m.before[0])), "before the closure.*inside"),
    "autograd.Function without jvp": (lambda m: loss_of(m.last(Once.apply(m.first(X)))), r"Once\.apply.*jvp"),
    "autograd.Function looked up earlier": (lambda m: loss_of(m.last(EARLY(m.first(X)))), r"MyFunction\.apply\("),
    "operation without forward AD": (
        lambda m: loss_of(m.last(torch.cdist(m.first(X), torch.ones(4, 4)))),
        "cdist.*use another operation",
    ),
    "vmap": (lambda m: loss_of(torch.vmap(m.last)(m.first(X))), r"linear.*torch\.func.*outside"),
    "gradient penalty": (lambda m: torch.func.grad(lambda x: m.first(x).sum())(X).sum(), r"torch\.func.*outside"),
    "nested tensor": (jagged, "nested.*pad"),
    "inference mode": (in_inference_mode, r"inference_mode.*no_grad"),
    "higher-order operation": (higher_order, "flex_attention.*scaled_dot_product_attention"),
}


def model_to_refuse() -> Any:
    model: Any = Lambda(lambda m: None, first=nn.Linear(3, 4), last=nn.Linear(4, 2))
    model.before = [model.first(X)]
    model.scripted = (
        torch.jit.script(net(model.first, model.last)),
        torch.jit.script(nn.Tanh()),
        torch.jit.trace(model.last, torch.randn(4, 4)),
    )
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(name: str) -> None:
    closure, message = REFUSED[name]
    model = model_to_refuse()
    opt = GuessGradOptimizer([*model.first.parameters(), *model.last.parameters()], lr=0.1)
    before = copy.deepcopy(list(opt.estimation.params))
    with pytest.raises(ClosureError, match=f"(?s){message}"):
        opt.step(lambda: closure(model))
    torch.testing.assert_close(before, list(opt.estimation.params))
    opt.step(lambda: loss_of(model.last(model.first(X))))  # and training goes on


def test_flex_attention_on_a_cpu() -> None:
    first, last = nn.Linear(3, 4), nn.Linear(4, 2)

    def closure() -> Tensor:
        h = first(X)[None, None]
        return loss_of(last(torch.nn.attention.flex_attention.flex_attention(h, h, h)[0, 0]))

    refusal = r"FlexAttention does not support backward on CPU|flex_attention is a higher-order operation"
    with pytest.raises((NotImplementedError, ClosureError), match=refusal):
        GuessGradOptimizer([*first.parameters(), *last.parameters()], lr=0.1).step(closure)
