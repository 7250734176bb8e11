"""Every bad input raises an error that names the cause, the place and the remedy, and changes nothing.

"Our reading" marks a test of behaviour that the specification leaves open.
"""

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import ActivationPerturbation, ClosureError, GuessGradOptimizer, WPerp
from guessopt.step import runs as runs_module
from tests.problems import seeded

pytestmark = pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")  # BatchNorm couples the examples

Closure = Callable[[], Any]
Params = Callable[[nn.Sequential], Any]

torch.manual_seed(0)
X = torch.randn(8, 5)
LABELS = torch.arange(8) % 3
OTHER = nn.Linear(5, 3)


def build_model() -> nn.Sequential:
    """With dropout and batch norm: a failed step could change random states and buffers."""
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.3), nn.Linear(7, 3))


def build_optimizer(model: nn.Module, **options: Any) -> GuessGradOptimizer:
    return GuessGradOptimizer(model.parameters(), lr=0.01, seed=0, **options)


def good(model: nn.Module) -> Closure:
    return lambda: F.cross_entropy(model(X + np.random.rand() + random.random()), LABELS)


def flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from flat(part, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from flat(part, f"{path}[{index}]")
    else:
        yield path, value


def snapshot(model: nn.Module, optimizer: GuessGradOptimizer | None = None) -> dict[str, Any]:
    """Parameters, buffers, `.grad`, random states and the optimizer's state, as one flat dict."""
    everything = {
        "model": dict(model.state_dict()),
        "grad": {name: p.grad for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "random": random.getstate(),
        "optimizer": optimizer.state_dict() if optimizer else None,
        "grad mode": torch.is_grad_enabled(),
    }
    return copy.deepcopy(dict(flat(everything, "")))


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for path, old in before.items():
        same = torch.equal(old, after[path]) if isinstance(old, Tensor) and isinstance(after[path], Tensor) else None
        assert np.array_equal(old, after[path]) if same is None else same, f"{path} has changed"


@contextmanager
def untouched(model: nn.Module, optimizer: GuessGradOptimizer | None = None) -> Iterator[None]:
    before = snapshot(model, optimizer)
    yield
    assert_same(before, snapshot(model, optimizer))


def leave_grads(model: nn.Module) -> None:
    """Set ``.grad`` of all parameters but the last."""
    for index, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, index + 1.0)
    p.grad = None


# ---------------------------------------------------------------------------------------------------- closures


def backward(model: nn.Module) -> Any:
    loss = good(model)()
    loss.backward()
    return loss


def backward_with_grad_enabled(model: nn.Module) -> Any:
    with torch.enable_grad():
        loss = good(model)()
        loss.backward()
    return loss


def closure_of_torch_optim(model: nn.Module) -> Any:
    model.zero_grad()
    return backward(model)


def inference_mode(model: nn.Module) -> Any:
    with torch.inference_mode():
        return good(model)()


def inference_mode_around_the_model(model: nn.Module) -> Any:
    with torch.inference_mode():
        out = model(X)
    return F.cross_entropy(out, LABELS)


def one_infinite_example(model: nn.Module) -> Any:
    losses = F.cross_entropy(model(X), LABELS, reduction="none")
    return torch.cat([losses[:-1], losses[-1:] * torch.inf])


def no_examples(model: nn.Sequential, reduction: str) -> Any:
    head = nn.Sequential(model[0], model[4])  # BatchNorm itself would refuse
    return F.cross_entropy(head(X[:0]), LABELS[:0], reduction=reduction)


INDEPENDENT = r"(?i)depend|parameter"
#: name -> (what the closure does, what the message speaks of)
BAD_CLOSURES: dict[str, tuple[Callable[[nn.Sequential], Any], str]] = {
    "calls backward": (backward, r"backward"),
    "calls backward with grad enabled": (backward_with_grad_enabled, r"backward"),
    "zeroes grad, then calls backward": (closure_of_torch_optim, r"backward"),
    "returns None": (lambda m: print(good(m)(), end=""), r"(?i)return.*None|None.*return"),
    "returns an int": (lambda m: int(good(m)() * 0) + 3, r"(?i)return.*int|int.*return"),
    "returns a float": (lambda m: good(m)().item(), r"(?i)return.*float|float.*return"),
    "returns loss and output": (lambda m: (good(m)(), m(X)), r"(?i)return.*tuple|tuple.*return"),  # our reading
    "returns a matrix": (lambda m: m(X), r"(?i)shape|scalar"),  # our reading
    "returns a count": (lambda m: (m(X).argmax(1) == LABELS).sum(), r"(?i)int64|integer|floating|dtype|depend"),
    "gives nan": (lambda m: good(m)() * torch.nan, r"(?i)finite|nan"),
    "gives inf": (lambda m: good(m)() * torch.inf, r"(?i)finite|inf"),
    "gives inf for one example": (one_infinite_example, r"(?i)finite|inf"),
    "detaches the output": (lambda m: F.cross_entropy(m(X).detach(), LABELS), INDEPENDENT),
    "returns a constant": (lambda m: torch.tensor(good(m)().item()), INDEPENDENT),
    "uses another model": (lambda m: F.cross_entropy(OTHER(X), LABELS), INDEPENDENT),
    "uses no model": (lambda m: X.pow(2).mean(), INDEPENDENT),
    "inference mode": (inference_mode, r"inference"),
    "inference mode around the model": (inference_mode_around_the_model, r"inference"),
    "empty batch, mean": (lambda m: no_examples(m, "mean"), r"(?i)empty"),
    "empty batch, sum": (lambda m: no_examples(m, "sum"), r"(?i)empty"),
    "empty batch, per example": (lambda m: no_examples(m, "none"), r"(?i)empty"),
}


@pytest.mark.parametrize("method", ["step", "estimate"])
@pytest.mark.parametrize("warm", [0, 2], ids=["first step", "third step"])
@pytest.mark.parametrize(("closure", "message"), BAD_CLOSURES.values(), ids=BAD_CLOSURES)
def test_bad_closure(closure: Callable[[nn.Sequential], Any], message: str, warm: int, method: str) -> None:
    model = build_model()
    optimizer = build_optimizer(model)
    for _ in range(warm):
        optimizer.step(good(model))
    leave_grads(model)
    with untouched(model, optimizer), pytest.raises(ClosureError, match=message):
        getattr(optimizer, method)(lambda: closure(model))
    assert torch.isfinite(torch.as_tensor(optimizer.step(good(model))))  # and training goes on


def test_closure_error_is_a_runtime_error() -> None:
    assert issubclass(ClosureError, RuntimeError)


def test_check_finite_can_be_switched_off() -> None:
    """Our reading: the step then returns the non-finite loss, as a plain optimizer does."""
    model = build_model()
    optimizer = build_optimizer(model, check_finite=False)
    assert torch.isnan(torch.as_tensor(optimizer.estimate(lambda: good(model)() * torch.nan)))


def test_a_second_pass_that_gives_another_loss() -> None:
    """A step may or may not run the closure twice. If it does, it must notice that the losses differ."""
    model = build_model()
    optimizer = build_optimizer(model)
    calls = count(1)  # what the closure itself binds is put back

    def drifting() -> Tensor:
        return next(calls) * F.cross_entropy(model(X), LABELS)

    before = snapshot(model, optimizer)
    try:
        optimizer.step(drifting)
    except ClosureError as error:
        assert "loss" in str(error)
        assert_same(before, snapshot(model, optimizer))
    else:
        assert next(calls) == 2


# ----------------------------------------------------------------------------- exceptions raised in the closure


class Boom(Exception):
    """An exception of the user's."""


EXCEPTIONS = {"own type": Boom("boom"), "RuntimeError": RuntimeError("boom"), "StopIteration": StopIteration("boom")}


@pytest.mark.parametrize("error", EXCEPTIONS.values(), ids=EXCEPTIONS)
@pytest.mark.parametrize("late", [False, True], ids=["before the model", "after the model"])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("method", ["step", "estimate"])
def test_an_exception_in_the_closure(method: str, at: int, late: bool, error: Exception) -> None:
    """The step raises the closure's exception, whichever run raises it. Later steps are as if it had not happened."""
    model = build_model()
    twin = copy.deepcopy(model)
    optimizer, other = build_optimizer(model), build_optimizer(twin)
    calls = count(1)

    def closure() -> Tensor:
        call = next(calls)
        if call == at and not late:
            raise error
        loss: Tensor = good(model)()
        if call == at:
            raise error
        return loss

    for step in range(at):  # a step runs the closure at least once
        seeded(step)
        optimizer.zero_grad()
        leave_grads(model)
        before = snapshot(model, optimizer)
        try:
            getattr(optimizer, method)(closure)
        except type(error) as caught:
            assert caught is error
            break
        other.zero_grad()
        leave_grads(twin)
        seeded(step)
        getattr(other, method)(good(twin))
    assert next(calls) == at + 1
    assert_same(before, snapshot(model, optimizer))

    seeded(50)
    optimizer.zero_grad()
    optimizer.step(good(model))
    seeded(50)
    other.zero_grad()
    other.step(good(twin))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_an_error_of_torch_in_the_closure_stays_what_it_is() -> None:
    model = build_model()
    optimizer = build_optimizer(model)
    with untouched(model, optimizer), pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        optimizer.step(lambda: F.cross_entropy(model(X[:, :3]), LABELS))
    assert type(caught.value) is RuntimeError


# ------------------------------------------------------------------------------------ calls in the wrong order


@pytest.mark.parametrize("warm", [0, 2], ids=["first step", "third step"])
def test_step_with_nothing_estimated(warm: int) -> None:
    model = build_model()
    optimizer = build_optimizer(model)
    for _ in range(warm):
        optimizer.step(good(model))
    optimizer.zero_grad()
    with untouched(model, optimizer), pytest.raises(RuntimeError, match=r"(?i)estimate|closure"):
        optimizer.step()


def test_step_of_a_closure_with_estimates_pending() -> None:
    model = build_model()
    optimizer = build_optimizer(model)
    optimizer.estimate(good(model))
    with untouched(model, optimizer), pytest.raises(RuntimeError, match=r"(?i)step\(\)|zero_grad"):
        optimizer.step(good(model))
    optimizer.step()


def test_step_of_something_that_is_no_closure() -> None:
    """Our reading. For example, a loss in place of the closure."""
    model = build_model()
    optimizer = build_optimizer(model)
    loss = F.cross_entropy(model(X), LABELS)
    with untouched(model, optimizer), pytest.raises(TypeError, match=r"(?i)closure|callable"):
        optimizer.step(loss)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ construction

BAD_PARAMS: dict[str, tuple[Params, str]] = {
    "empty list": (lambda m: [], r"(?i)empty|no param"),
    "used-up generator": (lambda m: iter([]), r"(?i)empty|no param"),
    "group without parameters only": (lambda m: [{"params": []}], r"(?i)empty|no param|require|train"),  # our reading
    "all frozen": (lambda m: m.requires_grad_(False).parameters(), r"(?i)requires_grad|frozen|trainable"),
    "given twice": (lambda m: [m[0].weight, m[0].bias, m[0].weight], r"(?i)duplicate|twice|more than"),
    "given twice, named": (lambda m: [("a", m[0].weight), ("b", m[0].weight)], r"(?i)duplicate|twice|more than"),
    "given in two groups": (
        lambda m: [{"params": m.parameters()}, {"params": [m[4].bias]}],
        r"(?i)duplicate|twice|more than",
    ),
    "a tensor": (lambda m: m[0].weight, r"(?i)param"),
    "not a tensor": (lambda m: [m[0].weight, 3.0], r"(?i)param|tensor"),
    "not a leaf": (lambda m: [p * 2 for p in m.parameters()], r"(?i)leaf"),
    "the model": (lambda m: m[0], r"."),  # our reading
}


@pytest.mark.parametrize(("params", "message"), BAD_PARAMS.values(), ids=BAD_PARAMS)
def test_bad_params(params: Params, message: str) -> None:
    model = build_model()
    given = params(model)
    leave_grads(model)
    with untouched(model), pytest.raises((ValueError, TypeError), match=message):
        GuessGradOptimizer(given, lr=0.01)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "estimator misspelt": ({"estimator": "w_prep"}, r"w_perp"),
    "estimator misspelt, 2": ({"estimator": "activation_pertubation"}, r"activation_perturbation"),
    "estimator is no estimator": ({"estimator": 3}, r"(?i)estimator"),
    "estimator is another class": ({"estimator": nn.Linear}, r"(?i)estimator"),
    "memory": ({"memory": "nonsense"}, r"(?s)nonsense.*store|store.*nonsense"),
    "engine": ({"engine": "nonsense"}, r"(?s)nonsense.*func|func.*nonsense"),
    "guesses = 0": ({"guesses": 0}, r"guesses"),
    "guesses = -1": ({"guesses": -1}, r"guesses"),
    "guesses = 1.5": ({"guesses": 1.5}, r"guesses"),
    "base is a number": ({"base": 3}, r"(?i)base|optimizer"),
    "base is another class": ({"base": nn.Linear}, r"."),
    "base gives None": ({"base": lambda groups: None}, r"(?i)base|optimizer"),
    "base gives something else": ({"base": list}, r"(?i)base|optimizer"),
    "base refuses lr": ({"lr": -1.0}, r"(?i)learning rate|lr"),
    "unknown option of the base": ({"momentun": 0.9}, r"momentun"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    model = build_model()
    leave_grads(model)
    with untouched(model), pytest.raises((ValueError, TypeError), match=message):
        GuessGradOptimizer(model.parameters(), **options)


def test_a_group_with_an_unknown_estimator() -> None:
    model = build_model()
    groups = [{"params": model[0].parameters()}, {"params": model[4].parameters(), "estimator": "w_prep"}]
    with untouched(model), pytest.raises((ValueError, TypeError), match="w_perp"):
        GuessGradOptimizer(groups)
    optimizer = GuessGradOptimizer(model[0].parameters())
    with untouched(model, optimizer), pytest.raises((ValueError, TypeError), match="w_perp"):
        optimizer.add_param_group({"params": model[4].parameters(), "estimator": "w_prep"})


BAD_ESTIMATORS: dict[str, tuple[Callable[[], Any], str]] = {
    "k = 0": (lambda: WPerp(k=0), r"\bk\b"),
    "k = -1": (lambda: WPerp(k=-1), r"\bk\b"),
    "k = 2.5": (lambda: WPerp(k=2.5), r"\bk\b"),  # type: ignore[arg-type]
    "refresh = 0": (lambda: WPerp(refresh=0), r"refresh"),
    "basis": (lambda: WPerp(basis="nonsense"), r"(?s)basis.*shared"),  # type: ignore[arg-type]
    "select": (lambda: WPerp(select="nonsense"), r"(?s)select.*top"),  # type: ignore[arg-type]
    "noise": (lambda: ActivationPerturbation(noise="nonsense"), r"(?s)noise.*normal"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("build", "message"), BAD_ESTIMATORS.values(), ids=BAD_ESTIMATORS)
def test_bad_options_of_an_estimator(build: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_k_larger_than_every_site_is_refused() -> None:
    model = build_model()
    optimizer = build_optimizer(model, estimator=WPerp(k=1000))
    leave_grads(model)
    with untouched(model, optimizer), pytest.raises(ValueError, match=r"k: 1000 exceeds the rank of every site.*3"):
        optimizer.estimate(lambda: F.cross_entropy(model(X), LABELS))


def test_k_larger_than_some_site_is_clipped_to_its_rank() -> None:
    """The rank before the head is 3, and no other layer has a larger one: k = 10 guesses as k = 3 does."""
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    gradients = []
    for k in (3, 10):
        model.zero_grad()
        optimizer = GuessGradOptimizer(model.parameters(), estimator=WPerp(k=k), lr=0.1, seed=0)
        optimizer.estimate(lambda: F.cross_entropy(model(X), LABELS))
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)
    assert all(g is not None and g.any() for g in gradients[0])


def test_lazy_parameters_are_refused_before_their_first_forward() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"params: item 0 belongs to a lazy module .* run the model once"):
        GuessGradOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    with torch.no_grad():
        model(torch.randn(5, 4))
    GuessGradOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("repeats", [True, False])
def test_a_loss_that_another_kernel_finds_elsewhere(repeats: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The closure repeats if two of three runs agree; rounding has then moved the loss of the third run."""
    torch.manual_seed(0)
    model, x, runs, trace = nn.Linear(4, 2), torch.randn(6, 4), itertools.count(), runs_module.trace

    def closure() -> Tensor:
        return model(x).square().mean() + (0.0 if repeats else 0.1 * torch.full((), float(next(runs))))

    def elsewhere(*args: Any, **kwargs: Any) -> Any:
        plan = trace(*args, **kwargs)
        plan.loss = plan.loss * 1.5
        return plan

    monkeypatch.setattr(runs_module, "trace", elsewhere)
    opt = GuessGradOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, audit=False)
    if repeats:
        opt.step(closure)
    else:
        with pytest.raises(ClosureError, match="does not repeat"):
            opt.step(closure)
