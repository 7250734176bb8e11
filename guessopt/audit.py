"""``audit``: does the loss move as its tangents say?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from guessopt.engine.audit.report import AuditReport
from guessopt.optimizer import GuessGradOptimizer
from guessopt.step.modes import audited


def audit(opt: GuessGradOptimizer, closure: Callable[[], Any]) -> AuditReport:
    """Compare the derivative of the loss along the guesses, which forward AD finds, with differences of the loss.

    The closure runs as in the next step. Then it runs a few times without derivatives, with the guesses added to its
    values. Afterwards everything is as before. ``print(report)`` shows both numbers and a table of the network's calls;
    ``report.ok`` is False if the numbers disagree. ``docs/audit.md`` explains the method and its limits.

    Args:
        opt: the optimizer.
        closure: computes the loss, as for ``opt.step``.

    Raises:
        ClosureError: no gradient can be estimated at all.

    >>> import torch, guessopt
    >>> _ = torch.manual_seed(0)
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)), torch.randn(5, 3)
    >>> opt = guessopt.GuessGradOptimizer(model.parameters())
    >>> guessopt.audit(opt, lambda: model(x).square().mean()).ok
    True
    """
    return audited(opt.estimation, closure)
