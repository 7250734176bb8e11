"""``Interrupts``: Ctrl-C takes effect while the closure's own code runs, and waits elsewhere in a step.

An interrupt must not come between a change and its undoing.
"""

from __future__ import annotations

import _signal  # the module behind ``signal``, without its enums: a step would pay for them four times
import signal
import threading
from collections.abc import Callable
from typing import Any

Handler = Callable[[int, Any], Any]

SIGINT = int(signal.SIGINT)


class Interrupts:
    """Ctrl-C in the main thread during a step.

    Args:
        before: the handler from before the step.

    Attributes:
        open: whether the closure's own code runs, where Ctrl-C takes effect at once.
        busy: whether a torch call of the closure runs: Ctrl-C then waits until the call has ended.
        waits: whether Ctrl-C has been pressed and waits.
    """

    def __init__(self, before: Handler) -> None:
        self.before = before
        self.open = self.waits = self.busy = False

    def heard(self, number: int, frame: Any) -> None:
        """The handler during the step."""
        if self.busy or not self.open or _is_dropped(frame):
            self.waits = True
            return
        self.open = False  # from here on the step is on its way out
        self.before(number, frame)

    def free(self) -> None:
        """End ``busy``. Ctrl-C takes effect if it has waited."""
        self.busy = False
        if self.waits and self.open:
            self.waits = False
            self.heard(signal.SIGINT, None)

    @classmethod
    def install(cls) -> Interrupts | None:
        """Take over Ctrl-C; None outside the main thread, and if Python does not handle it."""
        if threading.current_thread() is not threading.main_thread():
            return None
        before = _signal.getsignal(SIGINT)
        if not callable(before) or isinstance(getattr(before, "__self__", None), Interrupts):
            return None
        found = cls(before)
        _signal.signal(SIGINT, found.heard)
        return found

    def remove(self) -> None:
        """Put back the handler from before; then call it if Ctrl-C has waited."""
        if _signal.getsignal(SIGINT) == self.heard:
            _signal.signal(SIGINT, self.before)
        if self.waits:
            self.waits = False
            self.before(SIGINT, None)


def _is_dropped(frame: Any) -> bool:
    """Whether Python drops an exception that is raised at ``frame``: in the destructor of an object or the callback of
    a weak reference, which run at any time."""
    for _ in range(4):
        if frame is None:
            return False
        if frame.f_code.co_name == "__del__" or frame.f_code.co_filename.endswith(("weakref.py", "weak.py")):
            return True
        frame = frame.f_back
    return False
