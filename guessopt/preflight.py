"""A report before training: every site, its guess, and the obstacles.

Units: ``cost`` in forward passes (matrix products only; a step of backpropagation is 3), ``memory`` in bytes.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from guessopt.credit import DiscountChoice
from guessopt.engine.jvp.gaps import is_foreign
from guessopt.engine.transaction import Transaction
from guessopt.errors import GuessWarning
from guessopt.exclusive import exclusive
from guessopt.hooks import lifted
from guessopt.layout import Layout, Shape
from guessopt.ops.base import op_of
from guessopt.optimizer import GuessGradOptimizer
from guessopt.sites import Matrix, Site
from guessopt.step.checks import check_plan, unread
from guessopt.step.discount import measure
from guessopt.step.estimation import Estimation
from guessopt.step.trace import trace


@dataclass(frozen=True)
class SiteReport:
    """One site: the parameters it reads, the operation, its output's shape, where the examples lie, the next matrix
    site(s) with the path there, the guess it will get, and with a ``discount`` where its positions lie and which
    positions of the loss one of them moves."""

    parameters: tuple[str, ...]
    operation: str
    shape: Shape
    batch: str
    next: str
    path: str
    guess: str
    positions: str = ""


@dataclass(frozen=True)
class Preflight:
    """The result of ``preflight``; ``print`` it for a table.

    Attributes:
        sites: in the order in which the closure runs them.
        batch: number of examples N (1: examples cannot be told apart).
        unread: parameters from which no derivative reaches the loss.
        coupled: sites that take the scalar derivative, because examples interact after them.
        notes: the optimizer's warnings, and operations that the package runs in a different way. An operation without
            a derivative is not a note: it raises a ``ClosureError`` with its name.
        cost: matrix products of a step, in forward passes: forward, tangents, parameter gradients.
        memory: bytes that ``memory="store"`` keeps until the directional derivatives are known.
        feedback: bytes of the learned states (feedback matrices).
        reversed: the largest number of matrix sites on one path of a reverse graph. 1 or less: reverse mode carries no
            error from one layer to another.
        positions: number of positions T of the loss; 0 without a ``discount``, or if the loss has no positions.
        discount: the discount of the next step; None without position credit.
        measured: what ``discount="auto"`` has measured; None for a discount that is set.
    """

    sites: tuple[SiteReport, ...]
    batch: int
    unread: tuple[str, ...]
    coupled: tuple[str, ...]
    notes: tuple[str, ...]
    cost: float
    memory: int
    feedback: int
    reversed: int
    positions: int = 0
    discount: float | None = None
    measured: DiscountChoice | None = None

    def __str__(self) -> str:
        header: tuple[str, ...] = (
            "parameters",
            "operation",
            "output",
            "examples",
            "next matrix site",
            "by way of",
            "guess",
        )
        rows: list[tuple[str, ...]] = [
            (", ".join(s.parameters), s.operation, str(list(s.shape)), s.batch, s.next, s.path, s.guess)
            for s in self.sites
        ]
        if self.positions:
            header = (*header, "credit")
            rows = [(*row, s.positions or "the whole example") for row, s in zip(rows, self.sites, strict=True)]
        widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [header, tuple("-" * w for w in widths), *rows]
        ]
        lines = [
            *table,
            "",
            f"examples: {self.batch}",
            *([] if self.discount is None else [self._credit()]),
            f"cost: {self.cost:.1f} forward passes (backpropagation: 3)",
            f"kept until the derivatives are known: {self.memory / 2**20:.1f} MiB",
            *([f"feedback matrices: {self.feedback / 2**10:.1f} KiB"] if self.feedback else []),
            "reverse graphs: "
            + (
                "none holds two matrix sites"
                if self.reversed < 2
                else f"up to {self.reversed} matrix sites, in one block"
            ),
            *(f"no derivative reaches: {name}" for name in self.unread),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def _credit(self) -> str:
        if not self.positions:
            return f"positions: none found, so discount {self.discount} has no effect"
        return f"positions: {self.positions}, discount {self.discount}" + (" (measured)" if self.measured else "")


def _positions(site: Site) -> str:
    return "" if site.position_dim is None else f"dim {site.position_dim}: {site.influence.value}"


def preflight(opt_or_params: Any, closure: Callable[[], Any]) -> Preflight:
    """Trace the closure and report how a step would treat each site. Nothing is changed.

    Args:
        opt_or_params: a ``GuessGradOptimizer``; or parameters as for one, which then get its default estimator.
        closure: as for ``step``.

    Raises:
        ClosureError: as ``step`` would.

    >>> import torch, guessopt
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> report = preflight(net.named_parameters(), lambda: net(torch.ones(5, 3)).square().mean())
    >>> report.batch, [site.operation for site in report.sites], report.sites[0].path
    (5, ['linear', 'linear'], 'relu')
    """
    opt = (
        opt_or_params
        if isinstance(opt_or_params, GuessGradOptimizer)
        else GuessGradOptimizer(opt_or_params, torch.optim.SGD, lr=0.0)
    )
    est = opt.estimation
    est.refresh()
    transaction = Transaction(est.devices)
    warned, before = set(est.warned), est.choice
    try:
        with (
            exclusive("preflight()"),
            lifted(est.params, est.hooks),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always", GuessWarning)
            est.warned = set()
            plan = trace(est, closure, transaction, finite=est.check_finite)
            check_plan(est, plan)
            if est.discount == "auto" and plan.graph.positions:
                measure(est, plan, closure, transaction)
        choice = est.choice if est.discount == "auto" else None
    finally:
        transaction.rewind()
        est.warned, est.choice = warned, before
    graph = plan.graph
    guesses = est.assignments(plan)
    left = [site for site in graph.sites if site.index in guesses and est.choice_of(site) != est.estimator_of(site)]
    picked = Counter(f"{est.choice_of(site).name} picked {est.estimator_of(site).name}" for site in left)
    forms: dict[int, tuple[str, int]] = {}
    for estimator in dict.fromkeys(estimator for estimator, _, _ in guesses.values()):
        own = tuple(site for site in graph.sites if site.index in guesses and guesses[site.index][0] == estimator)
        forms |= estimator.forms(own, graph)
    return Preflight(
        sites=tuple(_report(est, site, guesses, forms, graph.blocked.get(site.index)) for site in graph.sites),
        batch=graph.batch,
        unread=tuple(unread(est, graph)),
        coupled=tuple(
            f"{est.names[site.params[0]]} ({site.op})" for site in graph.sites if site.layout is Layout.COUPLED
        ),
        notes=(
            *(str(w.message) for w in caught if issubclass(w.category, GuessWarning)),
            *(f"{pick} for {count} site{'s' * (count > 1)}" for pick, count in picked.items()),
            *(f"{fn.__name__} {what}" for fn in dict.fromkeys(graph.functions) if (what := op_of(fn).treatment)),
            *(
                f"{fn.__name__} goes by the derivative of its backward: it has none in forward mode"
                for fn in dict.fromkeys(graph.functions)
                if fn in graph.without_forward or is_foreign(fn)
            ),
        ),
        cost=graph.cost,
        memory=sum(site.kept for site in graph.sites),
        feedback=sum(size for _, size in forms.values()),
        reversed=max((estimator.reversed_matrices(graph) for estimator, _, _ in guesses.values()), default=0),
        positions=graph.positions,
        discount=est.gamma if choice is None else choice.discount,
        measured=choice,
    )


def _report(
    est: Estimation, site: Site, guesses: dict[int, Any], forms: dict[int, tuple[str, int]], blocked: str | None
) -> SiteReport:
    estimator = est.estimator_of(site)
    segment = site.segment
    choice = est.choice_of(site)
    if site.index in forms:
        guess = f"{estimator.name}: {forms[site.index][0]}"
    elif site.index in guesses:
        guess = ("" if choice.name == estimator.name else f"{choice.name}: ") + _named(estimator, site, blocked)
    elif estimator.space == "parameters":
        guess = f"{estimator.name} (on the parameters)"
    elif site.shares is not None:
        guess = "shares the next site's"
    else:
        guess = "none: exact error"
    path = ""
    if segment is not None:
        calls = segment.elementwise if segment.elementwise is not None else segment.program
        path = " > ".join(call.op for call in calls) or "direct"
    return SiteReport(
        parameters=tuple(est.names[k] for k in site.params),
        operation=site.op,
        shape=site.shape,
        batch=site.layout.value,
        next="the loss" if segment is None else " | ".join(_next(est, m) for m in segment.matrices),
        path=path,
        guess=guess,
        positions=_positions(site),
    )


def _next(est: Estimation, matrix: Matrix) -> str:
    def weight(key: str) -> str:
        kind, _, position = key.partition(" ")
        if kind == "param":
            return est.names[int(position)]
        shape = re.findall(r"\[.*?\]", key)[-1]
        return f"a frozen weight {shape}" if kind == "constant" else f"an expression of parameters {shape}"

    return f"{matrix.call.op} {', '.join(weight(key) for key in matrix.key.split(';'))}"


def _named(estimator: Any, site: Site, blocked: str | None) -> str:
    if site.by_parameter and estimator.per_example_parameters:
        return f"{estimator.name}: each example's parameters"
    if site.is_last:
        return f"{estimator.name}: isotropic ({blocked or 'last site'})"
    k = getattr(estimator, "k", None)
    note = estimator.note(site)
    name = estimator.name + (f" k={min(k, site.rank)}" if k is not None else "")
    return f"{name}: {note}" if note else name
