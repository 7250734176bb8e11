"""The base's update is all or nothing. Parameters are updated one by one only if the result is equal."""

import copy
import importlib
import importlib.util
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from guessopt import GuessGradOptimizer, PartialUpdateError, plan
from guessopt.step.mode import MODES
from guessopt.update import together

#: Its optimizers number their steps by group.
OPTIMI: Any = importlib.import_module("optimi") if importlib.util.find_spec("optimi") else None
Closure = Callable[[], Tensor]
torch.manual_seed(0)
X = torch.randn(8, 5)
LABELS = torch.arange(8) % 3


def mlp(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    middle = [nn.BatchNorm1d(6)] if norm else []
    return nn.Sequential(nn.Linear(5, 6), *middle, nn.Tanh(), nn.Linear(6, 3))


def loss_of(model: nn.Module) -> Closure:
    return lambda: F.cross_entropy(model(X), LABELS)


# --- one parameter at a time ------------------------------------------------------------------------------------------


class Plain(Optimizer):
    """SGD, with what the classes below do in addition."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "step": 0})

    def held(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    yield group, p

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, p in self.held():
            p.sub_(group["lr"] * p.grad)


class GroupStep(Plain):
    """Adam with the group's step number."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] += 1
        for group, p in self.held():
            state = self.state[p]
            m = state.setdefault("m", torch.zeros_like(p))
            m.lerp_(p.grad, 0.1)
            p.sub_(group["lr"] * m / (1 - 0.9 ** group["step"]))


class GlobalNorm(Plain):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        norm = sum(p.grad.square().sum() for _, p in self.held() if p.grad is not None)
        for group, p in self.held():
            p.sub_(group["lr"] * p.grad / float(norm) ** 0.5)


class Lookahead(Plain):
    """Counts in an attribute; every fifth step goes back half-way."""

    k = 0

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.k = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.k += 1
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.clone())
                if self.k % 5 == 0:
                    p.copy_(slow.lerp_(p, 0.5))


class Wrapper(Optimizer):
    """Holds another optimizer; torch's own copies of optimizers lose its attributes."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        self.inner = Lookahead(params, lr)
        super().__init__([{"params": group["params"]} for group in self.inner.param_groups], {})
        self.param_groups = self.inner.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


class Flat(Plain):
    """The sum of all gradients so far, in one tensor."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr)
        self.total = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for _, p in self.held():
            assert p.grad is not None
            self.total += p.grad.sum()
        for group, p in self.held():
            p.sub_(group["lr"] * self.total * p.grad)


class ScheduleFree(Plain):
    """Its step number is the group's, and it steps in training mode only."""

    def train(self) -> None:
        for group in self.param_groups:
            group["training"] = True

    def eval(self) -> None:
        for group in self.param_groups:
            group["training"] = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if not self.param_groups[0].get("training"):
            raise RuntimeError("not in training mode")
        super().step()
        for group in self.param_groups:
            group["step"] += 1


class Langevin(Plain):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for _, p in self.held():
            p.add_(torch.randn_like(p), alpha=1e-3)


class Stateful(torch.optim.Adagrad):
    """State before the first step."""


class Sparse(torch.optim.SparseAdam):
    """Takes sparse gradients alone."""


class Restless(Plain):
    """An attribute that differs in every update."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.when = random.SystemRandom().random()


TOGETHER: dict[str, tuple[Any, str]] = {
    "a group's counter": (GroupStep, "step differs"),
    "a global norm": (GlobalNorm, "parameter 0 differs"),
    "lookahead": (Lookahead, "k differs"),
    "an optimizer within": (Wrapper, "inner .*differs"),
    "a running sum": (Flat, "parameter . differs"),
    "fails out of training mode": (ScheduleFree, "not in training mode"),
}

if OPTIMI:
    TOGETHER |= {name: (getattr(OPTIMI, name), "step differs") for name in ("StableAdamW", "AdamW")}


@pytest.mark.parametrize(
    ("base", "message", "dtype"),
    [
        *(pytest.param(*row, torch.float32, id=name) for name, row in TOGETHER.items()),
        *(
            pytest.param(*TOGETHER[name], torch.bfloat16, id=f"{name}, bfloat16")
            for name in ("a global norm", "lookahead")
        ),
    ],
)
def test_stream_refuses_a_base_that_updates_parameters_together(base: Any, message: str, dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    optimizer = GuessGradOptimizer(model.parameters(), base, lr=0.05, memory="stream")
    before, numbers = copy.deepcopy(model.state_dict()), random.getstate()
    drawn = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"base {base.__name__} .*{message}.*; use memory='replay'"):
        optimizer.step(lambda: F.cross_entropy(model(X.to(dtype)).float(), LABELS))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(group.get("step", 0) == 0 for group in optimizer.param_groups) and not optimizer.state
    assert torch.equal(drawn, torch.get_rng_state()) and random.getstate() == numbers
    assert [mode.mode for mode in plan(optimizer, lambda: model(X.to(dtype)).float().square().mean()).modes] == [
        "store",
        "replay",
    ]


APART: dict[str, Any] = {
    "plain": Plain,
    "noise of its own": Langevin,
    "state from the start": Stateful,
    "an attribute that never repeats": Restless,
}
if OPTIMI:
    APART["Lion of optimi"] = OPTIMI.Lion


@pytest.mark.parametrize("base", APART.values(), ids=APART)
def test_stream_takes_a_base_that_updates_each_parameter_by_itself(base: Any) -> None:
    found = []
    for memory in ("replay", "stream"):
        model = mlp()
        optimizer = GuessGradOptimizer(model.parameters(), base, lr=0.01, memory=memory, seed=0)
        for _ in range(3):
            optimizer.step(loss_of(model))
        found.append([p.detach() for p in model.parameters()])
    if base is not Langevin:
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("memory", MODES)
def test_sparse_gradients(memory: str) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(10, 4, sparse=True)
    head = nn.Linear(4, 3).requires_grad_(False)
    before = table.weight.detach().clone()
    optimizer = GuessGradOptimizer(table.parameters(), Sparse, "activation_perturbation", lr=0.1, memory=memory)
    for _ in range(2):
        optimizer.step(lambda: F.cross_entropy(head(table(torch.arange(6))), LABELS[:6]))
    assert bool((table.weight[:6] != before[:6]).any(1).all()) and torch.equal(table.weight[6:], before[6:])


@pytest.mark.parametrize("base", [Plain, GlobalNorm])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float16])
def test_the_dry_run_takes_any_dtype(base: Any, dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.ones(4, 5, dtype=dtype)), nn.Parameter(torch.ones((), dtype=dtype))]
    assert (together(base(params)) is None) == (base is Plain)


def test_the_dry_run_leaves_a_used_base_alone() -> None:
    """State and counters that the base has already are copied, narrowed, and left as they are."""
    model = mlp()
    base = Stateful(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    base.step()
    before = copy.deepcopy(base.state_dict())
    versions = [p._version for p in model.parameters()]
    optimizer = GuessGradOptimizer(model.parameters(), base, memory="stream")
    assert optimizer.estimation.refused("stream", None) is None
    assert together(base) is None
    assert versions == [p._version for p in model.parameters()]
    after = base.state_dict()
    for k, state in before["state"].items():
        assert all(torch.equal(v, after["state"][k][name]) for name, v in state.items())


# --- whole or not at all ----------------------------------------------------------------------------------------------


class Failing(TorchDispatchMode):
    """Raises at the k-th operation."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.seen = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        if self.seen == self.at:
            raise torch.OutOfMemoryError("out of memory")
        return func(*args, **(kwargs or {}))


def failing(base: type[Optimizer]) -> Any:
    """The base, whose step raises at an operation that a test chooses."""

    class Fails(base):  # type: ignore[misc, valid-type]
        at: int | None = None
        count = 0

        def step(self, closure: Any = None) -> None:
            if Fails.at is None:
                super().step()
                return
            with Failing(Fails.at) as mode:
                super().step()
            Fails.count = mode.seen

    return Fails


def snapshot(model: nn.Module, optimizer: GuessGradOptimizer) -> dict[str, Any]:
    return {
        "model": copy.deepcopy(model.state_dict()),
        "grad": [None if p.grad is None else (p.grad, p.grad.clone()) for p in model.parameters()],
        "state": copy.deepcopy(optimizer.state_dict()),
        "random": torch.get_rng_state(),
        "attributes": {k: v for k, v in vars(optimizer.base).items() if isinstance(v, int | float | str)},
    }


def assert_same(a: Any, b: Any, path: str = "") -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{k}")
    else:
        assert a == b, path


FAILING: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD with momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW foreach": (torch.optim.AdamW, {"lr": 0.1, "foreach": True}),
    "AdamW, a loop": (torch.optim.AdamW, {"lr": 0.1, "foreach": False}),
    "lookahead": (Lookahead, {"lr": 0.1}),
    "a group's counter": (GroupStep, {"lr": 0.1}),
    "an optimizer within": (Wrapper, {"lr": 0.1}),
}


@pytest.mark.parametrize("split", [False, True], ids=["step(closure)", "step()"])
@pytest.mark.parametrize("warm", [0, 5])
@pytest.mark.parametrize(("base", "options"), FAILING.values(), ids=FAILING)
def test_a_failed_update_changes_nothing(base: Any, options: dict[str, Any], warm: int, split: bool) -> None:
    """It fails at the first, second, middle or last operation. The next step equals that of a run without failure."""
    model, twin = mlp(norm=True), mlp(norm=True)
    fails = failing(base)
    optimizer = GuessGradOptimizer(model.parameters(), fails, seed=0, **options)
    reference = GuessGradOptimizer(twin.parameters(), base, seed=0, **options)
    for _ in range(warm):
        optimizer.step(loss_of(model))
        reference.step(loss_of(twin))
    optimizer.zero_grad()

    def act() -> None:
        if split:
            optimizer.step()
        else:
            optimizer.step(loss_of(model))

    if split:
        optimizer.estimate(loss_of(model))
    fails.at = 10**9
    probe = copy.deepcopy(model.state_dict())
    for at in (1, 2, 5, 9, 14, 20):
        fails.at = at
        before = snapshot(model, optimizer)
        try:
            act()
        except torch.OutOfMemoryError:
            after = snapshot(model, optimizer)
            assert_same(before, after, f"operation {at}")
        else:
            break  # there are no more operations
        assert_same(probe, model.state_dict())
    else:
        fails.at = None
        act()
    reference.step(loss_of(twin))
    assert_same(model.state_dict(), twin.state_dict())


def test_stream_puts_back_the_parameter_whose_update_failed() -> None:
    model, twin = mlp(norm=True), mlp(norm=True)
    fails = failing(torch.optim.AdamW)
    options: dict[str, Any] = {"lr": 0.1, "foreach": False, "memory": "stream", "seed": 0}
    optimizer = GuessGradOptimizer(model.parameters(), fails, **options)
    reference = GuessGradOptimizer(twin.parameters(), torch.optim.AdamW, **options)
    for _ in range(4):
        optimizer.step(loss_of(model))
        reference.step(loss_of(twin))
    fails.at = 4  # of the first parameter: nothing has been updated
    before = snapshot(model, optimizer)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step(loss_of(model))
    before["grad"] = [None] * len(before["grad"])
    assert_same(before, snapshot(model, optimizer))
    fails.at = None
    optimizer.step(loss_of(model))
    reference.step(loss_of(twin))
    assert_same(model.state_dict(), twin.state_dict())


class Picky(torch.optim.AdamW):
    """Fails in the middle of the update of parameters of one shape."""

    shape: Any = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            if any(p.shape == Picky.shape for p in group["params"]):
                raise torch.OutOfMemoryError("out of memory")


def test_a_base_that_failed_at_one_parameter_is_finished_as_if_nothing_had_been() -> None:
    model, twin = mlp(), mlp()
    options: dict[str, Any] = {"lr": 0.1, "memory": "stream", "seed": 0}
    optimizer = GuessGradOptimizer(model.parameters(), Picky, "activation_perturbation", **options)
    reference = GuessGradOptimizer(twin.parameters(), torch.optim.AdamW, "activation_perturbation", **options)
    for _ in range(2):
        optimizer.step(loss_of(model))
        reference.step(loss_of(twin))
    Picky.shape = model[2].bias.shape
    with pytest.raises(PartialUpdateError, match=r"of 4 parameters.*out of memory") as caught:
        optimizer.step(loss_of(model))
    Picky.shape = None
    assert torch.equal(model[2].bias, twin[2].bias) and caught.value.journal is not None
    optimizer.finish(caught.value.journal, loss_of(model))
    reference.step(loss_of(twin))
    for p, state in optimizer.state.items():
        assert int(state["step"]) == 3 and bool(p.isfinite().all())
    torch.testing.assert_close(model[0].weight, twin[0].weight)


class Late(GroupStep):
    """Fails before it updates the parameter with a given number."""

    at: int | None = None

    def held(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for k, found in enumerate(super().held()):
            if k == Late.at:
                raise torch.OutOfMemoryError("out of memory")
            yield found


@pytest.mark.parametrize(("at", "written"), [(0, None), (1, r"0\.weight"), (5, r"0\.weight, 0\.bias, .* and 2 more")])
def test_a_late_failure_is_put_back_where_nothing_was_written_and_named_otherwise(at: int, written: str | None) -> None:
    model = mlp(norm=True)
    optimizer = GuessGradOptimizer(model.named_parameters(), Late, lr=0.1, seed=0)
    for _ in range(10):
        optimizer.step(loss_of(model))
    before, Late.at = snapshot(model, optimizer), at
    try:
        if written is None:
            with pytest.raises(torch.OutOfMemoryError):
                optimizer.step(loss_of(model))
            assert_same(before, snapshot(model, optimizer))
            return
        with pytest.raises(PartialUpdateError, match=rf"Late failed.*{written}.*checkpoint") as caught:
            optimizer.step(loss_of(model))
    finally:
        Late.at = None
    assert caught.value.journal is None
    after = snapshot(model, optimizer)
    assert_same(before["grad"], after["grad"])
    assert_same(before["random"], after["random"])
    assert_same(before["state"]["guessopt"], after["state"]["guessopt"])
    assert torch.equal(before["model"]["1.running_mean"], after["model"]["1.running_mean"])


class ByData(Plain):
    """Writes through ``.data``, which does not change the version."""

    fails = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, p in self.held():
            assert p.grad is not None
            self.state[p]["seen"] = 1
            p.data.sub_(group["lr"] * p.grad)
            if ByData.fails:
                raise torch.OutOfMemoryError("out of memory")


def test_writes_that_versions_do_not_tell_are_not_overlooked() -> None:
    model = mlp()
    optimizer = GuessGradOptimizer(model.named_parameters(), ByData, lr=0.1, seed=0)
    for _ in range(10):
        optimizer.step(loss_of(model))
    ByData.fails = True
    try:
        with pytest.raises(PartialUpdateError, match=r"0\.weight"):
            optimizer.step(loss_of(model))
    finally:
        ByData.fails = False


@pytest.mark.parametrize("memory", MODES)
def test_what_hooks_after_the_step_raise_leaves_the_step_made(memory: str) -> None:
    model, twin = mlp(norm=True), mlp(norm=True)
    optimizer = GuessGradOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, seed=0, memory=memory)
    reference = GuessGradOptimizer(twin.parameters(), torch.optim.SGD, lr=0.1, seed=0, memory=memory)

    def fail(*_: Any) -> None:
        raise KeyError("after")

    handle = optimizer.base.register_step_post_hook(fail)
    with pytest.raises(KeyError, match="after"):
        optimizer.step(loss_of(model))
    handle.remove()
    reference.step(loss_of(twin))
    for _ in range(2):
        assert_same(model.state_dict(), twin.state_dict())
        optimizer.step(loss_of(model))
        reference.step(loss_of(twin))


@pytest.mark.parametrize("memory", MODES)
def test_what_hooks_before_the_update_raise_changes_nothing(memory: str) -> None:
    model = mlp(norm=True)
    optimizer = GuessGradOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, seed=0, memory=memory)
    optimizer.step(loss_of(model))
    optimizer.zero_grad()

    def fail(*_: Any) -> None:
        raise KeyError("before")

    handle = optimizer.base.register_step_pre_hook(fail)
    before = snapshot(model, optimizer)
    with pytest.raises(KeyError, match="before"):
        optimizer.step(loss_of(model))
    handle.remove()
    assert_same(before, snapshot(model, optimizer))


class ListState(torch.optim.SGD):
    """A base whose state of a parameter is a list, not a dict."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    last = self.state[p][0] if p in self.state else torch.zeros_like(p)
                    self.state[p] = [p.grad + 0.5 * last]
                    p.sub_(group["lr"] * self.state[p][0])


def test_a_base_may_keep_lists_as_its_state() -> None:
    """From the ninth update on nothing is copied; what has to be watched then depends on the kind of the state."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
    optimizer = GuessGradOptimizer(model.parameters(), ListState, "activation_perturbation", lr=0.01)
    losses = [optimizer.step(lambda: model(x).square().mean()).item() for _ in range(12)]
    assert losses[-1] < losses[0]
