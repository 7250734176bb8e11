"""A failed step changes nothing, and the next step is as if the failure had not happened.

``tests.fuzzing.faults`` defines the network, the faults and the comparison. ``python -m benchmarks reliability`` tries
thousands of faults.
"""

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guessopt import ClosureError, GuessGradOptimizer
from guessopt.engine.jvp.stacked import StackedEngine
from guessopt.step.mode import MODES
from tests.fuzzing.faults import (
    FAULTS,
    PLACES,
    DispatchFault,
    FunctionFault,
    Injected,
    World,
    differences,
    every,
    fault_at,
    interrupt_after,
    ready,
    reference,
    seeded,
    tidy,
    torch_states,
    walk,
)

pytestmark = pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")


@pytest.fixture(autouse=True)
def _tidy() -> Iterator[None]:
    """State that one test loses must not make later tests fail."""
    yield
    tidy()


def few_or_many(few: Any, many: Any) -> list[Any]:
    """Values for a test: a few faults and, with ``-m slow``, many."""
    values = [value if isinstance(value, tuple) else (value,) for value in (few, many)]
    return [pytest.param(*values[0], id="few"), pytest.param(*values[1], id="many", marks=pytest.mark.slow)]


#: Steps, and faults in each.
EXTENT = few_or_many((3, 3), (6, 8))


# --- an error at every k-th call -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "most"), EXTENT)
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("where", ["closure", "engine"])
@pytest.mark.parametrize("memory", MODES)
def test_an_error_at_any_call_of_a_step(memory: str, where: str, kind: str, steps: int, most: int) -> None:
    make = partial(World, memory)
    calm = reference(make, steps, kind, where)
    found = walk(make, calm, every(kind, where, calm.calls, most))
    assert found.tried >= steps * most and found.lost == {}


@pytest.mark.parametrize(("steps", "most"), EXTENT)
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("memory", MODES)
def test_an_error_at_any_call_of_the_update(memory: str, base: Any, kind: str, steps: int, most: int) -> None:
    make, steps, most = partial(World, memory, base=base), steps - 1, most - 1  # dear: most attempts update something
    calm = reference(make, steps, kind, "update")
    found = walk(make, calm, every(kind, "update", calm.calls, most))
    assert found.tried >= (20 if most > 2 else 2 * steps) and found.lost == {}


@pytest.mark.parametrize("memory", MODES)
def test_an_error_before_the_update_has_done_anything(memory: str) -> None:
    make = partial(World, memory)

    def refuse(world: World) -> AbstractContextManager[Any]:
        def step(*args: Any) -> None:
            raise Injected("injected")

        return _patched(world.opt.base, "step", step)

    found = walk(make, reference(make, 4), lambda step: [("update refused", refuse)])
    assert found.tried == 4 and found.lost == {}


class _patched:
    """Sets an attribute of an object or a class, and restores it."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.value = owner, name, value
        self.before = vars(owner).get(name)

    def __enter__(self) -> None:
        setattr(self.owner, self.name, self.value)

    def __exit__(self, *error: Any) -> None:
        delattr(self.owner, self.name)
        if self.before is not None:
            setattr(self.owner, self.name, self.before)


ESTIMATORS = {
    "directional descent": ("directional_descent", {}),
    "learned feedback": ("learned_feedback", {}),
    "three stacked guesses": ("w_perp", {"guesses": 3}),
    "three guesses in turn": ("w_perp", {"guesses": 3, "stack_guesses": False}),
    "parameters of every kind": ({"0.*": "downstream", "*": "auto"}, {}),
    "engine dual": ("w_transpose", {"engine": "dual"}),
}


@pytest.mark.parametrize(("steps", "most", "least"), few_or_many((3, 4, 12), (4, 6, 20)))
@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_error_at_any_call_with_other_estimators(name: str, steps: int, most: int, least: int) -> None:
    estimator, options = ESTIMATORS[name]
    make = partial(World, "store", estimator, **options)
    calm = reference(make, steps, "operation", "engine")
    found = walk(make, calm, every("operation", "engine", calm.calls, most))
    assert found.tried >= least and found.lost == {}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guesses": 3},
        {"memory": "replay"},
        {"memory": "stream"},
    ],
    ids=str,
)
@pytest.mark.parametrize("most", few_or_many(3, 6))
def test_out_of_memory_at_any_call(options: dict[str, Any], most: int) -> None:
    """Either the step fails and changes nothing, or it goes on with less memory and gives an equal result."""
    make = partial(World, **options)
    calm = reference(make, 4, "operation", "engine")
    error = torch.OutOfMemoryError("injected: out of memory")
    pick = random.Random(0)
    found = walk(
        make,
        calm,
        lambda step: [
            (f"call {at}", fault_at("operation", "engine", at, error))
            for at in sorted(pick.sample(range(1, calm.calls[step] + 1), most))
        ],
        torch.OutOfMemoryError,
    )
    assert found.tried == 4 * most and found.lost == {}


# --- errors that a second way must not hide -------------------------------------------------------------------------


class Own(Exception):
    """An error of the closure's."""


OWN: dict[str, Exception] = {
    "an error": Own("own"),
    "out of memory": torch.OutOfMemoryError("own"),
    "MemoryError": MemoryError("own"),
    "NotImplementedError": NotImplementedError("own: forward AD"),
    "StopIteration": StopIteration("own"),
}


@pytest.mark.parametrize(
    "options", [{}, {"guesses": 3}, {"memory": "replay", "guesses": 3}, {"memory": "stream"}], ids=str
)
@pytest.mark.parametrize("name", OWN)
def test_the_closures_own_error_is_raised_in_whichever_run_it_comes(name: str, options: dict[str, Any]) -> None:
    """The error comes once. The step must not retry in another way and hide it."""
    calm, made = World(**options), count(1)  # an iterator, which the step does not put back
    calm.hooks.append(lambda: next(made) and None)
    calm.step(0)
    total = next(made) - 1
    assert total > 4
    for at in range(1, total + 1):
        world, runs = World(**options), count(1)
        before = world.state()

        def fail(at: int = at, runs: Iterator[int] = runs) -> None:
            if next(runs) == at:
                raise OWN[name]

        world.hooks.append(fail)
        with pytest.raises(type(OWN[name]), match="own"):
            world.step(0)
        assert [k for k in differences(before, world.state()) if not k.startswith("random")] == [], (
            f"run {at} of {total}"
        )


def _short_of_memory(*args: Any) -> Any:
    raise torch.OutOfMemoryError("injected")


def test_one_error_does_not_keep_guesses_from_sharing_a_pass() -> None:
    world = World(guesses=3)
    with _patched(StackedEngine, "cut", _short_of_memory):
        world.step(0)
    assert world.opt.estimation.plans[0].stacks is False
    world.step(1)
    assert world.opt.estimation.plans[0].stacks
    calm = reference(partial(World, guesses=3), 2).states[1]
    assert differences(calm, world.state(), near=1e-6) == []


def test_errors_time_and_again_keep_guesses_from_sharing_a_pass() -> None:
    world = World(guesses=3)
    with _patched(StackedEngine, "cut", _short_of_memory):
        world.step(0)
        world.step(1)
    world.step(2)
    assert world.opt.estimation.plans[0].stacks is False
    assert differences(reference(partial(World, guesses=3), 3).states[2], world.state(), near=1e-6) == []


# --- an interrupt at any time ----------------------------------------------------------------------------------------


PARTS = [random.Random(k).random() for k in range(12)]


def duration(make: Callable[[], World], step: int) -> float:
    world = ready(make, step)
    start = time.perf_counter()
    world.step(step)
    return time.perf_counter() - start


@pytest.mark.parametrize("most", few_or_many(5, len(PARTS)))
@pytest.mark.parametrize("memory", MODES)
def test_an_interrupt_at_any_time(memory: str, most: int) -> None:
    make = partial(World, memory)
    calm = reference(make, 3)
    lasts = [duration(make, step) for step in range(3)]
    found = walk(
        make,
        calm,
        lambda step: [(f"at {part:.3f} of the step", interrupt_after(part * lasts[step])) for part in PARTS[:most]],
        KeyboardInterrupt,
    )

    assert found.tried == 3 * most and found.lost == {}


@pytest.mark.parametrize("memory", MODES)
def test_an_interrupt_at_any_call_of_the_closure(memory: str) -> None:
    make = partial(World, memory)
    calm = reference(make, 3, "function", "closure")
    found = walk(
        make,
        calm,
        lambda step: [
            (f"call {at}", fault_at("function", "closure", at, KeyboardInterrupt()))
            for at in range(1, calm.calls[step] + 1, 5)
        ],
        KeyboardInterrupt,
    )
    assert found.tried >= 9 and found.lost == {}


# --- numbers that are not finite -------------------------------------------------------------------------------------

NOT_FINITE: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda h: h * float("nan"),
    "inf": lambda h: h + float("inf"),
    "one nan": lambda h: h.masked_fill(torch.arange(h.numel()).view(h.shape) == 3, float("nan")),
    "derivative": lambda h: h + (h * 0).abs().sqrt(),
}


@pytest.mark.parametrize("steps", few_or_many(2, 3))
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("memory", MODES)
def test_a_value_that_is_not_finite_at_any_layer(memory: str, value: str, steps: int) -> None:
    """The step refuses the batch by name. Training on the next batch is as if there had been no refused one."""
    make = partial(World, memory)

    def broken(place: int) -> Callable[[World], AbstractContextManager[Any]]:
        return lambda world: _item(world.at, place, NOT_FINITE[value])

    places = [place for place in range(7) if not (value == "inf" and place == 1)]  # tanh of inf is 1: no fault
    found = walk(
        make, reference(make, steps), lambda step: [(f"layer {place}", broken(place)) for place in places], ClosureError
    )
    assert found.tried == steps * len(places) and found.lost == {}


class _item:
    """Sets an entry of a dict, and deletes it."""

    def __init__(self, owner: dict[Any, Any], key: Any, value: Any) -> None:
        self.owner, self.key, self.value = owner, key, value

    def __enter__(self) -> None:
        self.owner[self.key] = self.value

    def __exit__(self, *error: Any) -> None:
        del self.owner[self.key]


def test_learned_feedback_survives_a_batch_that_is_not_checked() -> None:
    world = World("store", "learned_feedback", check_finite=False)
    for number in range(3):
        world.step(number)
    good = {name: value.clone() for name, value in world.model.state_dict().items()}
    with _item(world.at, 0, NOT_FINITE["nan"]):
        world.step(3)
    world.model.load_state_dict(good)
    world.opt.base.state.clear()
    for number in range(4, 7):
        assert bool(torch.isfinite(world.step(number)))
    assert all(bool(torch.isfinite(p).all()) for p in world.model.parameters())


# --- what else may be going on ---------------------------------------------------------------------------------------


def saved() -> AbstractContextManager[Any]:
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "function mode": FunctionFault,
    "dispatch mode": DispatchFault,
    "two modes": lambda: _both(FunctionFault(), DispatchFault()),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "no_grad": torch.no_grad,
    "deterministic": lambda: _deterministic(),
    "saved tensors hooks": saved,
    "device context": lambda: torch.device("cpu"),
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
    "profiler": lambda: torch.autograd.profiler.profile(),
}


class _both:
    def __init__(self, *contexts: Any) -> None:
        self.contexts = contexts

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)


class _deterministic:
    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *error: Any) -> None:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("steps", few_or_many(2, 3))
@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_step_inside_another_context_gives_the_same(name: str, memory: str, steps: int) -> None:
    world, other, before = World(memory), World(memory), torch_states()
    for number in range(steps):
        world.step(number)
    for number in range(steps):
        with SURROUNDINGS[name]():
            other.step(number)
        assert torch_states() == before
    assert differences(world.state(), other.state()) == []


def inference(world: World) -> None:
    with torch.inference_mode():
        world.step(1)


def under_vmap(world: World) -> None:
    torch.func.vmap(lambda x: world.opt.step(lambda: world.closure() + x.sum()))(torch.ones(2, 3))


def under_vmap_of_data(world: World) -> None:
    def one(x: Tensor) -> Tensor:
        return world.opt.step(lambda: F.cross_entropy(world.model[6](world.model[4](x)), world.y[:2]))

    torch.func.vmap(one)(torch.ones(3, 2, 6, dtype=torch.float64))


def under_grad(world: World) -> None:
    torch.func.grad(lambda x: world.opt.step(lambda: world.closure() * x))(torch.ones(()))


def under_jvp(world: World) -> None:
    torch.func.jvp(lambda x: world.opt.step(lambda: world.closure() * x), (torch.ones(()),), (torch.ones(()),))


def in_a_dual_level(world: World) -> None:
    with torch.autograd.forward_ad.dual_level():
        world.step(1)


def reentered(world: World) -> None:
    def again() -> None:
        world.hooks.clear()
        world.opt.step(world.closure)

    world.hooks.append(again)
    world.step(1)


def reentered_by_estimate(world: World) -> None:
    def again() -> None:
        world.hooks.clear()
        world.opt.estimate(world.closure)

    world.hooks.append(again)
    world.step(1)


def loaded_inside(world: World) -> None:
    state = world.opt.state_dict()
    world.hooks.append(lambda: world.opt.load_state_dict(state))
    world.step(1)


def grown_inside(world: World) -> None:
    group = {"params": [nn.Parameter(torch.zeros(2, dtype=torch.float64))]}
    world.hooks.append(lambda: world.opt.add_param_group(group))
    world.step(1)


def estimated_under_vmap(world: World) -> None:
    torch.func.vmap(lambda x: world.opt.estimate(lambda: world.closure() + x.sum()))(torch.ones(2, 3))


def applied_in_a_dual_level(world: World) -> None:
    with torch.autograd.forward_ad.dual_level():
        world.opt.step()


REFUSED = {
    "inference mode": inference,
    "vmap": under_vmap,
    "vmap over the data": under_vmap_of_data,
    "torch.func.grad": under_grad,
    "torch.func.jvp": under_jvp,
    "dual level": in_a_dual_level,
    "step in the closure": reentered,
    "estimate in the closure": reentered_by_estimate,
    "load_state_dict in the closure": loaded_inside,
    "add_param_group in the closure": grown_inside,
    "estimate under vmap": estimated_under_vmap,
    "step without a closure in a dual level": applied_in_a_dual_level,
}
NAMED = {"inference mode": "inference", "vmap": "vmap", "vmap over the data": "vmap", "step in the closure": "closure",
         "torch.func.grad": "grad", "torch.func.jvp": "jvp", "dual level": "dual", "estimate in the closure": "closure",
         "load_state_dict in the closure": "closure", "add_param_group in the closure": "closure",
         "estimate under vmap": "vmap", "step without a closure in a dual level": "dual"}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_by_name_and_leaves_no_trace(name: str) -> None:
    world, before = ready(World, 1), torch_states()
    state = world.state()
    with pytest.raises(ClosureError, match=NAMED[name]):
        REFUSED[name](world)
    world.hooks.clear()
    assert torch_states() == before
    assert [k for k in differences(state, world.state()) if not k.startswith("random")] == []
    world.step(1)
    assert differences(reference(World, 2).states[1], world.state()) == []


def test_a_forked_process_goes_on_alike() -> None:
    """The child process and the parent make the next step. Their parameters are equal."""
    world = ready(World, 2)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            world.step(2)
            os.write(write, repr([p.tolist() for p in world.model.parameters()]).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    world.step(2)
    assert said == repr([p.tolist() for p in world.model.parameters()])


def test_an_optimizer_within_the_closure_of_another_is_refused() -> None:
    """The closure of one optimizer trains another network."""
    inner = nn.Linear(3, 1).double()
    own = GuessGradOptimizer(inner.named_parameters(), torch.optim.SGD, "w_perp", lr=0.1, seed=0)
    x = torch.ones(2, 3, dtype=torch.float64)
    world, calm = ready(World, 1), reference(World, 2).states[1]
    world.hooks.append(lambda: own.step(lambda: inner(x).square().mean()))
    with pytest.raises(ClosureError, match="closure"):
        world.step(1)
    world.hooks.clear()
    world.step(1)
    assert differences(calm, world.state()) == []


def test_two_optimizers_in_two_threads() -> None:
    """Both networks train."""

    def train(found: list[Any]) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        x, y = torch.ones(8, 4), torch.arange(8) % 3
        opt = GuessGradOptimizer(model.parameters(), torch.optim.SGD, "activation_perturbation", lr=0.1, seed=0)
        try:
            for _ in range(40):
                opt.step(lambda: F.cross_entropy(model(x), y))
            found.append([p.detach().clone() for p in model.parameters()])
        except Exception as error:
            found.append(error)

    together: list[Any] = []
    threads = [threading.Thread(target=train, args=(together,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch_states()["function modes"] == 0
    assert len(together) == 2
    for found in together:
        assert not isinstance(found, Exception), found
        assert all(bool(torch.isfinite(p).all()) for p in found)


# --- the tests themselves --------------------------------------------------------------------------------------------


def test_a_lost_state_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the transaction's rollback, faults change buffers and random states."""
    from guessopt.engine.transaction import Transaction

    make = partial(World, "store")
    calm = reference(make, 2, "function", "closure")
    rewind = Transaction.rewind
    monkeypatch.setattr(
        Transaction, "rewind", lambda self: None if isinstance(sys.exc_info()[1], Injected) else rewind(self)
    )
    found = walk(make, calm, every("function", "closure", calm.calls, 4))
    assert any("buffer" in name for lost in found.lost.values() for name in lost)
    assert any("random" in name for lost in found.lost.values() for name in lost)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("where", PLACES)
def test_a_world_repeats(memory: str, where: str) -> None:
    seeded(3)
    one, other = (reference(partial(World, memory), 3, "function", where) for _ in range(2))
    assert one.calls == other.calls and all(n > 0 for n in one.calls)
    assert [differences(a, b) for a, b in zip(one.states, other.states, strict=True)] == [[]] * 3
