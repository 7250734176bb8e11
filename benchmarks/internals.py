"""The functions of the package that a benchmark replaces to time the phases of a step.

They are public names within the package, and no part of what users are promised. A change of the package may need a
change here. Nothing else in ``benchmarks`` replaces parts of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from time import process_time
from typing import Any
from unittest import mock

from guessopt import WPerp
from guessopt.engine.forward import ForwardRun
from guessopt.engine.gradients import parameter_gradients
from guessopt.step import guessing, modes, runs, updating
from guessopt.tracing import context

REFRESH, PROBE, PASS = "guesses: SVD", "probe", "pass"
POINTS: tuple[tuple[Any, str, str], ...] = (
    (guessing, "guess_at", "guesses: transposes"),
    (context, "draw", "guesses: noise"),
    (context.SiteContext, "pull_back", "guesses: pull back"),
    (WPerp, "prepare", REFRESH),
    (ForwardRun, "execute", PASS),
    (modes, "estimated_cotangents", "parameter gradients"),
    (modes, "parameter_gradients", "parameter gradients"),
    (updating, "update", "base update"),
    (runs, "trace", PROBE),
    (runs, "probe_again", PROBE),
)
"""Functions of the package, and the phase that each belongs to."""
PHASES = tuple(dict.fromkeys(phase for *_, phase in POINTS if phase != PASS))


@contextmanager
def observed(phase: Callable[[str], AbstractContextManager[None]]) -> Iterator[None]:
    """Within, every optimizer enters ``phase(name)`` for each phase of a step."""

    def entering(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with phase(name):
                return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for owner, attribute, name in POINTS:
            stack.enter_context(mock.patch.object(owner, attribute, entering(getattr(owner, attribute), name)))
        yield


@contextmanager
def timed_gradients(report: Callable[[float], object]) -> Iterator[None]:
    """Within, ``report`` is given the CPU seconds of every call that makes parameter gradients."""

    def timed(*args: Any) -> Any:
        start = process_time()
        found = parameter_gradients(*args)
        report(process_time() - start)
        return found

    with mock.patch.object(modes, "parameter_gradients", timed):
        yield


def without_guesses() -> AbstractContextManager[Any]:
    """Within, no pass has guesses."""
    return mock.patch.object(guessing, "guess_at", lambda *_: None)
