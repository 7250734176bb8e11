"""The audit: silent on legitimate code, loud where a tangent is lost; and nothing is left behind."""

import copy
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import guessopt
from guessopt import AuditError, AuditReport, ClosureError, GuessGradOptimizer
from guessopt.engine.following import FollowingRun
from guessopt.engine.jvp.fast import FastEngine
from guessopt.tracing.tape import Tape
from tests.problems import PROBLEMS, PassedThrough, build, labels, seeded

SINGLE, DOUBLE = torch.float32, torch.float64
Case = Callable[[torch.dtype], tuple[nn.Module, Callable[[], Tensor]]]


def optimizer(model: nn.Module, estimator: Any = "w_perp", **options: Any) -> GuessGradOptimizer:
    return GuessGradOptimizer(model.named_parameters(), torch.optim.SGD, estimator, lr=1e-3, seed=0, **options)


class Rounding(PassedThrough):
    """Straight-through."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return (x * 4).round() / 4


class Clipped(torch.autograd.Function):
    """A surrogate without a jvp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (x.abs() < 1)


def network(middle: Callable[[Tensor, nn.Module], Tensor], dtype: torch.dtype, **modules: nn.Module) -> Any:
    model = nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 3), **modules}).to(dtype)
    x = torch.randn(6, 4, dtype=dtype)
    return model, lambda: F.cross_entropy(
        model["c"](middle(torch.tanh(model["b"](model["a"](x))), model)), labels(6, 3)
    )


def with_item(h: Tensor, model: Any) -> Tensor:
    return h / h.abs().max().item() if bool(h.mean() < 10) else h


def hard(h: Tensor, model: Any) -> Tensor:
    return F.one_hot(h.argmax(1), h.shape[1]).to(h.dtype) * h


def moe(h: Tensor, model: Any) -> Tensor:
    weights, chosen = h.softmax(1).topk(2, 1)
    return torch.zeros_like(h).scatter(1, chosen, weights) * h


def no_grad_write(h: Tensor, model: Any) -> Tensor:
    h = h * 1
    with torch.no_grad():
        h.clamp_(-0.2, 0.2)
    return h.sin()


def teacher(h: Tensor, model: Any) -> Tensor:
    with torch.no_grad():
        target = model["b"](F.dropout(h, 0.3))
    return h * torch.sigmoid(target - target.mean())


def vector_quantised(h: Tensor, model: Any) -> Tensor:
    codes = torch.linspace(-1, 1, 40, dtype=h.dtype).view(5, 8)
    nearest = codes[torch.cdist(h.detach(), codes).argmin(1)]
    return h + (nearest - h).detach()


def queue(h: Tensor, model: Any) -> Tensor:
    with torch.no_grad():
        model["bn"].running_mean.mul_(0.9).add_(0.1 * h.mean(0))
    return h - model["bn"].running_mean


def in_place(h: Tensor, model: Any) -> Tensor:
    h = h * 1
    h[:, :4] = h[:, 4:].exp()
    part = h[:, 2:]
    part.mul_(2)
    return F.relu(h, inplace=True)


def autocast(h: Tensor, model: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model["b"](F.gelu(model["b"](h))).to(h.dtype)


LEGITIMATE: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "stop-gradient": lambda h, m: h * h.detach().exp(),
    ".data": lambda h, m: h * h.data,
    "no_grad teacher with dropout": teacher,
    "no_grad write": no_grad_write,
    "no_grad buffer": queue,
    "mask": lambda h, m: torch.where(h > 0.1, h * 3, -h),
    "item": with_item,
    "argmax": hard,
    "topk routing": moe,
    "sort": lambda h, m: h.sort(1)[0] * torch.arange(8).to(h.dtype),
    "relu at zero": lambda h, m: F.relu(h * 0 + (h - h)),
    "relu": lambda h, m: m["b"](F.relu(m["b"](h).relu_())),
    "kinks": lambda h, m: h.abs().clamp(max=0.3) + F.leaky_relu(h) + torch.maximum(h, -h) + h.norm(dim=1, keepdim=True),
    "max pooling": lambda h, m: F.max_pool1d(h[:, None], 3, 1, 1)[:, 0],
    "jumps": lambda h, m: h.round() + F.hardshrink(h, 0.1) + h.sign() * h + torch.remainder(h, 0.1),
    "straight-through detach": lambda h, m: h + ((h * 4).round() / 4 - h).detach(),
    "straight-through Function": lambda h, m: Rounding.apply(h),
    "surrogate Function without jvp": lambda h, m: Clipped.apply(h) + h,
    "vector quantisation": vector_quantised,
    "bernoulli": lambda h, m: torch.bernoulli(h.sigmoid()) * h,
    "multinomial": lambda h, m: h.gather(1, torch.multinomial(h.softmax(1), 2)).repeat(1, 4),
    "rrelu": lambda h, m: F.rrelu(h, training=True),
    "gumbel, hard": lambda h, m: F.gumbel_softmax(h, hard=True) * h,
    "dropout": lambda h, m: F.dropout(m["b"](F.dropout(h, 0.5))),
    "batch norm in training mode": lambda h, m: m["bn"](h).tanh(),
    "in place": in_place,
    "complex": lambda h, m: torch.fft.rfft(h).abs().repeat(1, 2)[:, :8],
    "std of constants": lambda h, m: h + h.mul(0).std(1, keepdim=True) + (h * 1e-9).std(1, keepdim=True),
    "normalised zeros": lambda h, m: h + F.normalize(h * 0, eps=1e-6) + F.layer_norm(h * 0, [8]),
    "autocast": autocast,
}


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=["float32", "float64"])
@pytest.mark.parametrize("name", LEGITIMATE)
def test_legitimate_code_passes(name: str, dtype: torch.dtype) -> None:
    model, closure = network(LEGITIMATE[name], dtype, bn=nn.BatchNorm1d(8))
    for estimator in ("w_perp", "activation_perturbation", "directional_descent"):
        report = guessopt.audit(optimizer(model, estimator, audit=False), closure)
        assert report.ok, report
        assert report.measured, report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_passes(dtype: torch.dtype) -> None:
    model, closure = network(lambda h, m: m["b"](F.relu(h)), dtype)
    for seed in range(5):
        torch.manual_seed(seed)
        report = guessopt.audit(optimizer(model, "activation_perturbation"), closure)
        assert report.ok and report.measured, report


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_pass(name: str) -> None:
    problem = build(name)
    for estimator in ("w_perp", "activation_perturbation", "directional_descent"):
        opt = GuessGradOptimizer(problem.named, torch.optim.SGD, estimator, lr=0.0)
        report = guessopt.audit(opt, problem.closure)
        assert report.ok and report.measured, report
        assert all(call.ok for call in report.calls), report


OPTIONS: dict[str, dict[str, Any]] = {
    "replay": {"memory": "replay"},
    "stream": {"memory": "stream"},
    "dual": {"engine": "dual"},
    "func": {"engine": "func"},
    "three guesses": {"guesses": 3},
    "three guesses in turn": {"guesses": 3, "stack_guesses": False},
    "three guesses, replay": {"guesses": 3, "memory": "replay"},
    "debiased": {"estimator": guessopt.WPerp(k=2, debias=True)},
    "learned feedback": {"estimator": guessopt.LearnedFeedback(residual=False)},
    "learned feedback, replay": {"estimator": guessopt.LearnedFeedback(residual=False), "memory": "replay"},
    "downstream": {"estimator": "downstream"},
    "auto": {"estimator": "auto"},
    "directional descent": {"estimator": "directional_descent"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_with_audit_equals_one_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = []
    monkeypatch.setattr(AuditReport, "check", lambda report: reports.append(report))
    torch.manual_seed(3)
    model, closure = network(lambda h, m: F.dropout(F.relu(m["bn"](h)), 0.2), DOUBLE, bn=nn.BatchNorm1d(8))
    start, states = copy.deepcopy(model.state_dict()), []
    for audit in (True, False):
        model.load_state_dict(start)
        seeded(7)
        opt = optimizer(model, **{"estimator": "w_perp", **OPTIONS[name]}, audit=audit)
        losses = [opt.step(closure).item() for _ in range(4)]
        states.append([*losses, *model.state_dict().values(), torch.rand(1), random.random()])
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*states, strict=True))
    assert reports and all(report.ok for report in reports)
    assert any(report.measured for report in reports)


def test_frozen_statistics_are_skipped_and_the_report_says_so() -> None:
    model, closure = network(lambda h, m: m["bn"](h), DOUBLE, bn=nn.BatchNorm1d(8))
    report = guessopt.audit(optimizer(model, batch_norm="frozen_statistics"), closure)
    assert report.ok and not report.measured
    assert "frozen_statistics" in str(report)


def test_writes_through_a_detached_alias_are_skipped_and_the_report_says_so() -> None:
    def write(h: Tensor, model: Any) -> Tensor:
        g = h * 1
        g.detach()[:, 0].zero_()
        return g.sin() + h

    model, closure = network(write, DOUBLE)
    report = guessopt.audit(optimizer(model), closure)
    assert report.ok and not report.measured
    assert "alias" in str(report)


@contextmanager
def losing(name: str) -> Iterator[None]:
    """Operations of this name drop their tangents."""
    call = FastEngine.call

    def lossy(self: Any, fn: Any, args: Any, kwargs: Any, *, writes: bool) -> Any:
        if fn.__name__ == name:
            args = tuple(self.primal(a) if isinstance(a, Tensor) else a for a in args)
        return call(self, fn, args, kwargs, writes=writes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FastEngine, "call", lossy)
        yield


def rotated(h: Tensor, model: Any) -> Tensor:
    pairs = torch.view_as_complex(h.view(6, 4, 2))
    return torch.view_as_real(pairs * torch.polar(h.new_ones(4), h.new_ones(4))).reshape(6, 8) + 0.3 * h


def aliased(h: Tensor, model: Any) -> Tensor:
    h = h * 1
    part = h[:, 3:]
    part.mul_(h[:, :5].exp())
    return h.cos()


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("middle", "lost"),
    [
        pytest.param(rotated, "view_as_complex", id="complex tensors"),
        pytest.param(aliased, "mul_", id="a write through an alias"),
        pytest.param(lambda h, m: h + h.exp(), "exp", id="one operation of two"),
        pytest.param(lambda h, m: F.relu(h) + 0.5 * h, "relu", id="a linearised operation"),
        pytest.param(lambda h, m: Rounding.apply(h) + 0.5 * h, "Rounding.apply", id="a Function"),
        pytest.param(lambda h, m: h * torch.sigmoid(m["b"](h)), "sigmoid", id="a gate"),
    ],
)
def test_a_lost_tangent_is_found_and_named(middle: Any, lost: str, dtype: torch.dtype) -> None:
    torch.manual_seed(5)  # one guess shows a loss of its own size, by chance a small one
    model, closure = network(middle, dtype)
    before = copy.deepcopy(model.state_dict())
    with losing(lost):
        with pytest.raises(AuditError, match=rf"first call that departs is {lost} "):
            optimizer(model, "activation_perturbation").step(closure)
        assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
        optimizer(model, "activation_perturbation", audit=False).step(closure)
    optimizer(model, "activation_perturbation").step(closure)


def test_a_parameter_that_the_plan_takes_to_have_no_part_in_the_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracer that does not follow a gate's value."""
    model, closure = network(lambda h, m: h * torch.sigmoid(m["d"](h)), DOUBLE, d=nn.Linear(8, 8))
    activate = Tape._activate

    def blind(self: Any, t: Tensor, v: int, *, mark: bool = True) -> None:
        if self.count != 5:  # the gate's own linear layer
            activate(self, t, v, mark=mark)

    monkeypatch.setattr(Tape, "_activate", blind)
    with pytest.raises(AuditError, match="does not move as its tangents say"):
        optimizer(model, "activation_perturbation").step(closure)


def test_a_stale_plan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same calls on other operands, with the pass's own check taken out: the loss reads a value that had no part in
    it when the plan was made."""

    def believe(self: Any, call: Any, tensors: list[Tensor]) -> None:
        for t, v in zip(tensors, call.reads, strict=True):
            self.seen[id(t)] = weakref.ref(t), v if v >= 0 else ~v

    monkeypatch.setattr(FollowingRun, "check_tensors", believe)
    chosen = [0]
    model = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)]).double()
    x = torch.randn(6, 4, dtype=DOUBLE)

    def closure() -> Tensor:
        h = torch.tanh(model[0](x))
        heads = model[1](h), model[2](h)
        return F.cross_entropy(heads[0], labels(6, 3)) + heads[chosen[0]].square().mean()

    opt = optimizer(model, "activation_perturbation")
    opt.step(closure)
    chosen[0] = 1
    with pytest.raises(ClosureError, match=r"does not (move as its tangents say|repeat)"):
        opt.step(closure)


def test_noise_that_is_drawn_anew_is_found() -> None:
    noises = iter(torch.randn(20, 6, 8, generator=torch.Generator().manual_seed(0)))  # which nobody can put back
    drawn = [torch.zeros(6, 8)]

    def noisy(h: Tensor, model: Any) -> Tensor:
        return h + drawn[0]

    model, plain = network(noisy, SINGLE)
    opt = optimizer(model)
    opt.step(plain)  # the plan is known, and its loss confirmed

    def closure() -> Tensor:
        drawn[0] = next(noises)
        return plain()

    with pytest.raises(ClosureError, match="does not repeat"):
        opt.step(closure)


def test_it_runs_in_the_first_second_fourth_and_eighth_step(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    model, closure = network(lambda h, m: h.relu(), SINGLE)
    opt = optimizer(model)
    monkeypatch.setattr(AuditReport, "check", lambda report: steps.append(opt.estimation.steps + 1))
    for _ in range(9):
        opt.step(closure)
    assert steps == [1, 2, 4, 8]


def test_the_function_leaves_everything_as_it_was() -> None:
    model, closure = network(lambda h, m: F.dropout(m["bn"](h)), SINGLE, bn=nn.BatchNorm1d(8))
    opt = optimizer(model)
    opt.step(closure)
    before, uses = copy.deepcopy((model.state_dict(), opt.state_dict())), opt.estimation.plans[0].uses
    random_state = torch.get_rng_state()
    text = str(guessopt.audit(opt, closure))
    assert "passed" in text and "linear no. 2" in text
    assert torch.equal(random_state, torch.get_rng_state()) and opt.estimation.plans[0].uses == uses
    after = model.state_dict(), opt.state_dict()
    flat = [torch.utils._pytree.tree_leaves(state) for state in (before, after)]
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*flat, strict=True) if a is not b
               and isinstance(a, (Tensor, int, float)))  # fmt: skip
