"""Hooks on parameters act on estimates as they do on the gradients of backward(); other hooks are refused by name."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import ClosureError, GuessGradOptimizer, plan, preflight
from guessopt.diagnostics import estimated_gradient, true_gradient
from guessopt.step.mode import MODES

torch.manual_seed(0)
X = torch.randn(8, 5, dtype=torch.float64)
LABELS = torch.arange(8) % 3
Closure = Callable[[], Tensor]


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def loss_of(model: nn.Module, decay: float = 0.0) -> Closure:
    """With ``decay`` the loss also reads the parameters. Autograd computes this part of the gradient."""
    return lambda: F.cross_entropy(model(X), LABELS) + decay * sum(p.square().sum() for p in model.parameters())


def sgd(model: nn.Module, memory: str = "store", **options: Any) -> GuessGradOptimizer:
    return GuessGradOptimizer(model.named_parameters(), torch.optim.SGD, lr=1.0, seed=0, memory=memory, **options)


def moves(model: nn.Module, act: Callable[[], Any]) -> dict[str, Tensor]:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    act()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def estimate_and_step(optimizer: GuessGradOptimizer, closure: Closure) -> None:
    optimizer.estimate(closure)
    optimizer.step()


MASK = torch.zeros(6, 5, dtype=torch.float64)
MASK[0] = 1
#: Hooks of a parameter, and what they make of its gradient.
PARAMETER_HOOKS: dict[str, tuple[list[Callable[[Tensor], Any]], Callable[[Tensor], Tensor]]] = {
    "mask": ([lambda g: g * MASK], lambda g: g * MASK),
    "scale": ([lambda g: 3 * g], lambda g: 3 * g),
    "in order": ([lambda g: 3 * g, lambda g: g + 1], lambda g: 3 * g + 1),
    "in place": ([lambda g: g.mul_(2)], lambda g: 2 * g),
    "only looks": ([lambda g: None], lambda g: g),
}


@pytest.mark.parametrize("act", [GuessGradOptimizer.step, estimate_and_step], ids=["step", "estimate"])
@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize(("hooks", "effect"), PARAMETER_HOOKS.values(), ids=PARAMETER_HOOKS)
def test_hooks_act_on_the_whole_estimate_once(
    hooks: list[Callable[[Tensor], Any]], effect: Callable[[Tensor], Tensor], memory: str, act: Any
) -> None:
    model, twin = mlp(), mlp()
    handles = [model[0].weight.register_hook(hook) for hook in hooks]
    optimizer, other = sgd(model, memory), sgd(twin, memory)
    for _ in range(2):
        twin.load_state_dict(model.state_dict())
        optimizer.zero_grad()
        other.zero_grad()
        moved = moves(model, lambda: act(optimizer, loss_of(model, 0.1)))
        plain = moves(twin, lambda: act(other, loss_of(twin, 0.1)))
        for name, p in plain.items():
            torch.testing.assert_close(moved[name], effect(p) if name == "0.weight" else p)
    for handle in handles:
        handle.remove()
    assert not model[0].weight._backward_hooks
    twin.load_state_dict(model.state_dict())
    optimizer.zero_grad()
    other.zero_grad()
    moved = moves(model, lambda: act(optimizer, loss_of(model)))
    plain = moves(twin, lambda: act(other, loss_of(twin)))
    for name in plain:
        torch.testing.assert_close(moved[name], plain[name])


def test_measurements_and_plans_call_no_hook() -> None:
    model = mlp()
    called: list[Any] = []
    model[0].weight.register_hook(called.append)
    model[0].weight.register_post_accumulate_grad_hook(called.append)
    optimizer = sgd(model)
    closure = loss_of(model, 0.1)
    preflight(optimizer, closure)
    plan(optimizer, closure)
    estimated_gradient(optimizer, closure)
    true_gradient(optimizer, closure)
    assert not called and model[0].weight._backward_hooks
    optimizer.step(closure)
    assert len(called) == 2


@pytest.mark.parametrize("memory", MODES)
def test_post_accumulate_hooks_find_the_gradient(memory: str) -> None:
    model, seen = mlp(), list[tuple[str, Tensor]]()
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(
            lambda q, name=name: seen.append((name, q.grad.clone()))  # type: ignore[misc, union-attr]
        )
    optimizer = sgd(model, memory)
    for _ in range(2):
        seen.clear()
        moved = moves(model, lambda: optimizer.step(loss_of(model)))
        assert sorted(name for name, _ in seen) == sorted(moved)
        for name, g in seen:
            torch.testing.assert_close(moved[name], g)
    seen.clear()
    optimizer.zero_grad()
    optimizer.estimate(loss_of(model))
    assert len(seen) == 4
    optimizer.step()
    assert len(seen) == 4


@pytest.mark.parametrize("memory", MODES)
def test_an_optimizer_in_the_backward_updates_by_itself(memory: str) -> None:
    """A hook that applies and frees the gradient leaves nothing for the base."""
    model, twin = mlp(), mlp()
    for p in model.parameters():
        own = torch.optim.Adam([p], lr=0.01)

        def apply(q: Tensor, own: torch.optim.Optimizer = own) -> None:
            own.step()
            own.zero_grad()

        p.register_post_accumulate_grad_hook(apply)
    optimizer = sgd(model, memory)
    other = GuessGradOptimizer(twin.parameters(), torch.optim.Adam, lr=0.01, seed=0, memory=memory)
    for _ in range(3):
        optimizer.step(loss_of(model))
        other.step(loss_of(twin))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


BAD_HOOKS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "raises": (lambda g: 1 / 0, ZeroDivisionError, "division"),
    "shape": (lambda g: g[:1], RuntimeError, r"2\.weight: a hook returned a gradient of shape \[1, 6\]"),
    "dtype": (lambda g: g.float(), RuntimeError, r"2\.weight: a hook returned.*float32"),
    "no tensor": (lambda g: 1.0, TypeError, r"2\.weight: a hook returned float"),
}


@pytest.mark.parametrize("method", ["step", "estimate"])
@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize(("hook", "error", "message"), BAD_HOOKS.values(), ids=BAD_HOOKS)
def test_a_hook_that_fails_changes_nothing(
    hook: Callable[[Tensor], Any], error: type[Exception], message: str, memory: str, method: str
) -> None:
    model = mlp()
    model[2].weight.register_hook(hook)
    optimizer = sgd(model, memory)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    if memory == "stream" and method == "step":
        with pytest.raises(RuntimeError, match="2 of 4|" + message if error is RuntimeError else "2 of 4|failed"):
            optimizer.step(loss_of(model))
        assert model[2].weight._backward_hooks and torch.equal(model[2].weight, before["2.weight"])
        return
    with pytest.raises(error, match=message):
        getattr(optimizer, method)(loss_of(model))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters())
    assert torch.equal(random, torch.get_rng_state()) and model[2].weight._backward_hooks


def test_a_post_accumulate_hook_that_fails_leaves_accumulated_gradients() -> None:
    model = mlp()
    optimizer = sgd(model)
    optimizer.estimate(loss_of(model))
    before = [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]

    def fail(p: Tensor) -> None:
        raise ZeroDivisionError

    model[2].weight.register_post_accumulate_grad_hook(fail)
    with pytest.raises(ZeroDivisionError):
        optimizer.estimate(loss_of(model))
    for p, (g, value) in zip(model.parameters(), before, strict=True):
        assert p.grad is g and torch.equal(g, value)


def activation(model: nn.Sequential) -> Closure:
    def closure() -> Tensor:
        h = model[1](model[0](X))
        if h.requires_grad:
            h.register_hook(lambda g: 0.1 * g)
        return F.cross_entropy(model[2](h), LABELS)

    return closure


def several(model: nn.Sequential) -> Closure:
    def closure() -> Tensor:
        h = model[1](model[0](X))
        torch.autograd.graph.register_multi_grad_hook([h], lambda _: None)
        return F.cross_entropy(model[2](h), LABELS)

    return closure


def of_parameter(kind: str) -> Callable[[nn.Sequential], Closure]:
    def make(model: nn.Sequential) -> Closure:
        def closure() -> Tensor:
            getattr(model[0].weight, kind)(lambda g: None)
            return loss_of(model)()

        return closure

    return make


def of_module(kind: str, at: int) -> Callable[[nn.Sequential], Closure]:
    def make(model: nn.Sequential) -> Closure:
        getattr(model[at], kind)(lambda *_: None)
        return loss_of(model)

    return make


MODULE = r"\({}\) has a backward hook.*remove it"
REFUSED: dict[str, tuple[Callable[[nn.Sequential], Closure], str]] = {
    "on an activation": (activation, r"register_hook\(\) on a tensor of shape \[8, 6\].*autograd\.Function"),
    "on several activations": (several, r"register_multi_grad_hook\(\) on a tensor of shape \[8, 6\]"),
    "on a parameter, in the closure": (of_parameter("register_hook"), r"register_hook\(\).*outside the closure"),
    "post-accumulate, in the closure": (
        of_parameter("register_post_accumulate_grad_hook"),
        r"register_post_accumulate_grad_hook\(\).*outside the closure",
    ),
    "full backward, first module": (of_module("register_full_backward_hook", 0), MODULE.format("Linear")),
    "full backward, middle": (of_module("register_full_backward_hook", 1), MODULE.format("Tanh")),
    "full backward pre, first": (of_module("register_full_backward_pre_hook", 0), MODULE.format("Linear")),
    "full backward pre, last": (of_module("register_full_backward_pre_hook", 2), MODULE.format("Linear")),
    "backward, of old": (of_module("register_backward_hook", 1), MODULE.format("Tanh")),
}


@pytest.mark.parametrize("warm", [0, 5], ids=["first step", "later"])
@pytest.mark.parametrize("engine", ["fast", "dual", "func"])
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_other_hooks_are_refused_by_name(
    make: Callable[[nn.Sequential], Closure], message: str, engine: str, warm: int
) -> None:
    model = mlp()
    optimizer = sgd(model, engine=engine)
    for _ in range(warm):
        optimizer.step(loss_of(model))
    closure = make(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ClosureError, match=message):
        optimizer.step(closure)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_hooks_under_no_grad_are_as_idle_as_in_torch() -> None:
    """A backward hook on a teacher: backward() does not call it either."""
    model, teacher = mlp(), mlp()
    teacher[0].register_full_backward_hook(lambda *_: None)

    def closure() -> Tensor:
        with torch.no_grad():
            target = teacher(X)
        return F.mse_loss(model(X), target)

    assert sgd(model).step(closure) is not None
