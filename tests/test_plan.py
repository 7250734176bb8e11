"""``guessopt.plan`` and ``memory="auto"`` try the modes on the user's closure and change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import guessopt
from guessopt import GuessGradOptimizer, LearnedFeedback, WPerp, memory_plan
from guessopt.memory_plan import bytes_of, cpu_peak

from .machine import skip_if_refused


def _problem(depth: int = 6, width: int = 64, batch: int = 256) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    hidden = [m for _ in range(depth - 1) for m in (nn.Linear(width, width), nn.ReLU())]
    net = nn.Sequential(*hidden, nn.BatchNorm1d(width), nn.Dropout(0.1), nn.Linear(width, 4))
    x, y = torch.randn(batch, width), torch.randint(4, (batch,))
    return net, lambda: F.cross_entropy(net(x), y)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(1, 1), ("8GB", 8 * 10**9), ("512MiB", 512 * 2**20), (" 1.5 kb ", 1500), ("2TiB", 2**41), ("100 B", 100)],
)
def test_budgets(given: int | str, expected: int) -> None:
    assert bytes_of(given) == expected


@pytest.mark.parametrize("given", ["eight GB", "", "GB", "-1GB", "8 G", "0", 0, -5, True, 1.5, None, "1e9"])
def test_bad_budgets_are_named(given: Any) -> None:
    with pytest.raises(ValueError, match=r"budget:.*512MiB"):
        bytes_of(given)


def test_budget_goes_with_auto_alone() -> None:
    net, _ = _problem()
    with pytest.raises(ValueError, match=r"budget: memory='replay' takes none"):
        GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-2, memory="replay", budget="1GB")
    with pytest.raises(ValueError, match="budget: 'much'"):
        GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-2, memory="auto", budget="much")


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize("trained", [0, 3])
def test_plan_changes_nothing(trained: int) -> None:
    """Training goes on bit for bit as if ``plan`` had not been called."""
    runs = []
    for asks in (False, True):
        net, closure = _problem()
        opt = GuessGradOptimizer(net.parameters(), torch.optim.AdamW, WPerp(k=2, refresh=2), lr=1e-2, seed=1)
        for _ in range(trained):
            opt.step(closure)
        net[0].weight.grad = torch.ones_like(net[0].weight)
        if asks:
            found = guessopt.plan(opt, closure)
            assert found.recommended in {"store", "replay", "stream"} and opt.memory == "store"
            assert bool((net[0].weight.grad == 1).all())
        losses = [opt.step(closure).item() for _ in range(4)]
        runs.append((losses, {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()))
    (a, b) = runs
    assert a[0] == b[0] and torch.equal(a[2], b[2])
    for key, value in a[1].items():
        assert torch.equal(value, b[1][key]), key


def test_plan_leaves_warnings_to_the_first_step(recwarn: pytest.WarningsRecorder) -> None:
    net, closure = _problem()
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-2)
    guessopt.plan(opt, closure)
    assert not [w for w in recwarn if issubclass(w.category, guessopt.GuessWarning)]
    with pytest.warns(guessopt.GuessWarning, match="examples interact"):
        opt.step(closure)


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
def test_peaks_are_those_of_steps() -> None:
    """The table's peak of a mode is the peak of a first step in this mode without the update."""
    net, closure = _problem()
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-2)
    told = {each.mode: each.peak for each in guessopt.plan(opt, closure).modes}
    for memory, peak in told.items():
        own = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-2, memory=memory)
        _, measured = cpu_peak(lambda own=own: own.step(closure))
        for p in net.parameters():
            p.grad = None
        assert peak == pytest.approx(measured, rel=0.1), memory
    assert told["stream"] <= told["replay"] < told["store"]


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize(("depth", "width", "batch"), [(10, 32, 1024), (8, 256, 64)])
def test_backprop_is_estimated(depth: int, width: int, batch: int) -> None:
    """From the tensors that autograd would save: mostly activations, then mostly gradients."""
    net, closure = _problem(depth, width, batch)
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-2)
    found = guessopt.plan(opt, closure)
    _, measured = cpu_peak(lambda: closure().backward())
    assert found.backprop.peak == pytest.approx(measured, rel=0.1)
    assert found.checkpointed.peak <= found.backprop.peak
    assert found.checkpointed.seconds == pytest.approx(found.backprop.seconds * 4 / 3)
    if batch == 1024:
        assert found.checkpointed.peak < 0.8 * found.backprop.peak


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
def test_recommends_what_fits_and_says_when_backprop_does() -> None:
    net, closure = _problem(depth=16, batch=1024)
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-2)
    free = guessopt.plan(opt, closure)
    peaks = {each.mode: each.peak for each in free.modes}
    assert free.exact is free.backprop and "exact: prefer" in str(free)
    tight = guessopt.plan(opt, closure, budget=(peaks["replay"] + peaks["store"]) // 2)
    assert tight.recommended in {"replay", "stream"}
    assert [each.fits for each in tight.modes] == [False, True, True]
    none = guessopt.plan(opt, closure, budget=1000)
    assert none.recommended is None and none.exact is None and "none fits" in str(none)


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
def test_running_out_of_memory_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    net, closure = _problem()
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-2)
    estimate = memory_plan.estimate

    def short_of_memory(*args: Any) -> Any:
        if opt.memory == "store":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return estimate(*args)

    monkeypatch.setattr(memory_plan, "estimate", short_of_memory)
    found = guessopt.plan(opt, closure)
    assert found.modes[0].peak is None and found.recommended != "store" and "out of memory" in str(found)


def test_errors_of_the_closure_come_through() -> None:
    net, _ = _problem()
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-2)
    with pytest.raises(guessopt.ClosureError, match="must return the loss"):
        guessopt.plan(opt, lambda: None)
    assert opt.memory == "store"


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
def test_auto_takes_store_where_nothing_limits() -> None:
    net, closure = _problem()
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-2, memory="auto")
    assert "memory='auto'" in repr(opt)
    opt.estimate(closure)
    assert opt.memory == "store" and "memory='store'" in repr(opt)


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
def test_auto_keeps_to_its_budget() -> None:
    net, closure = _problem(depth=16, batch=1024)
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-2)
    peaks = {each.mode: each.peak for each in guessopt.plan(opt, closure).modes}
    before = net[0].weight.detach().clone()
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-2, memory="auto", budget=f"{peaks['replay']} B")
    opt.step(closure)
    assert opt.memory in {"replay", "stream"} and not torch.equal(before, net[0].weight)
    net, closure = _problem()
    tiny = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-2, memory="auto", budget="1kB")
    before = net[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"budget: no memory mode fits 1000 bytes \(memory='\w+' needs"):
        tiny.step(closure)
    assert tiny.memory == "auto" and torch.equal(before, net[0].weight)


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
def test_learned_feedback_in_every_mode_but_one_along_a_stream() -> None:
    net, closure = _problem(depth=10, batch=1024)
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, LearnedFeedback(gamma=0), lr=1e-2, memory="stream")
    peaks = {each.mode: each.peak for each in guessopt.plan(opt, closure).modes}
    assert peaks["stream"] <= peaks["replay"] < 0.5 * peaks["store"]
    inner, x = nn.Linear(8, 8), torch.randn(16, 8)
    ends = nn.Linear(8, 8), nn.Linear(8, 2)

    def residual() -> Tensor:
        h = ends[0](x)
        return ends[1](h + inner(h.relu())).square().mean()

    params = [*inner.parameters(), *(p for end in ends for p in end.parameters())]
    for keep, modes in ((True, ["store", "replay"]), (False, ["store", "replay", "stream"])):
        opt = GuessGradOptimizer(params, torch.optim.SGD, LearnedFeedback(residual=keep), lr=1e-2, memory="auto")
        assert [each.mode for each in guessopt.plan(opt, residual).modes] == modes
        opt.step(residual)
        assert opt.memory == "store"


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
def test_no_plan_under_a_profiler() -> None:
    net, closure = _problem(depth=2)
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-2)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with profiler, pytest.raises(RuntimeError, match="profiler, which is running"):
        guessopt.plan(opt, closure)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
def test_auto_reads_free_memory_of_the_gpu() -> None:
    skip_if_refused(lambda: torch.zeros(1, device="cuda"))
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).cuda()
    x = torch.randn(256, 64, device="cuda")
    opt = GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-2, memory="auto")

    def closure() -> Tensor:
        return net(x).square().mean()

    opt.step(closure)
    assert opt.memory in {"store", "replay", "stream"}
    peaks = {each.mode: each.peak for each in guessopt.plan(opt, closure).modes}
    assert all(peak > 0 for peak in peaks.values())
