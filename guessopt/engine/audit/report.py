"""``AuditReport``: what an audit has measured, and what is wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from guessopt.errors import AuditError


@dataclass(frozen=True)
class CallCheck:
    """One call of the closure in the report's table.

    Attributes:
        expected: a random projection of the tangents of its outputs.
        measured: the same projection of the difference quotients of its outputs.
        occurrence: how many calls of this operation came before it.
    """

    index: int
    op: str
    occurrence: int
    shape: tuple[int, ...]
    expected: float
    measured: float
    ok: bool

    def __str__(self) -> str:
        mark = " " if self.ok else "*"
        where = f"{self.op} no. {self.occurrence} {list(self.shape)}"
        return f"{mark} {self.index:5d}  {where:42s} {self.expected:12.5g} {self.measured:12.5g}"


@dataclass
class AuditReport:
    """The answer of ``guessopt.audit``.

    Attributes:
        expected: the derivative of the loss along the guesses by the tangents, ``sum_n D_n``.
        measured: difference quotients of the loss: relative size of the step -> quotient.
        tolerance: of the last quotient.
        skipped: why nothing was measured, or why the quotients decide nothing.
        calls: the table, if it was asked for or the audit failed.
        problem: what is wrong, in words; None if nothing is. ``ok`` is then True.

    >>> import torch, guessopt
    >>> _ = torch.manual_seed(0)
    >>> net, x = torch.nn.Linear(3, 1).double(), torch.randn(5, 3).double()
    >>> report = guessopt.audit(guessopt.GuessGradOptimizer(net.parameters()), lambda: net(x).square().mean())
    >>> report.ok, report.problem, report.skipped
    (True, None, ())
    >>> (step, quotient), = report.measured.items()
    >>> abs(quotient - report.expected) < report.tolerance
    True
    >>> print(report.calls[0])  # a call of the network: by tangents, by differences
          0  linear no. 0 [5, 1] ...
    """

    expected: float
    measured: dict[float, float] = field(default_factory=dict)
    tolerance: float = math.nan
    skipped: tuple[str, ...] = ()
    calls: tuple[CallCheck, ...] = ()
    problem: str | None = None

    @property
    def ok(self) -> bool:
        return self.problem is None

    def check(self) -> None:
        """Raise ``AuditError`` unless the audit has passed."""
        if self.problem is not None:
            raise AuditError(self.problem)

    def __str__(self) -> str:
        state = "FAILED" if self.problem else ("skipped" if self.skipped and not self.measured else "passed")
        lines = [f"audit {state}: derivative of the loss along the guesses {self.expected:.6g} by the tangents"]
        lines += [f"  {q:.6g} by differences of size {eps:.2g}" for eps, q in self.measured.items()]
        if self.measured:
            lines.append(f"  tolerance {self.tolerance:.2g}")
        lines += [f"  {note}" for note in self.skipped]
        if self.problem:
            lines.append(f"  {self.problem}")
        if self.calls:
            lines.append("   call  operation, occurrence, shape                   tangents  differences")
            lines += [f"  {call}" for call in self.calls]
        return "\n".join(lines)
