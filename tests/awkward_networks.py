"""Networks that are awkward for guesses built from the next weights."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import awkward
from .awkward import N, Net, lin
from .problems import Problem, labels

Closure = Callable[[], Tensor]


Network = tuple[nn.Module, Closure]


def of(run: Callable[..., Tensor], *shape: int, **layers: Callable[[], nn.Module]) -> Callable[[], Network]:
    """``awkward.of``, as a pair of network and closure."""
    return as_pair(awkward.of(run, *shape, **layers))


def as_pair(make: Callable[[], Problem]) -> Callable[[], Network]:
    def build() -> Network:
        problem = make()
        assert problem.model is not None
        return problem.model, problem.closure

    return build


def recurrence(m: Any, x: Tensor) -> Tensor:
    h = c = x.new_zeros(len(x), 5)
    for t in range(x.shape[1]):
        h, c = m.cell(x[:, t], (h, c))
    return m.h(torch.relu(m.b(torch.cat([h, c], -1))))


NETWORKS: dict[str, Callable[[], Network]] = {name: as_pair(make) for name, make in awkward.NETWORKS.items()}


def experts(m: Any, x: Tensor) -> Tensor:
    """Of three experts one gets no example."""
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
    """Layers in dtypes of their own; the first one's is the input's."""

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
