"""Operations that torch itself refuses on this machine. They are tried without guessopt."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from guessopt.errors import refusal

_ASKED: dict[Hashable, str | None] = {}


def refused(run: Callable[[], Any], key: Hashable = None) -> str | None:
    """Why torch refuses to run this; None if it runs.

    Args:
        run: an operation, or a forward and backward pass of a model, in plain torch.
        key: under which the answer is remembered; None: it is not.

    >>> refused(lambda: None) is None
    True
    """
    if key is not None and key in _ASKED:
        return _ASKED[key]
    why = None
    try:
        run()
    except (RuntimeError, AssertionError) as error:
        why = refusal(error)
        if why is None:
            raise
    if key is not None:
        _ASKED[key] = why
    return why
