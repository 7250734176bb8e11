"""``memory="replay"`` and ``"stream"``: the updates of ``"store"``, with nothing kept between the passes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import (
    ActivationPerturbation,
    DirectionalDescent,
    GuessGradOptimizer,
    PartialUpdateError,
    WPerp,
    WTranspose,
)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.a, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        h = h + self.drop(self.b(F.gelu(self.a(self.norm(h)))))
        return self.out(h)


class Tied(nn.Module):
    """An embedding that is the head as well; a weight made from two parameters; a bias added by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.w, self.g, self.b = (nn.Parameter(torch.randn(*shape)) for shape in ((6, 8), (8, 8), (8, 1), (8,)))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.e)
        h = torch.relu(h @ (self.w * self.g).t() + self.b)
        return h @ self.e.t()


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.1)
    return nn.Sequential(nn.Unflatten(1, (1, 6)), layer, nn.Flatten(), nn.Linear(6, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": _mlp, "residual": Residual, "tied": Tied, "cnn": _cnn, "transformer": _transformer,
}  # fmt: skip
ESTIMATORS: dict[str, Any] = {
    "w_perp": WPerp(k=2, refresh=3),
    "w_transpose": WTranspose(),
    "activation_perturbation": ActivationPerturbation(),
    "directional_descent": DirectionalDescent(),
    "debiased": WTranspose(debias=True),
}


FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad)


def _train(model: str, steps: int = 5, accumulate: bool = False, base: Any = torch.optim.AdamW, **options: Any) -> Any:
    """Parameters, buffers, losses and random states after a few steps."""
    torch.manual_seed(0)
    net = MODELS[model]().double()
    x, y = torch.randn(5, 6).double(), torch.randint(3, (5,))
    fused = {"fused": True} if base in FUSED else {}  # as stream builds them
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


def _assert_equal(a: Any, b: Any, exactly: bool = True) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-9, "atol": 1e-12}
    for (name, p), q in zip(a[0].state_dict().items(), b[0].state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(a[1], b[1], **tolerance)
    assert torch.equal(a[2], b[2])


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize("memory", ["replay", "stream"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("model", MODELS)
def test_equals_store(model: str, estimator: str, memory: str) -> None:
    """Dropout, batch statistics, tied weights and weights made from others: the same to the bit, but where attention's
    fused kernel takes the place of the explicit formula."""
    stored = _train(model, estimator=ESTIMATORS[estimator])
    _assert_equal(stored, _train(model, estimator=ESTIMATORS[estimator], memory=memory), model != "transformer")


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize("memory", ["replay", "stream"])
@pytest.mark.parametrize("options", [{"exact_last": True}, {"guesses": 3}, {"exact_last": True, "guesses": 2}])
@pytest.mark.parametrize("model", MODELS)
def test_options_equal_store(model: str, options: dict[str, Any], memory: str) -> None:
    exactly = model != "transformer" and "guesses" not in options
    base = torch.optim.AdamW if exactly else torch.optim.SGD  # Adam blows up the rounding of gradients that are zero
    stored = _train(model, base=base, estimator=WTranspose(), **options)
    _assert_equal(stored, _train(model, base=base, estimator=WTranspose(), memory=memory, **options), exactly)


@pytest.mark.parametrize("memory", ["replay", "stream"])
def test_accumulates(memory: str) -> None:
    """``estimate`` adds to ``.grad`` in every mode."""
    stored = _train("residual", accumulate=True)
    _assert_equal(stored, _train("residual", accumulate=True, memory=memory))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_stream_serves_elementwise_bases(base: Any) -> None:
    stored = _train("mlp", base=base)
    streamed = _train("mlp", base=base, memory="stream")
    _assert_equal(stored, streamed)
    a, b = (run[3].state_dict()["state"] for run in (stored, streamed))
    assert a.keys() == b.keys()
    for key in a:
        for name, value in a[key].items():
            torch.testing.assert_close(value, b[key][name], rtol=0, atol=0)


def test_first_pass_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the passes no input, output or guess of any layer is alive."""
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(16, 16), nn.ReLU())), nn.Linear(16, 2))
    x = torch.randn(32, 16)
    seen: list[weakref.ref[Tensor]] = []
    for layer in net:
        layer.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-2, memory="replay")
    opt.step(lambda: net(x).square().mean())
    alive: list[int] = []
    second = opt._replay

    def spy(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        alive.append(sum(ref() is not None for ref in seen))
        return second(*args, **kwargs)

    monkeypatch.setattr(opt, "_replay", spy)
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


@pytest.mark.parametrize("memory", ["replay", "stream"])
def test_failure_before_the_first_update_changes_nothing(memory: str) -> None:
    net, _, _, opt = _train("cnn", memory=memory, estimator=WTranspose())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x, runs = torch.randn(5, 6).double(), 0

    def closure() -> Tensor:
        nonlocal runs
        runs += 1
        if runs == 2:
            raise KeyError("second pass")
        return net(x).square().mean()

    state, noise = torch.get_rng_state(), opt._noise.state()
    with pytest.raises(KeyError, match="second pass"):
        opt.step(closure)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, noise["generators"][k]) for k, v in opt._noise.state()["generators"].items())


def test_partial_update_is_finished_from_its_journal() -> None:
    """A failure half-way: parameters after it keep their values, buffers and random states are as before; ``finish``
    updates just those that were missing, each exactly once."""
    updates: list[int] = []

    class Counting(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            updates.append(1)
            super().step(closure)

    net, _, _, opt = _train("cnn", memory="stream", estimator=WTranspose(), base=Counting)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x, failing = torch.randn(5, 6).double(), True
    updates.clear()

    def fail(module: nn.Module, args: Any) -> None:
        if failing and updates:
            raise RuntimeError("out of memory")

    net[5].register_forward_pre_hook(fail)

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
    failing = False
    opt.finish(caught.value.journal, closure)
    for name, value in net.state_dict().items():
        unmoved = name in ("1.weight", "1.bias", "2.weight", "2.bias")
        assert torch.equal(value, after[name]) == unmoved, name


def test_closure_that_does_not_repeat_is_refused() -> None:
    torch.manual_seed(0)
    net, x, runs = _mlp(), torch.randn(5, 6), 0

    def closure() -> Tensor:
        nonlocal runs
        runs += 1
        out = net(x).square().mean()
        return out * 2 if runs > 3 and runs % 2 else out

    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-2, memory="replay")
    with pytest.raises(RuntimeError, match="does not repeat"):
        for _ in range(4):
            opt.step(closure)
