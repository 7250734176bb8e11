"""Learned feedback along residual streams: the blocks' graphs, their memory, and blocks that are hard to run again."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from guessopt import GuessGradOptimizer, GuessWarning, LearnedFeedback
from guessopt.diagnostics import cosine, estimated_gradient, true_gradient
from guessopt.memory_plan import cpu_peak

from .problems import build, labels, learned
from .stream_networks import Residual, optimizer, shortcut_net, stack, stream_of


@pytest.mark.parametrize(("options", "tangents"), [({"beta": 0}, False), ({}, False), ({"source": "guesses"}, True)])
def test_no_tangents_where_nothing_is_corrected_or_learned_from_them(
    options: dict[str, Any], tangents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import guessopt.step.modes as module

    net, closure = stack(2)
    opt = optimizer(net.named_parameters(), gamma=0, **options)
    guesses: list[bool] = []
    estimated = module.estimated_cotangents

    def spy(graph: Any, record: Any, formed: Any) -> Any:
        guesses.append(bool(record.states))
        return estimated(graph, record, formed)

    monkeypatch.setattr(module, "estimated_cotangents", spy)
    for _ in range(3):
        opt.step(closure)
    assert guesses == [tangents] * 3


@pytest.mark.parametrize(("memory", "every", "states"), [("store", 10**6, 2.4), ("replay", 10**6, 1), ("replay", 1, 2)])
def test_memory_grows_by_what_blocks_compute_or_by_states_alone(memory: str, every: int, states: float) -> None:
    """``"store"``: of each block what its graph saves, the state and the tanh (1.4 times the state), as backprop does;
    ``"replay"`` the state and, with guesses, its tangent: no layer's input or output, guess or cotangent."""
    peaks, n = [], 4096
    for blocks in (4, 12):
        net, closure = stack(blocks, n=n)
        opt = optimizer(net.named_parameters(), gamma=0, every=every, source="guesses")
        opt.memory = memory
        for _ in range(9):  # past the probes
            opt.step(closure)
        peaks.append(cpu_peak(lambda opt=opt, closure=closure: opt.step(closure))[1])
    state = n * 5 * 8
    assert (peaks[1] - peaks[0]) / 8 == pytest.approx(states * state, rel=0.1)


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize("options", [{}, {"source": "guesses", "every": 2}, {"gamma": 1, "every": 2}], ids=str)
@pytest.mark.parametrize("model", ["sums", "rectified", "in place", "projected", "prompts", "transformer", "drawing"])
def test_replay_makes_the_updates_of_store(model: str, options: dict[str, Any]) -> None:
    """Whether a block's graph was kept or made once more; parameters, ``B`` and buffers."""
    ends = []
    for memory in ("store", "replay"):
        if model in ("sums", "rectified"):
            net, closure = stack(4, model == "rectified")
            named = list(net.named_parameters())
        elif model == "drawing":
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(4, 5), *(Awkward("drawing") for _ in range(3)), nn.Linear(5, 3)).double()
            x = torch.randn(12, 4, dtype=torch.float64)
            named, closure = list(net.named_parameters()), lambda net=net, x=x: F.cross_entropy(net(x), labels(12, 3))
        elif model in ("in place", "projected"):
            net, closure = shortcut_net(model == "projected")
            named = list(net.named_parameters())
        else:
            made = build(model)
            named, closure = list(made.named), made.closure
        opt = optimizer(named, **{"gamma": 0, **options})
        opt.memory = memory
        losses = [opt.step(closure).item() for _ in range(6)]
        ends.append((losses, [p.detach().clone() for _, p in named], [state["B"] for state in learned(opt).values()]))
    (losses, params, feedback), other = ends
    assert losses[-1] < losses[0] and feedback
    torch.testing.assert_close(losses, other[0], rtol=1e-9, atol=1e-12)
    for a, b in zip(params + feedback, other[1] + other[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


class Awkward(nn.Module):
    """``h + W2 tanh(W1 h)``, in ways that a kept graph has to get right."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.one, self.two, self.way = nn.Linear(5, 7), nn.Linear(7, 5), way
        self.scale = nn.Parameter(torch.ones(5))
        if way == "weight norm":
            self.one = nn.utils.parametrizations.weight_norm(self.one)
        if way == "frozen":
            self.requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        if self.way == "rectified in place":
            F.relu_(h)
        read = h.to(h.dtype) if self.way == "same tensor" else h
        out: Tensor = self.two(torch.tanh(self.one(read))) * self.scale
        if self.way == "drawing":
            out = F.dropout(out, 0.2) * (torch.rand(len(h), 1, dtype=h.dtype) < 0.7)
            return F.dropout(h, 0.1) + F.dropout(out, 0.3, True, True)
        if self.way == "sum in place":
            out += h
            return F.relu_(out)
        if self.way == "state in place":
            h += out
            return h
        if self.way == "views":
            return (h.view(-1, 1, 5) + out.view(-1, 1, 5)).reshape(-1, 5)
        if self.way == "checkpoint":
            return h + checkpoint(lambda t: self.two(torch.tanh(self.one(t))) * self.scale, h, use_reentrant=False)
        return h + out


#: Torch's own backward refuses them.
SPOILED = ("state in place",)


AWKWARD = (
    "drawing",
    "same tensor",
    "rectified in place",
    "sum in place",
    "state in place",
    "views",
    "weight norm",
    "frozen",
    "shared",
    "checkpoint",
)


@pytest.mark.filterwarnings("ignore:torch.compile")
@pytest.mark.parametrize("options", [{}, {"gamma": 1, "every": 2}], ids=str)
@pytest.mark.parametrize("way", AWKWARD)
def test_kept_graphs_of_awkward_blocks(way: str, options: dict[str, Any]) -> None:
    """The updates of an engine that keeps none. A network that writes into what its own backward reads is told so, and
    trains all the same."""
    ends = []
    for engine in ("dual", "fast"):
        torch.manual_seed(0)
        blocks = [Awkward("plain" if way == "frozen" and k in (0, 3) else way) for k in range(4)]
        blocks = blocks[:1] * 4 if way == "shared" else blocks
        net = nn.Sequential(nn.Linear(4, 5), *blocks, nn.Linear(5, 3)).double()
        x = torch.randn(12, 4, dtype=torch.float64)
        torch.manual_seed(1)
        named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
        opt = GuessGradOptimizer(
            named, torch.optim.SGD, LearnedFeedback(**{"gamma": 0, **options}), lr=0.05, seed=1, engine=engine
        )
        spoiled = engine == "fast" and way in SPOILED
        with pytest.warns(GuessWarning, match="writes into memory") if spoiled else nullcontext():
            for _ in range(5):
                opt.step(lambda net=net, x=x: F.cross_entropy(net(x), labels(12, 3)))
        assert opt.estimation.plans[0].graph.chain is not None
        ends.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_kept_graph_passes_dropout_as_it_was_drawn() -> None:
    """The last two blocks' gradients are exact."""
    net, closure = stack(2)
    for block in (net[1], net[2]):
        block.two = nn.Sequential(nn.Dropout(0.5), block.two)
    opt = optimizer(net.named_parameters(), gamma=0)
    true, found = true_gradient(opt, closure), estimated_gradient(opt, closure)
    for name in (name for name in true if name[0] != "0"):
        torch.testing.assert_close(found[name], true[name], rtol=1e-9, atol=1e-12)


def test_autocast() -> None:
    """States are bfloat16 there, weights float32; the last block's estimate is that of autograd, up to rounding."""
    net, _ = stack(2)
    net.float()
    x = torch.randn(12, 4)

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(net(x).float(), labels(12, 3))

    opt = optimizer(net.named_parameters(), gamma=0, every=2)
    found = cosine(opt, closure)
    assert opt.estimation.plans[0].graph.chain is not None
    assert found.per_parameter["2.one.weight"] > 0.99
    opt.step(closure)


@pytest.mark.parametrize("source", ["weights", "guesses"])
def test_autocast_around_the_step(source: str) -> None:
    """As inside the closure: what is learned stays float32."""
    ends = []
    for around in (False, True):
        net, _ = stack(3)
        net.float()
        x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
        opt = optimizer(net.named_parameters(), gamma=0, source=source)
        low = torch.autocast("cpu", dtype=torch.bfloat16)
        inside, outside = (nullcontext(), low) if around else (low, nullcontext())

        def closure() -> Tensor:
            with inside:  # noqa: B023 (called at once)
                return F.cross_entropy(net(x).float(), labels(12, 3))  # noqa: B023

        for _ in range(4):
            with outside:
                opt.step(closure)
        assert all(state["B"].dtype == torch.float32 for state in learned(opt).values())
        ends.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class Queries(nn.Module):
    """Attention of learned queries to given keys and learned values, grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(4, 8), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in (x, self.v(x)))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("every", [1, 2])
def test_attention_on_a_skip(every: int) -> None:
    """Where keys are constant the queries are a state, and attention, whose fused kernels have no second derivative, is
    the way to the next one."""
    torch.manual_seed(0)
    net = nn.Sequential(Queries(), *(Residual(8) for _ in range(3)), nn.Linear(8, 3))
    x, y = torch.randn(6, 5, 4), labels(6, 3)
    opt = optimizer(net.named_parameters(), gamma=0, every=every, source="guesses")

    def closure() -> Tensor:
        return F.cross_entropy(net(x).mean(1), y)

    stream = stream_of(opt, closure)
    assert stream is not None and any(
        F.scaled_dot_product_attention in [c.fn for c in b.skip or ()] for b in stream.blocks
    )
    opt.zero_grad()
    losses = [float(opt.step(closure)) for _ in range(60)]
    assert losses[-1] < losses[0] and cosine(opt, closure).total > 0.9
