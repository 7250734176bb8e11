"""One record per operation: an ``Op`` holds all that guessopt knows about it, and ``op_of`` finds the record.

Each file of this package declares the records of one family, complete, with ``register``. The rest of guessopt reads
records and knows no operation by name. An operation without a record works too: torch's own derivatives serve it.

The parts of a record, and who reads them:

=================================  ====================================================================================
``tangent``, ``duals``, ``reuse``  ``engine="fast"``, and K guesses in one pass
``stacked_tangent``                K guesses in one pass
``backward_only``, ``context``     all engines
``rule``                           gradients of the parameters; ``W~`` where the rule is a ``MatrixRule``
``entries``, ``pull_back``         the derivative ``M = phi'(s)`` of a path from one matrix site to the next
``in_reverse``                     pulling a segment back, or pushing it forward
``draws``                          repeating a call with the random numbers that it has drawn
=================================  ====================================================================================
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from guessopt.sites import label
from guessopt.tree import results_of

#: A function as a torch function mode sees it; or the name of a ``torch.autograd.Function``.
Function = Callable[..., Any] | str

#: ``rule(x, dx, *rest, **kwargs) -> (out, dout)``, or ``NotImplemented``: see ``Op.tangent``.
TangentRule = Callable[..., Any]

#: Lays per-example parameters ``[N, *shape]`` out so that they broadcast against the operation's output.
Placement = Callable[[Tensor], Tensor]

#: By argument, a function that computes the argument's gradient.
Formulas = dict[str, Callable[[], Tensor]]


class Rule:
    """How one operation turns a cotangent into gradients of its parameters.

    This base serves every operation: reverse mode through that operation alone. A rule for one operation overrides
    ``gradients``, or is a ``NamedRule``.

    >>> class ScaleRule(Rule):
    ...     def gradients(self, fn, args, kwargs, output, wanted, g):
    ...         x, w = args
    ...         return [(g * x).sum(0)]
    >>> args, g = (torch.ones(2, 3), torch.ones(3)), torch.ones(2, 3)
    >>> ScaleRule().gradients(torch.mul, args, {}, 0, [1], g)
    [tensor([2., 2., 2.])]
    >>> Rule().gradients(torch.mul, args, {}, 0, [1], g)
    [tensor([2., 2., 2.])]
    """

    #: Whether the weight lies along dimension 1 of the output, whatever follows dimension 1.
    channels_second: bool = False

    @property
    def has_parameter_tangent(self) -> bool:
        """Whether the rule defines ``parameter_tangent``."""
        return type(self).parameter_tangent is not Rule.parameter_tangent

    def parameter_tangent(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        wanted: list[int],
        vs: list[Tensor],
        place: Placement,
    ) -> Tensor:
        """The output's tangent when each example's own copy of the parameters moves along ``vs``.

        Args:
            fn, args, kwargs, wanted: see ``gradients``.
            vs: a direction for each parameter, ``[N, *shape]`` (``[1, *shape]`` where examples are coupled).
            place: lays such a direction out against the output.
        """
        raise NotImplementedError

    def gradients(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: int,
        wanted: list[int],
        g: Tensor,
    ) -> list[Tensor | None]:
        """Gradients of ``<output, g>`` with respect to some of the operation's tensors.

        Args:
            fn: the operation.
            args, kwargs: its arguments, without tangents.
            output: position, among the tensors that it returns, of the tensor that ``g`` belongs to.
            wanted: positions, among the tensor leaves of ``(args, kwargs)``, of the tensors to differentiate.
            g: the cotangent, shape of that output.

        Returns:
            A gradient per entry of ``wanted``, shape of the tensor; None where the output does not depend on it.
        """
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        positions = [tensors[k] for k in wanted]

        with torch.enable_grad():
            variables = [leaves[p].detach().requires_grad_() for p in positions]
            filled = list(leaves)
            for p, v in zip(positions, variables, strict=True):
                filled[p] = v
            call_args, call_kwargs = tree_unflatten(filled, spec)
            if is_in_place(fn):
                call_args = (call_args[0].clone(), *call_args[1:])
            out = results_of(without_side_effects(fn)(*call_args, **call_kwargs), list(call_args[:1]))[output]
            if not out.requires_grad:  # it read the parameters, but does not depend on them
                return [None] * len(wanted)
            return list(torch.autograd.grad(out, variables, g.to(out.dtype), allow_unused=True))


class NamedRule(Rule):
    """A rule with a formula per argument. Where a formula is missing, reverse mode serves the whole call."""

    #: The names of the operation's arguments, in order.
    names: tuple[str, ...] = ()

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, without defaults."""
        return dict(zip(self.names, args, strict=False)) | kwargs

    def formulas(self, call: dict[str, Any], g: Tensor) -> Formulas:
        """By argument, a function that computes its gradient; empty where the formulas do not hold for this call.

        Args:
            call: the arguments by name.
            g: the cotangent, shape of the output.
        """
        return {}

    def gradients(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: int,
        wanted: list[int],
        g: Tensor,
    ) -> list[Tensor | None]:
        call = self.bind(args, kwargs)
        formulas = self.formulas(call, g)
        tensors = [name for name, value in call.items() if isinstance(value, Tensor)]
        if not formulas or any(tensors[k] not in formulas for k in wanted):
            return super().gradients(fn, args, kwargs, output, wanted, g)
        return [formulas[tensors[k]]() for k in wanted]


class Entries(enum.Enum):
    """How an operation with one tensor among its arguments treats the entries of that tensor."""

    OTHER = "nothing is known"
    UNARY = "a function of each entry"
    WITH_NUMBER = "a function of each entry and of a number, the other operand"
    DROPOUT = "each entry times a random factor; the mean is the entry itself"
    IDENTITY = "each entry as it is"


@dataclass(frozen=True, eq=False)
class Op:
    """All that guessopt knows about one operation. What is left out is served by torch.

    Attributes:
        functions: the operation's spellings.
        tangent: ``tangent(x, dx, *rest, **kwargs) -> (out, dout)``. Shapes and dtypes of ``dx`` and ``dout`` are those
            of ``x`` and ``out``. Nothing in ``rest`` and ``kwargs`` carries a tangent. ``dout`` shares no memory with
            another tensor. The function may return ``NotImplemented``; then torch's own tangent serves.
        duals: how many leading arguments may carry tangents. With ``duals=3``, say, the call is
            ``tangent((q, k, v), (dq, dk, dv), *rest, **kwargs)``; some of the tangents may be None, not all. A number
            among the first arguments (``x * 2``) has the tangent None.
        reuse: given where ``tangent`` can use the result of an earlier run of the call. ``tangent`` then takes a
            keyword ``known``: a ``CachedCall``, or None. ``reuse(out)`` finds ``CachedCall.more`` in the result of a
            run whose reverse graph is alive; ``result_only`` finds nothing.
        stacked_tangent: like ``tangent``, for K tangents at once: ``dx`` and ``dout`` are ``[K, *shape]``.
        backward_only: ``backward_only(args, kwargs)``: whether torch's forward derivative of this call differs from its
            backward. The tangent then comes from the backward.
        context: makes the context in which torch has a forward derivative of the operation.
        treatment: a sentence about ``context`` for ``preflight``, to follow the operation's name.
        fuses: whether the operation runs outside of ``context`` where no tangent passes and nothing is drawn.
        rule: gradients of the parameters.
        in_reverse: replaces the operation where a segment is pulled back or pushed forward: for a backward that is
            slow, or cannot be differentiated.
        without_statistics: replaces an operation whose only side effect is on running statistics, and has none.
        draws: ``draws(args, kwargs)``: whether this call draws random numbers. None: ``rng.draws`` knows.
        masks_by_shape: whether the operation fills a random mask in the order of the input's dimensions inside of
            ``torch.func``, and in the order of the input's memory outside.
        entries: see ``Entries``.
        pull_back: ``pull_back(u, s, spent, **kwargs) -> phi'(s) u`` in one kernel; ``kwargs`` are those of the call.
            ``u`` is ``[..., *s.shape]``. ``spent``: the result may take the memory of ``u``.
        rectifier: whether the operation is a ReLU: ``phi'(s)`` is 0 or 1, and its output tells which.
        keeps_derivative: whether ``phi'(s)`` takes longer than a product with it, so that it is worth keeping.
        is_addition: whether the operation is ``a + b``.
        is_loss: whether the operation is a loss with the network's last layer in it. The parameters that it reads get
            their exact gradient from the loss's own reverse pass.

    Raises:
        ValueError: the parts contradict each other.
    """

    functions: tuple[Function, ...]
    tangent: TangentRule | None = None
    duals: int = 1
    reuse: Callable[[Tensor], Any] | None = None
    stacked_tangent: TangentRule | None = None
    backward_only: Callable[[tuple[Any, ...], dict[str, Any]], bool] | None = None
    context: Callable[[], AbstractContextManager[Any]] | None = None
    treatment: str = ""
    fuses: bool = False
    rule: Rule = Rule()  # noqa: RUF009 (it has no state)
    in_reverse: Callable[..., Any] | None = None
    without_statistics: Callable[..., Any] | None = None
    draws: Callable[[tuple[Any, ...], dict[str, Any]], bool] | None = None
    masks_by_shape: bool = False
    entries: Entries = Entries.OTHER
    pull_back: Callable[..., Tensor] | None = None
    rectifier: bool = False
    keeps_derivative: bool = False
    is_addition: bool = False
    is_loss: bool = False

    def __post_init__(self) -> None:
        takes_known = self.tangent is not None and "known" in inspect.signature(self.tangent).parameters
        wrong = {
            "duals, reuse and stacked_tangent describe a tangent, and tangent is missing": self.tangent is None
            and (self.duals != 1 or self.reuse is not None or self.stacked_tangent is not None),
            "reuse and a tangent with the keyword known need each other": takes_known is (self.reuse is None),
            "context and treatment need each other": (self.context is None) is bool(self.treatment),
            "fuses is about a context, and context is missing": self.fuses and self.context is None,
            "pull_back needs Entries.UNARY": self.pull_back is not None and self.entries is not Entries.UNARY,
            "rectifier and keeps_derivative need pull_back": self.pull_back is None
            and (self.rectifier or self.keeps_derivative),
            "Entries.DROPOUT needs draws": self.entries is Entries.DROPOUT and self.draws is None,
            "rule is an instance, not a class": not isinstance(self.rule, Rule),
            "functions are callables, or names": not all(callable(fn) or isinstance(fn, str) for fn in self.functions),
        }
        for why, holds in wrong.items():
            if holds:
                raise ValueError(f"Op of {self.name}: {why}")

    @property
    def name(self) -> str:
        """The first spelling, for messages."""
        first = self.functions[0] if self.functions else "no function"
        return label(first)


#: The records by function.
OPS: dict[Function, Op] = {}

#: The record of every function that has none of its own.
UNKNOWN = Op(functions=())


def op_of(fn: Function) -> Op:
    """The record of a function; ``UNKNOWN`` where there is none.

    >>> import torch
    >>> op_of(torch.relu).rectifier, op_of(torch.cumsum) is UNKNOWN
    (True, True)
    """
    try:
        return OPS.get(fn, UNKNOWN)
    except TypeError:  # unhashable callables
        return UNKNOWN


def register(op: Op) -> Op:
    """Let ``op_of`` find the record under each of its functions.

    Raises:
        ValueError: the record names no function, or a function has a record already.
    """
    if not op.functions:
        raise ValueError("Op: functions is empty")
    for fn in op.functions:
        if fn in OPS:
            raise ValueError(f"Op of {op.name}: {getattr(fn, '__qualname__', fn)} is in the Op of {OPS[fn].name}")
    OPS.update(dict.fromkeys(op.functions, op))
    return op


def register_rule(*functions: Callable[..., Any]) -> Callable[[type[Rule]], type[Rule]]:
    """Class decorator: the rule serves these torch functions (as a function mode sees them).

    A function that has an ``Op`` keeps the other parts of it; any other function gets an ``Op`` with the rule alone.

    >>> def my_operation(x, w):
    ...     return x * w
    >>> @register_rule(my_operation)
    ... class MyRule(Rule):
    ...     pass
    >>> type(op_of(my_operation).rule).__name__
    'MyRule'
    """

    def decorate(cls: type[Rule]) -> type[Rule]:
        rule = cls()
        for fn in functions:
            OPS[fn] = replace(op_of(fn), functions=(fn,), rule=rule)
        return cls

    return decorate


def without_side_effects(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The operation without its side effect on running statistics."""
    return op_of(fn).without_statistics or fn


def moves_statistics(fn: Callable[..., Any]) -> bool:
    """Whether the operation's only side effect is on running statistics."""
    return op_of(fn).without_statistics is not None


def is_in_place(fn: Callable[..., Any]) -> bool:
    """Whether a torch function writes its first argument (``add_``, ``__iadd__``, ``x[i] = y``): torch's names tell."""
    name = getattr(fn, "__name__", "")
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or (name.startswith("__i") and name not in _NOT_IN_PLACE)
    return name.endswith("_")


_NOT_IN_PLACE = ("__invert__", "__int__", "__index__")


def always(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """``Op.backward_only`` of an operation that needs it at every call."""
    return True
