"""Errors and warnings that name the cause and the remedy."""


class ClosureError(RuntimeError):
    """The closure did something from which no gradient can be estimated; the message names it and the remedy.

    The optimizer, the parameters, buffers, ``.grad`` and random states are left as they were before the call.

    >>> issubclass(ClosureError, RuntimeError)
    True
    """


class GuessWarning(UserWarning):
    """Something works, but less well than a user would expect; issued once per optimizer.

    >>> issubclass(GuessWarning, UserWarning)
    True
    """
