"""Make one step fail at a chosen place; check that the failure changes nothing and that the next step is right.

A ``World`` is a small network whose closure has all kinds of state: buffers, dropout, numpy's and Python's random
states. ``walk`` lets every step fail in several ways before it makes the step, and lists the state that was lost.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from guessopt import GuessGradOptimizer, PartialUpdateError
from tests.problems import seeded

APPLY = torch.autograd.Function.__dict__["apply"]


class Injected(RuntimeError):
    """The error that a fault raises."""


class World:
    """A network, its optimizer and everything that a step may change."""

    def __init__(self, memory: str = "store", estimator: Any = "w_perp", base: Any = torch.optim.AdamW, **options: Any):
        seeded(0)
        self.model = nn.Sequential(
            nn.Linear(4, 6, bias=False),
            nn.BatchNorm1d(6),
            nn.Tanh(),
            nn.Dropout(0.2),
            nn.Linear(6, 5),
            nn.ReLU(),
            nn.Linear(5, 3),
        ).double()
        self.x, self.y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
        self.seen = torch.zeros(())
        self.at: dict[int, Callable[[Tensor], Tensor]] = {}
        """By layer, what is done to its output."""
        options = {"lr": 0.01, "seed": 0, **options}
        self.opt = GuessGradOptimizer(self.model.named_parameters(), base, estimator, memory=memory, **options)
        self.hooks: list[Callable[[], None]] = []

    def closure(self) -> Tensor:
        for hook in self.hooks:
            hook()
        h = self.x * (1 + 0.1 * np.random.rand()) + 0.1 * random.random()
        self.seen.add_(1)
        for place, layer in enumerate(self.model):
            h = layer(h)
            if place in self.at:
                h = self.at[place](h)
        return F.cross_entropy(h, self.y)

    def step(self, number: int) -> Tensor:
        seeded(number)
        loss: Tensor = self.opt.step(self.closure)
        return loss

    def state(self) -> dict[str, Any]:
        """Everything that a failed step must leave unchanged."""
        found: dict[str, Any] = {f"parameter or buffer {k}": v for k, v in self.model.state_dict().items()}
        found |= {f"gradient {k}": p.grad for k, p in self.model.named_parameters()}
        found |= {f"requires_grad {k}": p.requires_grad for k, p in self.model.named_parameters()}
        found |= {f"training {k}": m.training for k, m in self.model.named_modules()}
        found |= {f"optimizer {k}": v for k, v in flat(self.opt.state_dict())}
        found |= {"tensor written by the closure": self.seen, "data": self.x}
        found |= {f"random {k}": v for k, v in random_states().items()}
        found |= {f"torch {k}": v for k, v in torch_states().items()}
        return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in found.items()}


def random_states() -> dict[str, Any]:
    state: Any = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "numpy": (state["state"]["key"].tolist(), state["state"]["pos"], state["has_gauss"], state["gauss"]),
        "python": random.getstate(),
    }


def torch_states() -> dict[str, Any]:
    """The settings that torch keeps for the whole process."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "forward AD level": torch.autograd.forward_ad._current_level,
        "functorch level": torch._C._functorch.maybe_current_level(),
        "Function.apply": torch.autograd.Function.__dict__["apply"] is APPLY,
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "attention backends": torch.backends.cuda.flash_sdp_enabled(),
    }


def tidy() -> None:
    """Reset the settings of ``torch_states``, so that one lost setting does not make all later tests fail."""
    level = torch.autograd.forward_ad
    with suppress(RuntimeError):  # none was left
        torch._C._exit_dual_level(level=0)
    level._current_level = -1
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    while torch._C._len_torch_dispatch_stack():
        torch._C._pop_torch_dispatch_stack(None)
    torch.set_grad_enabled(True)
    torch._C._set_mkldnn_enabled(True)
    if torch.autograd.Function.__dict__["apply"] is not APPLY:
        torch.autograd.Function.apply = APPLY  # type: ignore[method-assign]


def flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from flat(value, f"{path}/{key}")
    elif isinstance(node, list | tuple):
        for key, value in enumerate(node):
            yield from flat(value, f"{path}/{key}")
    else:
        yield path, node


def same(a: Any, b: Any, near: float = 0.0) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if near and a.is_floating_point():
            return torch.allclose(a, b, rtol=near, atol=near, equal_nan=True)
        return bool(((a == b) | ((a != a) & (b != b))).all())
    return type(a) is type(b) and bool(a == b)


def differences(before: dict[str, Any], after: dict[str, Any], near: float = 0.0) -> list[str]:
    """The keys whose values differ: bit for bit, or by more than ``near``."""
    keys = dict.fromkeys([*before, *after])
    return [k for k in keys if k not in before or k not in after or not same(before[k], after[k], near)]


# --- faults -----------------------------------------------------------------------------------------------------------


class _Counter:
    """Counts calls, unless it is paused, and raises at one of them."""

    def __init__(self, at: int = -1, error: BaseException | None = None) -> None:
        super().__init__()
        self.at, self.error, self.calls, self.paused = at, error or Injected("injected"), 0, False

    def count(self, func: Any) -> None:
        name = str(getattr(func, "__name__", func))
        if self.paused or name == "_set_grad_enabled" or "record_function" in name:  # ways out, which cannot fail
            return
        self.calls += 1
        if self.calls == self.at:
            raise self.error


class FunctionFault(_Counter, TorchFunctionMode):
    """Raises at the k-th torch call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count(func)
        return func(*args, **(kwargs or {}))


class DispatchFault(_Counter, TorchDispatchMode):
    """Raises at the k-th operation below autograd."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count(func)
        return func(*args, **(kwargs or {}))


FAULTS: dict[str, Any] = {"function": FunctionFault, "operation": DispatchFault}
"""By name: a mode that raises at the k-th call."""


Make = Callable[[], World]
Fault = Callable[[World], AbstractContextManager[Any]]
Errors = type[BaseException] | tuple[type[BaseException], ...]


class Attempt(NamedTuple):
    """``lost``: names of the state that changed. ``moved``: whether the world has left the state before the step."""

    lost: list[str]
    moved: bool


class Walk(NamedTuple):
    """``tried``: the number of faults. ``lost``: the state that was lost, by fault."""

    tried: int
    lost: dict[str, list[str]]


PLACES = ("closure", "engine", "update")
"""In the closure; anywhere in the step but in the base's update; in that."""


@contextmanager
def only_in(world: World, where: str, mode: Any) -> Iterator[None]:
    """The mode counts calls in one of ``PLACES`` only."""
    closure, update = world.closure, type(world.opt.base).step

    def inside() -> Tensor:
        with mode:
            return closure()

    def step(*args: Any, **kwargs: Any) -> Any:
        with mode if where == "update" else nullcontext():
            mode.paused = where != "update"
            try:
                return update(world.opt.base, *args, **kwargs)
            finally:
                mode.paused = False

    if where == "closure":
        world.closure = inside  # type: ignore[method-assign]
    world.opt.base.step = step  # type: ignore[method-assign]
    try:
        with mode if where == "engine" else nullcontext():
            yield
    finally:
        world.__dict__.pop("closure", None)
        del world.opt.base.step


class Reference(NamedTuple):
    """A run in which nothing fails: the state after each step, and the calls that each step made."""

    states: list[dict[str, Any]]
    calls: list[int]


def reference(make: Make, steps: int, kind: str = "function", where: str = "engine") -> Reference:
    world, counted, found = make(), make(), Reference([], [])
    for number in range(steps):
        world.step(number)
        found.states.append(world.state())
        counter = FAULTS[kind]()
        with only_in(counted, where, counter):  # a run of its own: torch takes other kernels under a mode
            counted.step(number)
        found.calls.append(counter.calls)
    return found


def ready(make: Make, step: int) -> World:
    """A world before that step (counted from 0)."""
    world = make()
    for number in range(step):
        world.step(number)
    return world


def attempt(world: World, step: int, fault: Fault, after: dict[str, Any], error: Errors = Injected) -> Attempt:
    """Let ``step`` fail within ``fault(world)``. A step that survives (guesses that do not fit in memory together go in
    turn) must end in the state ``after``, but for rounding."""
    seeded(step)
    before = world.state()
    raised: BaseException | None = None
    try:
        with fault(world):
            world.step(step)
    except BaseException as error_:
        raised = error_
    left = {f"torch {k}": v for k, v in torch_states().items()}
    tidy()  # under a mode that is left behind, the state could not even be read
    modes = differences({k: v for k, v in before.items() if k in left}, left)
    if isinstance(raised, PartialUpdateError):
        return Attempt(modes + _finished(world, before, after, raised), moved=True)
    now = world.state()
    if raised is None:
        return Attempt(
            [f"survived, and differs: {k}" for k in [*modes, *differences(after, now, near=1e-6)]], moved=True
        )
    if isinstance(raised, KeyboardInterrupt) and not differences(after, now):
        return Attempt(modes, moved=True)  # it came when all was done
    lost = modes + differences(before, now)
    if not _stems_from(raised, error):
        lost.append(f"raised {type(raised).__name__}: {raised}")
    return Attempt(lost, moved=bool(lost))


def _stems_from(raised: BaseException | None, error: Errors) -> bool:
    while raised is not None:
        if isinstance(raised, error):
            return True
        raised = raised.__cause__ or raised.__context__
    return False


def every(kind: str, where: str, calls: Sequence[int], most: int) -> Callable[[int], Iterable[tuple[str, Fault]]]:
    """Faults for ``walk``: at about ``most`` calls of a step, evenly spaced, and at the last call."""

    def faults(step: int) -> Iterable[tuple[str, Fault]]:
        n = calls[step]
        for at in sorted({*range(1 + step % 3, n + 1, max(1, n // most)), *((n,) if n else ())}):
            yield f"{kind} {at} of {n} in the {where}", fault_at(kind, where, at)

    return faults


def walk(
    make: Make, reference: Reference, faults: Callable[[int], Iterable[tuple[str, Fault]]], error: Errors = Injected
) -> Walk:
    """Let each step fail in several ways, then make it. The result must equal that of a run without failures."""
    world, found = make(), Walk(0, {})
    tried = 0
    for step, after in enumerate(reference.states):
        for name, fault in faults(step):
            tried += 1
            result = attempt(world, step, fault, after, error)
            if result.lost:
                found.lost[f"step {step + 1}, {name}"] = result.lost
            if result.moved:
                world = ready(make, step)
        try:
            world.step(step)
            lost = differences(after, world.state())
        except Exception as raised:
            lost = [f"raised {type(raised).__name__}: {raised}"]
        if lost:
            found.lost[f"step {step + 1}, made after it had failed"] = lost
            world = ready(make, step + 1)
    return found._replace(tried=tried)


def _finished(world: World, before: dict[str, Any], after: dict[str, Any], partial: PartialUpdateError) -> list[str]:
    """After a partial update: all other state is as before, and ``finish`` updates the remaining parameters."""
    allowed = ("parameter or buffer", "optimizer", "gradient")
    buffers = {f"parameter or buffer {name}" for name, _ in world.model.named_buffers()}
    lost = [k for k in differences(before, world.state()) if not k.startswith(allowed) or k in buffers]
    try:
        world.opt.finish(partial.journal, world.closure)
    except Exception as error:
        return [*lost, f"finish() raised {type(error).__name__}: {error}"]
    params = [f"parameter or buffer {name}" for name, _ in world.model.named_parameters()]
    now, moves = world.state(), [name for name in params if not same(before[name], after[name])]
    return lost + [f"{name} was not updated by finish()" for name in moves if same(before[name], now[name])]


@contextmanager
def interrupted(delay: float) -> Iterator[None]:
    """Ctrl-C after ``delay`` seconds, anywhere in the block. No interrupt comes after the block."""

    def interrupt(number: int, frame: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    old = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def interrupt_after(delay: float) -> Fault:
    return lambda world: interrupted(delay)


def fault_at(kind: str, where: str, at: int, error: BaseException | None = None) -> Fault:
    return lambda world: only_in(world, where, FAULTS[kind](at, error))
