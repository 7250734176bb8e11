"""What torch itself does not run on the machine at hand: asked by running it, without guessopt."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from guessopt.errors import refusal

_ASKED: dict[Hashable, str | None] = {}


def refused(run: Callable[[], Any], key: Hashable = None) -> str | None:
    """Why torch refuses to run this (a plain operation, or a forward and backward pass of a model); None if it runs.

    Args:
        key: ask once for this key, and remember the answer.

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
