"""Steps of several threads take turns; no step begins inside another's closure; Ctrl-C changes nothing."""

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from guessopt import ClosureError, GuessGradOptimizer, plan, preflight
from guessopt.diagnostics import estimated_gradient

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 3
APPLY = torch.autograd.Function.__dict__["apply"]
Closure = Callable[[], Tensor]


@pytest.fixture(autouse=True)
def _interrupts_are_heard() -> Iterator[None]:
    """A shell starts its background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def built(**options: Any) -> tuple[nn.Sequential, GuessGradOptimizer, Closure]:
    model = mlp()
    optimizer = GuessGradOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, seed=0, **options)
    return model, optimizer, lambda: F.cross_entropy(model(X), LABELS)


def train(steps: int, model: nn.Sequential, optimizer: GuessGradOptimizer, closure: Closure) -> list[Tensor]:
    for _ in range(steps):
        optimizer.step(closure)
    return [p.detach() for p in model.parameters()]


def trained(steps: int, **options: Any) -> list[Tensor]:
    return train(steps, *built(**options))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Modes, patches, levels, the signal handler and the lock are as before."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) == handler
    assert torch.is_grad_enabled() and torch._C._is_fwd_grad_enabled()
    assert torch._C._len_torch_function_stack() == 0 and torch._C._len_torch_dispatch_stack() == 0
    assert torch.autograd.Function.__dict__["apply"] is APPLY
    assert forward_ad._current_level == -1 and torch._C._functorch.get_dynamic_layer_stack_depth() == 0
    assert not torch.is_autocast_enabled("cpu")
    with forward_ad.dual_level():
        pass
    done: list[list[Tensor]] = []
    worker = threading.Thread(target=lambda: done.append(trained(1)), daemon=True)
    worker.start()
    worker.join(20)
    assert done


@pytest.mark.parametrize("engine", ["fast", "dual", "func"])
def test_three_threads_train_as_one_would(engine: str) -> None:
    expected, found, errors = trained(25, engine=engine), [], []
    made = [built(engine=engine) for _ in range(3)]  # here, as it seeds the random numbers that all threads share

    def work(k: int) -> None:
        try:
            found.append(train(25, *made[k]))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(found) == 3
    for parameters in found:
        for p, q in zip(parameters, expected, strict=True):
            assert torch.equal(p, q)


CALLS: dict[str, Callable[[GuessGradOptimizer, Closure], Any]] = {
    "step(closure)": lambda opt, closure: opt.step(closure),
    "step()": lambda opt, closure: opt.step(),
    "estimate": lambda opt, closure: opt.estimate(closure),
    "preflight": preflight,
    "plan": plan,
    "a measurement": estimated_gradient,
}


@pytest.mark.parametrize("same", [True, False], ids=["itself", "another"])
@pytest.mark.parametrize("method", ["step", "estimate"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_closure_that_begins_a_step_is_refused(
    call: Callable[[GuessGradOptimizer, Closure], Any], method: str, same: bool
) -> None:
    model, optimizer, closure = built()
    _, other, others = built()
    other.estimate(others)

    def nested() -> Tensor:
        call(optimizer if same else other, closure if same else others)
        return closure()

    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ClosureError, match=r"the closure calls .* before or after the step"):
        getattr(optimizer, method)(nested)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    optimizer.step(closure)


def state_of(model: nn.Module, optimizer: GuessGradOptimizer) -> list[Any]:
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return [optimizer.estimation.steps, *(t.clone() for t in (*tensors, torch.get_rng_state()))]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("memory", ["store", "replay", "stream"])
@pytest.mark.parametrize("engine", ["fast", "dual", "func"])
def test_ctrl_c_at_any_time_is_before_a_step_or_after_it(engine: str, memory: str) -> None:
    """After an interrupt at a random time the state is that of the completed steps."""
    model, optimizer, closure = built(engine=engine, memory=memory)
    twin, reference, again = built(engine=engine, memory=memory)
    begin = 0.0
    for k in range(12):
        if k == 6:
            begin = time.perf_counter()
        optimizer.step(closure)
        reference.step(again)
    mean = (time.perf_counter() - begin) / 12
    pause, interrupted = torch.Generator().manual_seed(0), 0
    previous = signal.signal(signal.SIGALRM, lambda *_: _thread.interrupt_main())
    for _ in range(40):
        steps = optimizer.estimation.steps
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, max(1e-5, float(torch.rand((), generator=pause)) * mean))
                optimizer.step(closure)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                time.sleep(1e-4)
        except KeyboardInterrupt:
            interrupted += 1
        while reference.estimation.steps < optimizer.estimation.steps:
            reference.step(again)
        assert optimizer.estimation.steps in (steps, steps + 1)
        mine, theirs = state_of(model, optimizer), state_of(twin, reference)
        assert same(mine[:-1], theirs[:-1])
    signal.signal(signal.SIGALRM, signal.SIG_IGN if previous is signal.SIG_DFL else previous)
    assert interrupted > 5


def test_ctrl_c_in_the_closure_takes_effect_at_once() -> None:
    model, optimizer, _ = built()
    before = state_of(model, optimizer)

    def endless() -> Tensor:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)
        raise AssertionError("went on")

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(endless)
    assert same(before, state_of(model, optimizer))


def test_ctrl_c_in_the_update_waits_for_its_end() -> None:
    ended: list[int] = []

    class Slow(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            signal.raise_signal(signal.SIGINT)
            super().step()
            ended.append(1)

    model = mlp()
    optimizer = GuessGradOptimizer(model.parameters(), Slow, lr=0.1, seed=0)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: F.cross_entropy(model(X), LABELS))
    assert ended == [1]
    for p, q in zip(model.parameters(), trained(1), strict=True):
        assert torch.equal(p, q)


def test_a_handler_of_the_user_s_is_called_and_stays() -> None:
    heard: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        _, optimizer, closure = built()

        def interrupted() -> Tensor:
            if not heard:
                signal.raise_signal(signal.SIGINT)
            return closure()

        optimizer.step(interrupted)
        assert heard == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("during", [False, True], ids=["after a step", "while another thread steps"])
def test_a_forked_process_can_step(during: bool) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _, optimizer, closure = built()
    optimizer.step(closure)
    inside, go_on = threading.Event(), threading.Event()

    def slow() -> Tensor:
        inside.set()
        go_on.wait(20)
        return closure()

    worker = threading.Thread(target=lambda: built()[1].step(slow))
    if during:
        worker.start()
        inside.wait(20)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            trained(2)
            clean = torch._C._len_torch_function_stack() == 0 and torch.autograd.Function.__dict__["apply"] is APPLY
            os._exit(0 if clean else 3)
        finally:
            os._exit(1)
    go_on.set()
    if during:
        worker.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    torch.set_num_threads(threads)
