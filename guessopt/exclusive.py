"""One step at a time in a process. However a step ends, it leaves every mode that it entered.

All threads share forward AD's level, the patched ``torch.autograd.Function.apply`` and dynamo's stance. So a step waits
until the step of another thread has ended.

Ctrl-C takes effect while the closure's own code runs. Elsewhere in a step it waits until the torch call, or the step,
has ended: an interrupt must not come between a change and its undoing.
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
import torch.utils.checkpoint
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _python_dispatch

from guessopt.errors import ClosureError

Handler = Callable[[int, Any], Any]

SIGINT = int(signal.SIGINT)


#: What a step replaces in torch.
_ATTRIBUTES: tuple[tuple[Any, str], ...] = (
    (torch.autograd.Function, "apply"),
    (torch.utils.checkpoint, "_checkpoint_without_reentrant_generator"),
    (torch.amp.GradScaler, "scale"),
    *(
        (_python_dispatch, name)
        for name in (
            "_is_in_torch_dispatch_mode",
            "_is_in_non_infra_torch_dispatch_mode",
            "_is_in_any_mode_without_ignore_compile_internals",
        )
        if hasattr(_python_dispatch, name)
    ),
)
#: What a step, or torch within it, switches for the whole process: how to ask, and how to set.
_FLAGS: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    (_functorch._is_vmap_fallback_enabled, _functorch._set_vmap_fallback_enabled),  # type: ignore[attr-defined]
    *(
        (getattr(torch._C, f"_get_{name}_sdp_enabled"), getattr(torch._C, f"_set_sdp_use_{name}"))
        for name in ("cudnn", "flash", "mem_efficient", "math", "overrideable")
        if hasattr(torch._C, f"_get_{name}_sdp_enabled")
    ),
)


class _Modes:
    """The modes and switches of torch that a step changes, as they were before it."""

    def __init__(self) -> None:
        self.grad, self.forward = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
        self.stack = _get_current_function_mode_stack()
        self.dispatch = _python_dispatch._get_current_dispatch_mode_stack()
        self.level = forward_ad._current_level
        self.transforms = _functorch.get_dynamic_layer_stack_depth()
        self.attributes = [(owner, name, vars(owner)[name]) for owner, name in _ATTRIBUTES]
        self.flags = [(switch, asked()) for asked, switch in _FLAGS]
        kinds = ("cpu", "cuda") if torch.cuda.is_initialized() else ("cpu",)
        self.autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        self.nesting = torch.autocast_increment_nesting() - 1
        torch.autocast_decrement_nesting()

    def restore(self) -> None:
        for owner, name, value in self.attributes:
            setattr(owner, name, value)
        while torch._C._len_torch_function_stack():
            _pop_mode()
        for mode in self.stack:
            _push_mode(mode)
        if _python_dispatch._get_current_dispatch_mode_stack() != self.dispatch:
            while torch._C._len_torch_dispatch_stack():
                top = torch._C._get_dispatch_stack_at(torch._C._len_torch_dispatch_stack() - 1)
                torch._C._pop_torch_dispatch_stack(getattr(top, "_mode_key", None))
            for mode in self.dispatch:
                _python_dispatch._push_mode(mode)
        for switch, value in self.flags:
            switch(value)
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


def _is_dropped(frame: Any) -> bool:
    """Whether Python drops what is raised at ``frame``: in the destructor of an object or the callback of a weak
    reference, which run at any time."""
    for _ in range(4):
        if frame is None:
            return False
        if frame.f_code.co_name == "__del__" or frame.f_code.co_filename.endswith(("weakref.py", "weak.py")):
            return True
        frame = frame.f_back
    return False


class Interrupts:
    """Ctrl-C in the main thread: waits for the step's end, or takes effect at once where ``open`` and not ``busy``."""

    def __init__(self, before: Handler) -> None:
        self.before = before
        self.open = self.waits = self.busy = False

    def heard(self, number: int, frame: Any) -> None:
        if self.busy or not self.open or _is_dropped(frame):
            self.waits = True
            return
        self.open = False  # what follows is on the way out
        self.before(number, frame)

    def free(self) -> None:
        """No longer ``busy``: what has waited takes effect."""
        self.busy = False
        if self.waits and self.open:
            self.waits = False
            self.heard(signal.SIGINT, None)

    @classmethod
    def installed(cls) -> Interrupts | None:
        if threading.current_thread() is not threading.main_thread():
            return None
        before = _signal.getsignal(SIGINT)
        if not callable(before) or isinstance(getattr(before, "__self__", None), Interrupts):
            return None  # ignored, or not Python's to handle
        found = cls(before)
        _signal.signal(SIGINT, found.heard)
        return found

    def removed(self) -> None:
        """Put back the handler from before; then call it if Ctrl-C has waited."""
        if _signal.getsignal(SIGINT) == self.heard:
            _signal.signal(SIGINT, self.before)
        if self.waits:
            self.waits = False
            self.before(SIGINT, None)


class _Turn:
    """The lock that a step holds, and how deep the holder has nested it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0
        self.interrupts: Interrupts | None = None
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


def _refuse_surroundings(name: str) -> None:
    """Raise ``ClosureError`` if torch is in the middle of a transform, whose tensors are not plain ones."""
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
        interrupts = Interrupts.installed()
        try:
            _turn.lock.acquire()
        except BaseException:
            if interrupts is not None:
                interrupts.removed()
            raise
        if _turn.depth == 0:
            try:
                _refuse_surroundings(self.name)
                modes = _Modes()
            except BaseException:
                _turn.lock.release()
                if interrupts is not None:
                    interrupts.removed()
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
            interrupts.removed()


def running(closure: Callable[[], Any]) -> Any:
    """Call the closure. Within, no step can begin, and Ctrl-C takes effect at once."""
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
    """Leave every mode that the step has entered. An interrupt may have skipped the leaving, and changes must not be
    undone inside a mode."""
    if _turn.modes is not None:
        _turn.modes.restore()


def interrupts_now() -> Interrupts | None:
    """Those of the step that runs; None where none wait for it."""
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
