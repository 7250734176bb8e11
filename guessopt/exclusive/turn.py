"""``exclusive``: one step at a time in a process.

All threads share forward AD's level, the patched ``torch.autograd.Function.apply`` and dynamo's stance. So a step waits
until the step of another thread has ended.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C import _functorch
from torch.autograd import forward_ad

from guessopt.errors import ClosureError
from guessopt.exclusive.interrupts import SIGINT, Interrupts
from guessopt.exclusive.modes import Modes


class _Turn:
    """The lock that a step holds, and how deep the holder has nested it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0
        self.interrupts: Interrupts | None = None
        self.modes: Modes | None = None


_turn = _Turn()
_here = threading.local()


def refuse_in_closure(name: str) -> None:
    """Raise ``ClosureError`` if a closure of this thread is running."""
    if getattr(_here, "running", False):
        raise ClosureError(
            f"the closure calls {name} of an optimizer of guessopt; it must only compute the loss: call {name} before "
            "or after the step"
        )


def _refuse_surroundings(name: str) -> None:
    """Raise ``ClosureError`` inside a transform of torch or inference mode, where tensors are not plain ones."""
    stack = _functorch.get_interpreter_stack()
    if stack:
        kind = str(stack[-1].key()).rpartition(".")[2].lower()
        where = f"torch.func.{kind}"
    elif forward_ad._current_level >= 0:
        where = "torch.autograd.forward_ad.dual_level()"
    elif torch.is_inference_mode_enabled():
        where = "torch.inference_mode()"
    else:
        return
    raise ClosureError(f"{name} is called inside {where}, where no gradient can be estimated; call {name} outside it")


class exclusive:
    """Within, no other thread runs a step. The thread that holds it may enter again.

    Args:
        name: the method's name, for the message.

    Raises:
        ClosureError: a closure of this thread is running, or a transform of torch's.

    >>> with exclusive("step()"):
    ...     running(lambda: 1)
    1
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        refuse_in_closure(self.name)
        interrupts = Interrupts.install()
        try:
            _turn.lock.acquire()
        except BaseException:
            if interrupts is not None:
                interrupts.remove()
            raise
        if _turn.depth == 0:
            try:
                _refuse_surroundings(self.name)
                modes = Modes()
            except BaseException:
                _turn.lock.release()
                if interrupts is not None:
                    interrupts.remove()
                raise
            _turn.interrupts, _turn.modes = interrupts, modes
        _turn.depth += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _turn.depth -= 1
        interrupts = None
        if _turn.depth == 0:
            if kind is not None and _turn.modes is not None:
                _turn.modes.restore()
            interrupts, _turn.interrupts, _turn.modes = _turn.interrupts, None, None
        _turn.lock.release()
        if interrupts is not None:
            interrupts.remove()


def running(closure: Callable[[], Any]) -> Any:
    """Call the closure. Within, no step can begin, and Ctrl-C takes effect at once."""
    interrupts = _turn.interrupts
    _here.running = True
    try:
        if interrupts is not None:
            if interrupts.waits:
                interrupts.waits = False
                interrupts.before(SIGINT, None)
            interrupts.open = True
        return closure()
    finally:
        if interrupts is not None:
            interrupts.open = False
        _here.running = False


@contextmanager
def unscaled() -> Iterator[None]:
    """Within, a closure may not call ``GradScaler.scale``: nobody would divide by the scale before the update."""
    scale = torch.amp.GradScaler.scale

    def refused(self: torch.amp.GradScaler, outputs: Any) -> Any:
        if getattr(_here, "running", False) and self.is_enabled():
            raise ClosureError(
                "the closure of step(closure) calls GradScaler.scale(): the update would take scaled gradients; use "
                "estimate(closure) and scaler.step(opt), or leave the scale out"
            )
        return scale(self, outputs)

    torch.amp.GradScaler.scale = refused  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.amp.GradScaler.scale = scale  # type: ignore[method-assign]


def leave_modes() -> None:
    """Leave every mode that the step has entered. An interrupt may have skipped this, and changes must not be undone
    inside a mode."""
    if _turn.modes is not None:
        _turn.modes.restore()


def interrupts_now() -> Interrupts | None:
    """The interrupts of the running step; None if it has not taken over Ctrl-C."""
    return _turn.interrupts


def hold_interrupts() -> None:
    """From now on Ctrl-C waits for the end of the step."""
    if _turn.interrupts is not None:
        _turn.interrupts.open = False


def _in_child() -> None:
    """After a fork only the thread that forked lives on. Free the lock, which another thread may have held."""
    global _turn
    modes, _turn = _turn.modes, _Turn()
    _here.running = False
    if modes is not None:
        modes.restore()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
