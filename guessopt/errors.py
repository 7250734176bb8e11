"""Errors and warnings that name the cause and the remedy."""

from __future__ import annotations

from typing import Any


class ClosureError(RuntimeError):
    """The closure did something from which no gradient can be estimated; the message names it and the remedy.

    The optimizer, the parameters, buffers, ``.grad`` and random states are left as they were before the call.

    >>> issubclass(ClosureError, RuntimeError)
    True
    """


class PartialUpdateError(RuntimeError):
    """A step failed after some parameters had been updated.

    Buffers and random states are as before the step. In ``memory="stream"``, ``opt.finish(error.journal, closure)``
    updates the rest, from the same guesses and directional derivatives (the inputs of the remaining sites then come
    from updated parameters).

    Attributes:
        journal: a ``Journal``: seeds, directional derivatives, and which parameters are done; None where the base
            failed in the middle of an update, after its first ones: what it had written is not known to be whole, so
            that parameters and base state are to be loaded from a checkpoint.

    >>> issubclass(PartialUpdateError, RuntimeError)
    True
    """

    def __init__(self, message: str, journal: Any) -> None:
        super().__init__(message)
        self.journal = journal


class GuessWarning(UserWarning):
    """Something works, but less well than a user would expect; issued once per optimizer.

    >>> issubclass(GuessWarning, UserWarning)
    True
    """
