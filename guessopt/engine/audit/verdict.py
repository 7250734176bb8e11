"""``Audit``: difference quotients of the loss against ``D``, at several step sizes, and the verdict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guessopt.engine.audit.memo import Memo, NotAuditable
from guessopt.engine.audit.report import AuditReport, CallCheck
from guessopt.engine.audit.tangents import NudgedEngine, TangentRun
from guessopt.engine.audit.values import ValueRun
from guessopt.engine.forward import ForwardRun, GuessAt
from guessopt.engine.jvp.fast import FastEngine
from guessopt.engine.transaction import Transaction
from guessopt.graph import SiteGraph
from guessopt.linalg import wide
from guessopt.record import ForwardRecord
from guessopt.sites import Site

#: By the bits of the lowest precision: the first step, as a part of the values' sizes, and the factor to a smaller one.
_FIRST = {64: (1e-3, 0.1), 32: (1e-2, 0.25), 16: (1e-1, 0.5)}
#: By the same: the relative difference between tangents and quotients that is accepted.
_RELATIVE = {64: 1e-4, 32: 3e-3, 16: 2e-1}
#: Steps that are tried.
_MAX_STEPS = 4
_EPS = {64: torch.finfo(torch.float64).eps, 32: torch.finfo(torch.float32).eps, 16: torch.finfo(torch.bfloat16).eps}

#: Starts the run's guesses again: returns its guess function for the sites, and its guesses for parameters.
Guesses = Callable[[], "tuple[GuessAt, Mapping[int, Tensor]]"]


class _Quotient(NamedTuple):
    """A difference quotient ``q``, its distance ``off`` from ``expected``, the tolerance, and the step."""

    q: float
    off: float
    tolerance: float
    eps: float


@dataclass
class Audit:
    """One audit: plain runs of ``closure`` along ``graph``.

    Args:
        guesses: called before every run.
        record: of the run in forward mode. If it has several guesses, the first is tested.
        light: keep as little as possible. Each run then makes the guesses again, which must not depend on the network's
            values. A rectifier's kinks count as curvature.
        rtol: relative difference of the loss that other kernels may cause.
    """

    closure: Callable[[], Any]
    graph: SiteGraph
    guesses: Guesses
    ids: Mapping[int, int]
    params: Mapping[int, Tensor]
    transaction: Transaction
    record: ForwardRecord
    rtol: float = 0.0
    light: bool = False
    memo: Memo = field(init=False)
    #: By site, the guesses of the first run. Later runs use them again: from moved values other guesses would come.
    made: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.memo = Memo(light=self.light)
        if self.light:  # the record is the audit's own: let go of its large tensors
            _ = self.slack
            self.record.errors, self.record.tangents = [], []

    @cached_property
    def expected(self) -> float:
        d = self.record.d
        return float((d[0] if d.dim() == 2 else d).double().sum())

    @cached_property
    def slack(self) -> float:
        """The rounding error of ``expected``, a sum of products of tangents that many calls have rounded."""
        several, bulk = self.record.d.dim() == 2, 0.0
        for e, t in zip(self.record.errors, self.record.tangents, strict=True):
            if t is not None:
                bulk += float((wide(e) * wide(t[0] if several else t)).abs().sum(dtype=torch.float64))
        return 32 * bulk * max((torch.finfo(site.dtype).eps for site in self.graph.sites), default=0.0)

    def report(self, *, calls: bool = False) -> AuditReport:
        """Run the audit. Afterwards everything that the closure writes is as before the first run.

        Args:
            calls: whether the report shows the table of calls also if nothing is wrong.
        """
        report = AuditReport(self.expected)
        try:
            differs = self._measure(report)
            if differs and self._is_rounding(report):
                differs, report.skipped = False, ("rounding decides on the derivative itself",)
            if calls or differs or report.problem is not None:
                report.calls = self._table()
        except NotAuditable as why:
            return AuditReport(self.expected, skipped=(f"not auditable: {why}",))
        finally:
            self.transaction.rewind()
        if differs:
            report.problem = _problem(report)
        return report

    # --- runs ---------------------------------------------------------------------------------------------------------

    def _at(self, relative: float) -> float:
        """The loss at a step, given as a part of the values' sizes."""
        return self._run(relative).loss_of(self.closure, self.params)

    def _run(self, relative: float) -> ValueRun:
        self.transaction.rewind()
        guess, directions = self.guesses()

        def same(site: Site, s: Tensor, values: dict[int, Tensor]) -> Any:
            if relative == 0.0 or site.index not in self.made:
                self.made[site.index] = guess(site, s, values)
            return self.made[site.index]

        used = guess if self.light else same
        return ValueRun(self.ids, self.graph, used, directions, self.transaction, self.memo, relative)

    # --- difference quotients -----------------------------------------------------------------------------------------

    def _measure(self, report: AuditReport) -> bool:
        """Fill the report; return whether the quotients differ from ``expected``."""
        base, loss = self._at(0.0), float(self.record.loss)
        if not self.memo.moved:
            report.skipped = ("no guess was made",)
            return False
        if math.isclose(base, loss, rel_tol=max(1e-3, 4 * self.rtol), abs_tol=1e-5):
            return self._differs(base, report)
        if self._at(0.0) == base and abs(base - loss) <= 100 * self._rounding(base):
            report.skipped = ("rounding alone moves the loss",)
            return False
        report.problem = (
            f"the closure does not repeat: a run from the same random state gave the loss {base:.6g} in place of "
            f"{loss:.6g}; take the batch before the step, not from an iterator in the closure, and draw noise from a "
            "generator of torch, numpy or random. audit=False goes on without this check"
        )
        return False

    def _differs(self, base: float, report: AuditReport) -> bool:
        """Quotients at up to ``_MAX_STEPS`` steps. They differ from ``expected`` if two steps agree with each other and
        both disagree with ``expected``."""
        bits, noise, last = self.memo.bits, 0.0, None
        relative, factor = _FIRST[bits]
        for _ in range(_MAX_STEPS):
            eps = relative * self.memo.scale
            ahead, behind = self._at(relative), self._at(-relative)
            # A kink's one-sided derivatives are q - kink and q + kink; of a smooth loss, kink shrinks with eps.
            q, kink = (ahead - behind) / (2 * eps), abs(ahead - 2 * base + behind) / (2 * eps)
            report.measured[relative] = q
            off, most = abs(q - self.expected), max(abs(q), abs(self.expected))
            rounding = max(2 * self._loss_eps * abs(base), 6 * noise) / eps
            report.tolerance = _RELATIVE[bits] * most + self.slack + rounding
            # A step that should change the loss by much of its own size says nothing of a derivative.
            small = abs(self.expected) * eps <= 0.1 * max(abs(base), 1.0)
            if off == 0 or (off <= report.tolerance and rounding <= 0.1 * most):
                return False
            if last is not None:
                noise = noise or self._rounding(base)
                rounding, drift = max(rounding, 6 * noise / eps), abs(q - last.q)
                report.tolerance = _RELATIVE[bits] * most + self.slack + rounding + kink + 3 * drift
                if off <= report.tolerance <= 0.5 * most:
                    return False
                converged = drift <= 0.1 * max(abs(q), abs(last.q)) + rounding
                disagreed = last.off > last.tolerance + 6 * noise / last.eps
                if small and converged and disagreed and off > report.tolerance:
                    return True
            last = _Quotient(q, off, report.tolerance, eps)
            relative = relative * factor if kink >= rounding or not small else relative / factor
            if relative in report.measured or not math.isfinite(q):
                break
        report.skipped = ("no certainty: rounding, or a loss that is not smooth",)
        return False

    def _is_rounding(self, report: AuditReport) -> bool:
        """Whether ``expected`` itself moves as sites' outputs move by a few units in the last place (a standard
        deviation of equal numbers, the normalisation of what has cancelled)."""
        off = abs(list(report.measured.values())[-1] - self.expected)

        def apart(units: int) -> float:
            self.transaction.rewind()
            guess, directions = self.guesses()
            run = ForwardRun(
                self.ids, self.graph, NudgedEngine(units), guess, directions, self.transaction, keeps=False
            )
            return abs(float(run.execute(self.closure, self.params).d.double().sum()) - self.expected)

        if not abs(apart(0) - apart(0)) <= 1e-6 * off:
            return False  # the closure does not repeat
        return not all(apart(units) <= 0.1 * off for units in (8, -8))

    def _rounding(self, base: float) -> float:
        """How far the loss jumps by rounding: from runs that are moved by a few units in the last place."""
        eps = _EPS[self.memo.bits]
        tiny = [self._at(sign * k * eps) for k in (2, 3) for sign in (1, -1)]
        return max(*(abs(loss - base) for loss in tiny), 4 * self._loss_eps * abs(base))

    @property
    def _loss_eps(self) -> float:
        return _EPS[64] if self.memo.bits == 64 else _EPS[32]

    # --- the table of calls -------------------------------------------------------------------------------------------

    def _table(self) -> tuple[CallCheck, ...]:
        """Every call's tangents against difference quotients."""
        first, factor = _FIRST[self.memo.bits]
        relative = first * factor
        plus, minus = self._digests(relative), self._digests(-relative)
        self.transaction.rewind()
        guess, directions = self.guesses()
        run = TangentRun(self.ids, self.graph, FastEngine(), guess, directions, self.transaction, keeps=False)
        run.execute(self.closure, self.params)
        checks, seen = [], Counter[str]()
        for index, tangents in run.digests.items():
            op, shape = run.labels[index]
            occurrence, seen[op] = seen[op], seen[op] + 1
            worst = self._worst(relative, plus.get(index, ()), minus.get(index, ()), tangents)
            checks.append(CallCheck(index, op, occurrence, shape, worst[0], worst[1], worst[2] <= 0))
        return tuple(checks)

    def _digests(self, relative: float) -> dict[int, list[Tensor]]:
        """Digests of every call's outputs at a step."""
        run = self._run(relative)
        run.digests = {}
        run.loss_of(self.closure, self.params)
        return run.digests

    def _worst(
        self, relative: float, plus: Sequence[Tensor], minus: Sequence[Tensor], tangents: Sequence[Tensor | None]
    ) -> tuple[float, float, float]:
        """Of one call's digests: the tangent, the quotient, and by how much they differ beyond the tolerance."""
        eps = relative * self.memo.scale
        tolerance, ulp = 5 * _RELATIVE[self.memo.bits], _EPS[self.memo.bits]
        worst: tuple[float, float, float] = 0.0, 0.0, -math.inf
        for a, b, t in zip(plus, minus, tangents, strict=False):
            q = (a - b) / (2 * eps)
            t = torch.zeros_like(q) if t is None else t
            size = float(torch.maximum(q.abs(), t.abs()).max())
            excess = (q - t).abs() - tolerance * size - 16 * ulp * float(a.abs().max() + 1e-300) / eps
            k = int(excess.argmax())
            worst = max(worst, (float(t[k]), float(q[k]), float(excess[k])), key=lambda w: w[2])
        return worst


def _problem(report: AuditReport) -> str:
    """The error's message."""
    q = list(report.measured.values())[-1]
    first = next((call for call in report.calls if not call.ok), None)
    numbers = (
        f"the loss does not move as its tangents say: along the guesses its derivative is {report.expected:.6g} by "
        f"the tangents and {q:.6g} by differences (tolerance {report.tolerance:.2g})"
    )
    if first is None:
        where = (
            "every call up to the loss agrees, so the loss reads another value than the plan says, or writes into a "
            "value that is read later"
        )
    else:
        where = (
            f"the first call that departs is {first.op} (occurrence {first.occurrence} of this operation, its output "
            f"of shape {list(first.shape)}): {first.expected:.6g} by tangents, {first.measured:.6g} by differences"
        )
    return (
        f"{numbers}; {where}. Report this, or write the operation as a torch.autograd.Function with a jvp; audit=False "
        "goes on, perhaps with wrong gradients"
    )
