"""Errors and warnings that name the cause and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ClosureError(RuntimeError):
    """The closure did something from which no gradient can be estimated; the message names it and the remedy.

    The optimizer, the parameters, buffers, ``.grad`` and random states are left as they were before the call.

    >>> issubclass(ClosureError, RuntimeError)
    True
    """


class AuditError(ClosureError):
    """The loss does not move as its tangents say (see ``guessopt.audit``): a gradient from these tangents would be
    wrong. Everything is left as it was before the call. The message names the first operation that departs.

    >>> import itertools, torch, guessopt
    >>> net, x, numbers = torch.nn.Linear(3, 1), torch.ones(5, 3), itertools.count()
    >>> opt = guessopt.GuessGradOptimizer(net.parameters())
    >>> opt.step(lambda: net(x).mean() + next(numbers))
    Traceback (most recent call last):
    guessopt.errors.AuditError: the closure does not repeat: a run from the same random state gave the loss ...
    """


class PartialUpdateError(RuntimeError):
    """A step failed after some parameters had been updated.

    Buffers and random states are as before the step. In ``memory="stream"``, ``opt.finish(error.journal, closure)``
    updates the rest, from the same guesses and directional derivatives (the inputs of the remaining sites then come
    from updated parameters).

    Attributes:
        journal: a ``Journal``: seeds, directional derivatives, and which parameters are done. None if the base failed
            in the middle of an update without copies: some parameters may be half-written, so load parameters and base
            state from a checkpoint.

    >>> issubclass(PartialUpdateError, RuntimeError)
    True
    """

    def __init__(self, message: str, journal: Any) -> None:
        super().__init__(message)
        self.journal = journal


class GuessWarning(UserWarning):
    """Something works, but less well than a user would expect.

    An optimizer issues each message once; ``save`` and ``load`` issue theirs at every call.

    >>> issubclass(GuessWarning, UserWarning)
    True
    """


#: What torch says where it has no kernel for an operation: of this dtype, on this processor, device or backend.
_REFUSALS = (
    "could not create a primitive",
    "not implemented for",
    "no viable backend",
    "no available kernel",
    "unsupported dtype",
    "`fused=true` requires",
    "could not run 'aten::",
    "not compiled with",
    "found no nvidia driver",
    "no cuda gpus are available",
)


def refusal(error: BaseException) -> str | None:
    """Why torch does not run an operation on this machine, in torch's own words; None if the error says something else.

    >>> refusal(RuntimeError("could not create a primitive descriptor for the LSTM. Run workload with ..."))
    'could not create a primitive descriptor for the LSTM'
    >>> refusal(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    True
    """
    if not isinstance(error, (RuntimeError, AssertionError)) or isinstance(error, ClosureError):
        return None
    first = (str(error).splitlines() or [""])[0]
    return first.partition(". ")[0] if any(sign in first.lower() for sign in _REFUSALS) else None


def refused(fn: Callable[..., Any], why: str) -> ClosureError:
    """The error for an operation that torch itself refuses."""
    return ClosureError(
        f"torch does not run {getattr(fn, '__name__', fn)} as it is called here on this machine: {why}; use another "
        "dtype (float32), backend or device for it"
    )
