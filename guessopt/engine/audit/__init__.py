"""Does the loss move as the tangents say?

Forward AD can lose a tangent without a word: through an operation that drops it, a write through an alias, a graph that
no longer fits the closure. One number catches each such loss. The run in forward mode found ``D = sum_n D_n`` with the
guesses ``y_i`` as tangents. Plain runs of the closure with the guesses added to the *values*, ``s_i + eps y_i``, must
give

    (L(eps) - L(-eps)) / (2 eps) = D.

``L`` is the loss that the closure returns, so the graph's cuts are tested as well. A call that reads a trainable
parameter but has no site in the graph is moved too: the graph says that the loss does not depend on it.

Tangents of legitimate code differ from difference quotients at some calls. A first run, with ``eps = 0``, remembers
those of them whose inputs move. The runs with ``eps`` then use:

| calls | in the runs with ``eps`` |
|---|---|
| ``detach``, ``.data``, under ``no_grad`` | the first run's result |
| the same, writing into a tensor that moves | the change that the first run made is added, as in autograd |
| integers, booleans, Python numbers (``argmax``, ``h > 0``, ``item``) | the first run's result |
| kinks and jumps, of which a tangent knows one side (``KINKED``) | the linear approximation at the first run's inputs |
| draws that depend on their inputs (``bernoulli(p)``, ``rrelu``) | the linear approximation at the first run's inputs |
| ``autograd.Function``, other libraries' operations, tensor subclasses | the same, by their own derivative |
| dropout and other draws | nothing special: the random states are the same in every run |

Two kinds of closures cannot be audited, and the report says so. The first kind writes through an alias made by
``detach`` or under ``no_grad``. The second has ``batch_norm="frozen_statistics"``, whose tangents leave out a part of
the derivative by design.
"""

from guessopt.engine.audit.report import AuditReport
from guessopt.engine.audit.verdict import Audit

__all__ = ["Audit", "AuditReport"]
