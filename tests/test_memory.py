"""``memory="replay"`` and ``"stream"`` keep nothing between the passes. That they update as ``"store"`` does is in
test_contracts.py."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from guessopt import (
    ActivationPerturbation,
    GuessGradOptimizer,
    LearnedFeedback,
    PartialUpdateError,
    WPerp,
    WTranspose,
)
from guessopt.memory_plan import cpu_peak
from guessopt.step import modes

from .machine import refused, skip_if_refused
from .problems import learned, unfollowed


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        h = h + self.drop(self.b(F.gelu(self.a(self.norm(h)))))
        return self.out(h)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": _mlp, "residual": Residual, "cnn": _cnn
}  # fmt: skip
FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad)


def _train(model: str, steps: int = 5, accumulate: bool = False, base: Any = torch.optim.AdamW, **options: Any) -> Any:
    """Parameters, buffers, losses and random states after a few steps."""
    torch.manual_seed(0)
    net = MODELS[model]().double()
    x, y = torch.randn(5, 6).double(), torch.randint(3, (5,))
    fused: dict[str, Any] = {}
    if base in FUSED and not refused(lambda: base(net.parameters(), lr=1e-2, fused=True), (base, "fused")):
        fused = {"fused": True}  # as stream builds them
    opt = GuessGradOptimizer(net.named_parameters(), base=base, lr=1e-2, seed=7, **options, **fused)

    def closure() -> Tensor:
        return F.cross_entropy(net(x), y)

    losses = []
    for _ in range(steps):
        if accumulate:
            opt.estimate(closure)
            losses.append(opt.estimate(closure))
            opt.step()
            opt.zero_grad()
        else:
            losses.append(opt.step(closure))
    return net, torch.stack(losses), torch.get_rng_state(), opt


def _assert_equal(a: Any, b: Any) -> None:
    for (name, p), q in zip(a[0].state_dict().items(), b[0].state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(a[1], b[1], rtol=0, atol=0)
    assert torch.equal(a[2], b[2])


@pytest.mark.parametrize("memory", ["replay", "stream"])
def test_accumulates(memory: str) -> None:
    """``estimate`` adds to ``.grad`` in every mode."""
    stored = _train("residual", accumulate=True)
    _assert_equal(stored, _train("residual", accumulate=True, memory=memory))


@pytest.mark.parametrize("base", FUSED)
def test_fused_updates_of_a_transposed_weight(base: Any) -> None:
    """The gradient is transposed as well, and fused kernels go by the order in memory."""
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        w, x = nn.Parameter(torch.randn(6, 4).double()), torch.randn(8, 6).double()
        skip_if_refused(lambda w=w: base([w], lr=1e-2, fused=True), (base, "fused"))  # type: ignore[misc]
        opt = GuessGradOptimizer([w], base, ActivationPerturbation(), lr=1e-2, seed=0, fused=fused)
        for _ in range(3):
            opt.step(lambda w=w, x=x: F.linear(x, w.t()).square().mean())
        found.append(w.detach())
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_first_pass_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the passes no layer's input, output or guess is alive."""
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(16, 16), nn.ReLU())), nn.Linear(16, 2))
    x = torch.randn(32, 16)
    seen: list[weakref.ref[Tensor]] = []
    for layer in net:
        layer.register_forward_hook(unfollowed(lambda module, args, out: seen.append(weakref.ref(out))))
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-2, memory="replay")
    opt.step(lambda: net(x).square().mean())
    alive: list[int] = []
    second = modes.second_run

    def spy(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        alive.append(sum(ref() is not None for ref in seen))
        return second(*args, **kwargs)

    monkeypatch.setattr(modes, "second_run", spy)
    seen.clear()
    opt.step(lambda: net(x).square().mean())
    assert alive == [0] and len(seen) >= 2 * len(net)


def test_stream_never_holds_all_gradients() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(8, 8), nn.ReLU())))
    held: list[int] = []

    class Watching(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            held.append(sum(p.grad is not None for p in net.parameters()))
            super().step(closure)

    opt = GuessGradOptimizer(net.parameters(), Watching, lr=1e-2, memory="stream")
    x = torch.randn(4, 8)
    for _ in range(2):
        opt.step(lambda: net(x).square().mean())
    held = [count for count in held if count]  # a dry run on copies sees none of these
    assert held == [1] * 24 and all(p.grad is None for p in net.parameters())


def test_hooks_and_schedulers_fire_once_a_step() -> None:
    net = _mlp()
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1.0, memory="stream")
    fired: list[str] = []
    opt.base.register_step_pre_hook(lambda *a: fired.append("before"))
    opt.base.register_step_post_hook(lambda *a: fired.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    x = torch.randn(4, 6)
    opt.step(lambda: net(x).square().mean())
    scheduler.step()
    assert fired == ["before", "after"] and opt.param_groups[0]["lr"] == 0.5


def _counting(base: Any, updates: list[int]) -> Any:
    """A base that notes each of its steps in ``updates``."""

    class Counting(base):  # type: ignore[misc]
        def step(self, closure: Any = None) -> None:
            updates.append(1)
            super().step(closure)

    return Counting


def _failing_once_updated(layer: nn.Module, updates: list[int]) -> RemovableHandle:
    """The layer fails if a parameter was updated before it is reached, until the handle is removed."""

    def fail(module: nn.Module, args: Any) -> None:
        if updates:
            raise RuntimeError("out of memory")

    return layer.register_forward_pre_hook(unfollowed(fail))


def test_partial_update_is_finished_from_its_journal() -> None:
    """The step fails half-way. Later parameters, buffers and random states are unchanged. ``finish`` updates each
    remaining parameter once."""
    updates: list[int] = []
    net, _, _, opt = _train("cnn", memory="stream", estimator=WTranspose(), base=_counting(torch.optim.AdamW, updates))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.randn(5, 6).double()
    updates.clear()
    failing = _failing_once_updated(net[5], updates)

    def closure() -> Tensor:
        return net(x).square().mean()

    state = torch.get_rng_state()
    with pytest.raises(PartialUpdateError, match=r"4 of 6 parameters.*out of memory") as caught:
        opt.step(closure)
    after = {k: v.clone() for k, v in net.state_dict().items()}
    for name in before:
        moved = name in ("1.weight", "1.bias", "2.weight", "2.bias")
        assert torch.equal(before[name], after[name]) != moved, name
    assert torch.equal(state, torch.get_rng_state())
    failing.remove()
    opt.finish(caught.value.journal, closure)
    for name, value in net.state_dict().items():
        unmoved = name in ("1.weight", "1.bias", "2.weight", "2.bias")
        assert torch.equal(value, after[name]) == unmoved, name


def test_closure_that_does_not_repeat_is_refused() -> None:
    torch.manual_seed(0)
    net, x, runs, repeats = _mlp(), torch.randn(5, 6), count(1), [True]

    def closure() -> Tensor:
        return net(x).square().mean() * (1 if repeats[0] else next(runs))

    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-2, memory="replay")
    for _ in range(2):
        opt.step(closure)
    repeats[0] = False
    with pytest.raises(RuntimeError, match="does not repeat"):
        opt.step(closure)


# --- learned feedback -------------------------------------------------------------------------------------------------


def _assert_same_lessons(a: GuessGradOptimizer, b: GuessGradOptimizer) -> None:
    one, other = learned(a), learned(b)
    assert one.keys() == other.keys() and one
    for key, state in one.items():
        assert state.keys() == other[key].keys()
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key][name])), f"{key}: {name}"


@pytest.mark.parametrize("memory", ["replay", "stream"])
@pytest.mark.parametrize(("gamma", "passes"), [(0, (2, 2, 2)), (1, (3, 2, 3)), ("auto", (3, 2, 3))])
def test_passes_of_learned_feedback(gamma: Any, passes: tuple[int, ...], memory: str) -> None:
    """Two passes; three in steps whose guesses correct predictions, for then all predictions must be known first."""
    torch.manual_seed(0)
    net, x, runs, passed = _mlp(), torch.randn(5, 6), count(), list[int]()
    estimator = LearnedFeedback(gamma=gamma, every=2)
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, estimator, lr=1e-2, memory=memory)

    def closure() -> Tensor:
        next(runs)
        return net(x).square().mean()

    for _ in range(13):
        before = next(runs)
        opt.step(closure)
        passed.append(next(runs) - before - 1)
    assert tuple(passed[-3:]) == passes  # no probe is due


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("every", [1, 10**6])
def test_learned_feedback_keeps_two_layers_at_most(every: int, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the passes no layer's output is alive. In the second pass a call's input is alive and, with
    ``ahead=1``, the input of the waiting layer."""
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(16, 16), nn.Tanh())), nn.Linear(16, 2))
    x = torch.randn(32, 16)
    seen: list[StorageWeakRef] = []
    alive: list[int] = []

    def look(module: nn.Module, args: Any, out: Tensor) -> None:
        alive.append(sum(not ref.expired() for ref in seen))
        seen.append(StorageWeakRef(out.untyped_storage()))

    for layer in net:
        layer.register_forward_hook(unfollowed(look))
    estimator = LearnedFeedback(gamma=0, every=every, ahead=ahead)
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, estimator, lr=1e-2, memory="replay")
    for _ in range(4):
        opt.step(lambda: net(x).square().mean())
    between: list[int] = []
    second = modes.second_run

    def spy(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        between.append(sum(not ref.expired() for ref in seen))
        alive.clear()
        return second(*args, **kwargs)

    monkeypatch.setattr(modes, "second_run", spy)
    seen.clear()
    opt.step(lambda: net(x).square().mean())
    assert between == [0] and len(alive) == len(net)
    assert max(alive) == (2 if ahead else 1)


@pytest.mark.parametrize("ahead", [0, 1])
def test_learned_feedback_updates_as_the_pass_goes(ahead: int) -> None:
    """When the second pass reaches a layer, all earlier layers but the waiting one are updated."""
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(8, 8), nn.Tanh())), nn.Linear(8, 2))
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    x = torch.randn(16, 8)
    estimator = LearnedFeedback(gamma=0, ahead=ahead)
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, estimator, lr=1e-2, memory="stream")
    for _ in range(9):  # the next probe is far
        opt.step(lambda: net(x).square().mean())
    before = [layer.weight.detach().clone() for layer in layers]
    moved: list[int] = []

    def look(module: nn.Module, args: Any) -> None:
        with torch._C.DisableTorchFunction():  # not a part of the closure
            moved.append(sum(not torch.equal(layer.weight, w) for layer, w in zip(layers, before, strict=True)))

    for layer in layers:
        layer.register_forward_pre_hook(unfollowed(look))
    opt.step(lambda: net(x).square().mean())
    assert moved[:6] == [0] * 6  # the first pass
    assert moved[6:] == ([0, 0, 1, 2, 3, 5] if ahead else [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize(("activation", "values"), [(nn.ReLU(), 1), (nn.ReLU(inplace=True), 1), (nn.SiLU(), 2)])
def test_what_a_rectifier_has_made_stands_for_what_it_read(activation: nn.Module, values: int) -> None:
    """Learned feedback keeps as much for each further layer as backprop does: after ReLU only its output."""
    peaks, n, width = [], 2048, 16
    for depth in (4, 12):
        layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), activation)]
        net, x = nn.Sequential(*layers, nn.Linear(width, 3)), torch.randn(n, width)
        opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, LearnedFeedback(gamma=0, every=10**6), lr=1e-3)

        def closure(net: nn.Module = net, x: Tensor = x) -> Tensor:
            return F.cross_entropy(net(x), torch.arange(n) % 3)

        for _ in range(9):  # past the probes
            opt.step(closure)
        peaks.append(cpu_peak(lambda opt=opt, closure=closure: opt.step(closure))[1])
    assert (peaks[1] - peaks[0]) / 8 == pytest.approx(values * n * width * 4, rel=0.1)


def test_learned_feedback_finishes_a_partial_update() -> None:
    """Each parameter is updated once, and every ``B`` learns once. For sites that the failed pass reached, ``B``
    equals that of a run without the failure."""
    updates: list[int] = []
    base = _counting(torch.optim.SGD, updates)

    def trained() -> tuple[nn.Module, GuessGradOptimizer]:
        net, _, _, opt = _train("mlp", memory="stream", estimator=LearnedFeedback(gamma=0), base=base)
        return net, opt

    whole, unbroken = trained()
    net, opt = trained()
    x = torch.randn(5, 6).double()
    state = torch.get_rng_state()
    unbroken.step(lambda: whole(x).square().mean())
    torch.set_rng_state(state)
    updates.clear()
    failing = _failing_once_updated(net[5], updates)

    def closure() -> Tensor:
        return net(x).square().mean()

    learning_steps = learned(opt)
    with pytest.raises(PartialUpdateError, match=r"4 of 6 parameters.*out of memory") as caught:
        opt.step(closure)
    assert all(learned(opt)[k] is state for k, state in learning_steps.items())
    after = copy.deepcopy(net.state_dict())
    failing.remove()
    opt.finish(caught.value.journal, closure)
    for name, value in net.state_dict().items():
        assert torch.equal(value, after[name]) != name.startswith("5."), name
        assert torch.equal(value, whole.state_dict()[name]) == (name != "5.weight"), name  # what it reads has moved
    assert len(updates) == 6
    _assert_same_lessons(opt, unbroken)


def test_what_learned_feedback_cannot_do_in_two_passes() -> None:
    """On a residual stream the first step raises and changes nothing. The error names two remedies."""
    torch.manual_seed(0)
    net, x = Residual(), torch.randn(5, 6)

    def optimizer(memory: str, residual: bool = True, **options: Any) -> GuessGradOptimizer:
        feedback = LearnedFeedback(residual=residual)
        return GuessGradOptimizer(net.parameters(), torch.optim.SGD, feedback, lr=1e-2, memory=memory, **options)

    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"memory: learned_feedback.*replay.*residual=False.*memory='store'"):
        optimizer("stream").step(lambda: net(x).square().mean())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    for remedy in (optimizer("stream", residual=False), optimizer("replay")):
        before = copy.deepcopy(net.state_dict())
        remedy.step(lambda: net(x).square().mean())
        assert not torch.equal(net.inp.weight, before["inp.weight"])
    for memory in ("replay", "stream"):
        with pytest.raises(ValueError, match=r"memory: learned_feedback.*guesses=2.*memory='store'"):
            optimizer(memory, guesses=2)


def test_sparse_gradients_in_a_stream() -> None:
    """torch's fused kernels, which ``"stream"`` prefers, refuse sparse gradients."""
    found = []
    for memory in ("store", "stream"):
        torch.manual_seed(0)
        net, ids = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Tanh(), nn.Linear(4, 2)), torch.randint(7, (6,))
        opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, WPerp(k=2), lr=0.1, seed=0, memory=memory)
        for _ in range(3):
            opt.step(lambda net=net, ids=ids: F.cross_entropy(net(ids), torch.arange(6) % 2))
        found.append([p.detach() for p in net.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
