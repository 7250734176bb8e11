"""One step at a time in a process, which leaves no mode behind however it ends.

Forward AD has one level for all threads, ``torch.autograd.Function.apply`` is patched for all of them, and dynamo has
one stance. So a step waits until the step of another thread has ended.

Ctrl-C takes effect while the closure runs, and otherwise when the step has ended: never between a change and what
takes it back.
"""

from __future__ import annotations

import _signal  # what ``signal`` is made of, without the enums that a step would pay for four times
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from guessopt.errors import ClosureError

Handler = Callable[[int, Any], Any]

SIGINT = int(signal.SIGINT)


class _Modes:
    """What a step switches on for its thread or for the process, as it was."""

    def __init__(self) -> None:
        self.grad, self.forward = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
        self.stack = _get_current_function_mode_stack()
        self.level = forward_ad._current_level
        self.transforms = _functorch.get_dynamic_layer_stack_depth()
        self.apply = torch.autograd.Function.__dict__["apply"]
        kinds = ("cpu", "cuda") if torch.cuda.is_initialized() else ("cpu",)
        self.autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        self.nesting = torch.autocast_increment_nesting() - 1
        torch.autocast_decrement_nesting()

    def restore(self) -> None:
        torch.autograd.Function.apply = self.apply  # type: ignore[method-assign]
        while torch._C._len_torch_function_stack():
            _pop_mode()
        for mode in self.stack:
            _push_mode(mode)
        if _functorch.get_dynamic_layer_stack_depth() > self.transforms:
            _functorch.pop_dynamic_layer_stack_and_undo_to_depth(self.transforms)
        if self.level < 0:
            forward_ad._current_level = -1
            with suppress(RuntimeError):  # a level that was entered and not yet noted
                torch._C._exit_dual_level(level=0)
        torch._C._set_fwd_grad_enabled(self.forward)
        torch._C._set_grad_enabled(self.grad)
        for kind, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.autocast_increment_nesting()
        while torch.autocast_decrement_nesting() > self.nesting:
            pass


class _Interrupts:
    """Ctrl-C in the main thread: waits for the step's end, or takes effect at once where ``open``."""

    def __init__(self, before: Handler) -> None:
        self.before = before
        self.open = self.waits = False

    def heard(self, number: int, frame: Any) -> None:
        if not self.open:
            self.waits = True
            return
        self.open = False  # what follows is on the way out
        self.before(number, frame)

    @classmethod
    def installed(cls) -> _Interrupts | None:
        if threading.current_thread() is not threading.main_thread():
            return None
        before = _signal.getsignal(SIGINT)
        if not callable(before) or isinstance(getattr(before, "__self__", None), _Interrupts):
            return None  # ignored, or not Python's to handle
        found = cls(before)
        _signal.signal(SIGINT, found.heard)
        return found

    def removed(self) -> None:
        """The handler as before; then whatever has waited."""
        if _signal.getsignal(SIGINT) == self.heard:
            _signal.signal(SIGINT, self.before)
        if self.waits:
            self.waits = False
            self.before(SIGINT, None)


class _Turn:
    """Whose turn it is, in this process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0
        self.interrupts: _Interrupts | None = None
        self.modes: _Modes | None = None


_turn = _Turn()
_here = threading.local()


def refuse_in_closure(name: str) -> None:
    """Raise ``ClosureError`` if a closure of this thread is running."""
    if getattr(_here, "running", False):
        raise ClosureError(
            f"the closure calls {name} of an optimizer of guessopt; it must only compute the loss: call {name} before "
            "or after the step"
        )


class exclusive:
    """A step's turn; what runs within may take it again.

    Args:
        name: of the method, for the message.

    Raises:
        ClosureError: a closure of this thread is running.

    >>> with exclusive("step()"):
    ...     running(lambda: 1)
    1
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        refuse_in_closure(self.name)
        interrupts = _Interrupts.installed()
        try:
            _turn.lock.acquire()
        except BaseException:
            if interrupts is not None:
                interrupts.removed()
            raise
        if _turn.depth == 0:
            _turn.interrupts, _turn.modes = interrupts, _Modes()
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
            interrupts.removed()


def running(closure: Callable[[], Any]) -> Any:
    """The closure's result. No step can begin within, and Ctrl-C takes effect at once."""
    interrupts = _turn.interrupts
    _here.running = True
    try:
        if interrupts is not None:
            if interrupts.waits:
                interrupts.waits = False
                interrupts.before(signal.SIGINT, None)
            interrupts.open = True
        return closure()
    finally:
        if interrupts is not None:
            interrupts.open = False
        _here.running = False


@contextmanager
def unscaled() -> Iterator[None]:
    """Refuse ``GradScaler.scale`` in closures: within, nobody divides by the scale before the update."""
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
    """Leave every mode that the step has entered, which an interrupt may have kept from being left: what puts things
    back must not run within one."""
    if _turn.modes is not None:
        _turn.modes.restore()


def hold_interrupts() -> None:
    """From here on Ctrl-C waits for the end of the step."""
    if _turn.interrupts is not None:
        _turn.interrupts.open = False


def _in_child() -> None:
    """A forked process has only the thread that forked: whatever another one held is free."""
    global _turn
    modes, _turn = _turn.modes, _Turn()
    _here.running = False
    if modes is not None:
        modes.restore()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
