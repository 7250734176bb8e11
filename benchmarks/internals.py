"""All places where a benchmark reads or replaces private parts of the package.

The package promises nothing about these parts. A change of the package may need a change here, and nowhere else in
``benchmarks`` but in ``step_times``, which also runs beside other versions of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from time import process_time
from typing import Any
from unittest import mock

from torch import Tensor

from guessopt import GuessGradOptimizer, WPerp
from guessopt.diagnostics.reverse import Truth, measuring
from guessopt.engine.forward import ForwardRun
from guessopt.engine.gradients import parameter_gradients
from guessopt.estimators import Estimator
from guessopt.graph import SiteGraph
from guessopt.record import ForwardRecord
from guessopt.sites import Site
from guessopt.step import estimation
from guessopt.tracing import context

# --- phases of a step -------------------------------------------------------------------------------------------------

REFRESH, PROBE, PASS = "guesses: SVD", "probe", "pass"
POINTS: tuple[tuple[Any, str, str], ...] = (
    (GuessGradOptimizer, "_guess", "guesses: transposes"),
    (context, "draw", "guesses: noise"),
    (context.SiteContext, "pull_back", "guesses: pull back"),
    (WPerp, "prepare", REFRESH),
    (ForwardRun, "execute", PASS),
    (estimation, "estimated_cotangents", "parameter gradients"),
    (estimation, "parameter_gradients", "parameter gradients"),
    (GuessGradOptimizer, "_update", "base update"),
    (estimation, "trace", PROBE),
    (estimation, "reprobe", PROBE),
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

    with mock.patch.object(estimation, "parameter_gradients", timed):
        yield


def guess_nothing(opt: GuessGradOptimizer) -> None:
    """From now on the optimizer's passes have no guesses."""
    opt._guess = lambda *_: None  # type: ignore[method-assign]


# --- the plan of a step -----------------------------------------------------------------------------------------------


def graph_of(opt: GuessGradOptimizer) -> SiteGraph:
    """The graph of the last step."""
    return opt._plans[0].graph


def guessed_sites(opt: GuessGradOptimizer) -> list[Site]:
    """The sites that got a guess in the last step."""
    return [graph_of(opt).sites[index] for index in opt._guesses_of(opt._plans[0])]


def name_of(opt: GuessGradOptimizer, site: Site) -> str:
    """The name of the first parameter that the site reads."""
    return opt._names[site.params[0]]


# --- exactness --------------------------------------------------------------------------------------------------------


def passes(
    opt: GuessGradOptimizer, closure: Callable[[], Tensor], estimators: Sequence[Estimator], draws: int
) -> Iterator[tuple[SiteGraph, ForwardRecord]]:
    """Graph and record of so many passes with each of the estimators, at all parameters. Nothing else is changed."""
    for estimator in estimators:
        opt._estimators = [estimator] * len(opt._params)
        opt._plans[0].guesses = None
        for _ in range(draws):
            with measuring(opt) as transaction:
                plan, record = opt._forward(closure, transaction)
            yield plan.graph, record


def first_estimator(opt: GuessGradOptimizer) -> Estimator:
    return opt._estimators[0]


def true_gradients(opt: GuessGradOptimizer, truth: Truth) -> dict[int, Tensor]:
    """Parameter gradients by position, made from the true cotangents by the sites' own rules."""
    return parameter_gradients(truth.graph, truth.record, truth.g, opt._by_position, opt._ids)
