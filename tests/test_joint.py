"""Parallel projections share a guess, as in a module with packed weights; guesses hand computed results on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import ActivationPerturbation, GuessGradOptimizer, WPerp, WTranspose
from guessopt.diagnostics import estimated_gradient, expected_gradient
from guessopt.engine.jvp.fast import FastEngine

D, HEADS, TOKENS = 8, 2, 64


class Layer(nn.Module):
    """Attention and a gated MLP, the parallel projections apart or ``packed``; the same weights either way."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        qkv, gate_up = nn.Linear(D, 3 * D), nn.Linear(D, 24)
        self.inp, self.o, self.down, self.head = nn.Linear(3, D), nn.Linear(D, D), nn.Linear(12, D), nn.Linear(D, 2)
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.RMSNorm(D)
        if packed:
            self.qkv, self.gate_up = qkv, gate_up
            return
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        self.gate, self.up = nn.Linear(D, 12), nn.Linear(D, 12)
        for whole, parts in ((qkv, (self.q, self.k, self.v)), (gate_up, (self.gate, self.up))):
            for name, value in whole.named_parameters():
                for part, piece in zip(parts, value.detach().chunk(len(parts)), strict=True):
                    getattr(part, name).data.copy_(piece)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        z = self.norm1(h)
        q, k, v = self.qkv(z).chunk(3, -1) if self.packed else (self.q(z), self.k(z), self.v(z))
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        h = h + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        z = self.norm2(h)
        gate, up = self.gate_up(z).chunk(2, -1) if self.packed else (F.silu(self.gate(z)), self.up(z))
        gate = F.silu(gate) if self.packed else gate
        return self.head(h + self.down(gate * up)).mean(1)


PARTS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


def problem(packed: bool) -> tuple[Layer, Callable[[], Tensor]]:
    torch.manual_seed(0)
    net = Layer(packed).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, TOKENS, 3, generator=generator, dtype=torch.float64)
    return net, lambda: F.cross_entropy(net(x), torch.arange(8) % 2)


@pytest.mark.parametrize("options", [{}, {"guesses": 3}, {"memory": "replay"}, {"engine": "dual"}], ids=str)
@pytest.mark.parametrize("estimator", [WPerp(k=3), WTranspose(), "w_perp_ns", WPerp(k=2, noise="uniform")], ids=repr)
def test_parallel_projections_get_the_estimate_of_packed_ones(estimator: Any, options: dict[str, Any]) -> None:
    found = {}
    for packed in (False, True):
        net, closure = problem(packed)
        opt = GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, estimator, lr=0.0, seed=3, **options)
        opt.step(closure)
        found[packed] = {name: p.grad for name, p in net.named_parameters()}
    for name, expected in found[True].items():
        module, _, kind = name.partition(".")
        grads = [found[False][f"{part}.{kind}"] for part in PARTS.get(module, (module,))]
        torch.testing.assert_close(torch.cat(grads), expected, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("estimator", [WPerp(k=3), WTranspose(noise="uniform")], ids=repr)
def test_the_declared_mean_is_that_of_packed_ones(estimator: Any) -> None:
    found = {}
    for packed in (False, True):
        net, closure = problem(packed)
        opt = GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, estimator, lr=0.0, seed=3)
        found[packed] = expected_gradient(opt, closure)
    for whole, parts in PARTS.items():
        together = torch.cat([found[False][f"{part}.weight"] for part in parts])
        torch.testing.assert_close(together, found[True][f"{whole}.weight"], rtol=1e-8, atol=1e-12)


def joined(estimator: Any) -> list[tuple[str, ...]]:
    """Names of the weights that share one guess."""
    net, closure = problem(False)
    opt = GuessGradOptimizer(net.named_parameters(), torch.optim.SGD, estimator, lr=0.0, seed=0)
    opt.step(closure)
    plan = opt.estimation.plans[0]
    names = [name for name, _ in net.named_parameters()]
    return [
        tuple(names[plan.graph.sites[k].params[0]].partition(".")[0] for k in joint.sites)
        for joint in plan.joints.values()
    ]


def test_what_is_guessed_as_one() -> None:
    assert joined(WPerp(k=3)) == [("q", "k", "v"), ("gate", "up")]
    assert joined({"q.*": WTranspose(), "*": WPerp(k=3)}) == [("gate", "up")]
    for apart in (ActivationPerturbation(), WPerp(k=3, debias=True), "downstream", "learned_feedback"):
        assert joined(apart) == []


def test_frozen_projections_are_part_of_the_way() -> None:
    net, closure = problem(False)
    net.k.requires_grad_(False)
    opt = GuessGradOptimizer([p for p in net.named_parameters() if p[1].requires_grad], torch.optim.SGD, WPerp(k=3),
                             lr=0.0, seed=0)  # fmt: skip
    expected = expected_gradient(opt, closure)
    draws = [estimated_gradient(opt, closure) for _ in range(300)]
    for name in ("q.weight", "v.weight"):
        each = torch.stack([(draw[name] * expected[name]).sum() for draw in draws]) / expected[name].square().sum()
        assert abs(float(each.mean()) - 1) <= 5 * float(each.std()) / len(each) ** 0.5


@pytest.mark.parametrize("memory", ["store", "replay"])
def test_what_guesses_hand_on_is_what_the_closure_would_compute(memory: str) -> None:
    """A number, a mask and a write change from step to step, and dropout is drawn: the loss is that of the network."""
    torch.manual_seed(0)
    a, b = nn.Linear(4, 6), nn.Linear(6, 3)
    x, scale, mask, shift = torch.randn(16, 4), [1.0], [torch.ones(16, 6)], torch.zeros(16, 6)

    def closure() -> Tensor:
        shift.add_(0.5)
        h = F.layer_norm(F.dropout(a(x) * scale[0] + shift, 0.3) * mask[0], (6,))
        return F.cross_entropy(b(F.gelu(h)), torch.arange(16) % 3)

    opt = GuessGradOptimizer([*a.parameters(), *b.parameters()], torch.optim.SGD, WPerp(k=2), lr=0.0, memory=memory)
    for step in range(4):
        scale[0], mask[0] = 1.0 + step, (torch.rand(16, 6) < 0.5).float()
        state, before = torch.get_rng_state(), shift.clone()
        found = opt.step(closure)
        torch.set_rng_state(state)
        shift.copy_(before)
        torch.testing.assert_close(found, closure().detach())


def test_a_closure_that_writes_into_what_was_handed_on() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 3)]
    x = torch.randn(12, 4)

    def closure() -> Tensor:
        h = layers[0](x)
        z = layers[1](h * 2)
        z += 1.0
        h = h + layers[2](z)
        return F.cross_entropy(layers[3](h), torch.arange(12) % 3)

    params = [p for layer in layers for p in layer.parameters()]
    grads = {}
    for engine in ("fast", "func"):
        opt = GuessGradOptimizer(params, torch.optim.SGD, WPerp(k=2), lr=0.0, seed=0, engine=engine)
        opt.step(closure)
        grads[engine] = [p.grad.clone() for p in params if p.grad is not None]
    for one, other in zip(*grads.values(), strict=True):
        torch.testing.assert_close(one, other)


def test_calls_are_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the three projections and one of the two in the MLP, attention, the first norm, the gate."""
    taken = []
    net, closure = problem(False)
    reuse = FastEngine.reuse

    def spy(self: FastEngine, fn: Any, *rest: Any) -> Any:
        out = reuse(self, fn, *rest)
        if out is not NotImplemented:
            taken.append(fn.__name__)
        return out

    monkeypatch.setattr(FastEngine, "reuse", spy)
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, WPerp(k=2), lr=0.0, seed=0)
    opt.step(closure)
    assert sorted(taken) == ["add", "add", "layer_norm", *["linear"] * 3, "mul", "scaled_dot_product_attention", "silu"]
