"""What an operation that reads parameters must know about itself, and the registry of those that do.

A rule turns a site's cotangent into parameter gradients by that one operation's own transpose. A *matrix rule* also
knows its weight as a matrix, so that ``W~`` can be built from it.

Letters: b block (convolution group), o output row, i input column, r rows of a matrix used in place of W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from guessopt.layout import Shape
from guessopt.sites import Matrix

_RULES: dict[Callable[..., Any], Rule] = {}


#: Lays per-example parameters ``[N, *shape]`` out so that they broadcast against the operation's output.
FeedbackMap = Callable[[Tensor], Tensor]


class Rule:
    """How one operation turns a cotangent into gradients of its parameters. This base serves any operation.

    A complete new rule, for an operation with a weight that scales each channel:

    >>> def scale(x, w):
    ...     return torch.mul(x, w)
    >>> class ScaleRule(Rule):
    ...     def gradients(self, fn, args, kwargs, output, wanted, g):
    ...         x, w = args
    ...         return [(g * x).sum(0)]
    >>> ScaleRule().gradients(scale, (torch.ones(2, 3), torch.ones(3)), {}, 0, [1], torch.ones(2, 3))[0]
    tensor([2., 2., 2.])
    """

    #: Whether the operation is a linear layer or a convolution, with a weight that is a matrix.
    is_matrix: ClassVar[bool] = False
    #: Whether ``parameter_tangent`` is there.
    has_parameter_tangent: ClassVar[bool] = False

    def parameter_tangent(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        wanted: list[int],
        vs: list[Tensor],
        place: FeedbackMap,
    ) -> Tensor:
        """The output's tangent when each example's own copy of the parameters moves along ``vs``.

        Args:
            wanted: positions of the parameters, as for ``gradients``.
            vs: a direction for each, ``[N, *shape]`` (``[1, *shape]`` where examples are coupled).
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
            args, kwargs: as it was called, without tangents.
            output: which of its outputs ``g`` belongs to (0 for a single one).
            wanted: positions, among the tensor leaves of ``(args, kwargs)``, of the tensors to differentiate.
            g: the cotangent, shape of that output.
        """
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        positions = [tensors[k] for k in wanted]
        in_place = is_in_place(fn)

        with torch.enable_grad():
            variables = [leaves[p].detach().requires_grad_() for p in positions]
            filled = list(leaves)
            for p, v in zip(positions, variables, strict=True):
                filled[p] = v
            call_args, call_kwargs = tree_unflatten(filled, spec)
            if in_place:
                call_args = (call_args[0].clone(), *call_args[1:])
            out = without_side_effects(fn)(*call_args, **call_kwargs)
            out = pick_output(out if out is not None else call_args[0], output)
            if not out.requires_grad:  # it read the parameters, but does not depend on them
                return [None] * len(wanted)
            return list(torch.autograd.grad(out, variables, g.to(out.dtype), allow_unused=True))


#: Positions of the running statistics, which these operations move where their sixth argument is true.
_STATISTICS: dict[Callable[..., Any], tuple[int, int]] = {
    F.batch_norm: (1, 2), F.instance_norm: (1, 2), torch.batch_norm: (3, 4), torch.instance_norm: (3, 4),
}  # fmt: skip


def without_side_effects(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The operation without its side effect on running statistics."""
    if fn not in _STATISTICS:
        return fn
    places, names = _STATISTICS[fn], ("running_mean", "running_var")

    def run(*args: Any, **kwargs: Any) -> Any:
        if args[5] if len(args) > 5 else kwargs.get("training", kwargs.get("use_input_stats", fn is F.instance_norm)):
            args = tuple(None if k in places else a for k, a in enumerate(args))  # which it would not read
            kwargs = {k: None if k in names else a for k, a in kwargs.items()}
        return fn(*args, **kwargs)

    return run


def moves_statistics(fn: Callable[..., Any]) -> bool:
    """Whether an operation's only side effect is on running statistics."""
    return fn in _STATISTICS


class MatrixRule(Rule):
    """A rule whose operation is linear in its input through a weight: a linear layer or a convolution."""

    is_matrix = True

    def weight(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The weight among the arguments (a tensor, or its ``Value`` in a recorded call); None if not a matrix here."""
        raise NotImplementedError

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The activation among the arguments."""
        raise NotImplementedError

    def matrix(self, matrix: Matrix, weight: Tensor) -> Tensor:
        """The weight as ``[b, o, i]``."""
        raise NotImplementedError

    def cotangent_shape(self, matrix: Matrix, rows: Tensor, x_shape: Shape) -> Shape:
        """The shape of the output that ``rows`` ``[b, r, i]`` in place of W would give."""
        raise NotImplementedError

    def transpose(self, matrix: Matrix, rows: Tensor, e: Tensor, x_shape: Shape) -> Tensor:
        """``rows^T e``: a cotangent of the output (``cotangent_shape``) pulled back to the input, ``x_shape``."""
        raise NotImplementedError

    def apply(self, matrix: Matrix, rows: Tensor, x: Tensor) -> Tensor:
        """``rows x``: the operation itself with ``rows`` in place of W, without bias."""
        raise NotImplementedError

    def rank(self, matrix: Matrix) -> int:
        """An upper bound of the rank: the smaller side of the (stacked) weight."""
        raise NotImplementedError

    def geometry(self, call: Any) -> str:
        """Equal for calls whose weights may be stacked."""
        raise NotImplementedError


def register_rule(*functions: Callable[..., Any]) -> Callable[[type[Rule]], type[Rule]]:
    """Class decorator: let the rule serve these torch functions (as a function mode sees them).

    >>> @register_rule(torch.special.expit)
    ... class ExpitRule(Rule):
    ...     pass
    >>> type(rule_for(torch.special.expit)).__name__
    'ExpitRule'
    """

    def decorate(cls: type[Rule]) -> type[Rule]:
        rule = cls()
        for fn in functions:
            _RULES[fn] = rule
        return cls

    return decorate


_GENERIC = Rule()


def rule_for(fn: Callable[..., Any]) -> Rule:
    """The registered rule, else the generic one (local reverse mode through that one operation)."""
    try:
        return _RULES.get(fn, _GENERIC)
    except TypeError:  # unhashable callables
        return _GENERIC


_NUMBERS = (bool, int, float, complex, str)


@dataclass
class CachedCall:
    """What a pull-back has found of a call that the closure has yet to make.

    ``args`` and ``kwargs`` are the call's, ``versions`` those of their tensors (-1: writes into it do not show): the
    closure's own call must read the same memory, unwritten since. ``out``: its result (None: not known yet); ``more``:
    what the tangent rule can use besides.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]
    out: Any
    more: Any = None

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor | None, more: Any = None) -> CachedCall:
        versions: list[int] = []

        def plain(node: Any) -> Any:
            if isinstance(node, Tensor):
                plain_memory = type(node) in (Tensor, torch.nn.Parameter) and node.layout is torch.strided
                versions.append(node._version if plain_memory and not node.is_inference() else -1)
                return node.detach()
            return [plain(item) for item in node] if isinstance(node, (tuple, list)) else node

        args, kwargs = tuple(plain(a) for a in args), {k: plain(a) for k, a in kwargs.items()}
        return CachedCall(args, kwargs, versions, None if out is None else out.detach(), more)

    def matches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the call is made with the same numbers in the same memory."""
        versions = iter(self.versions)

        def same(known: Any, given: Any) -> bool:
            if isinstance(known, Tensor):
                version = next(versions)
                if not isinstance(given, Tensor) or version < 0 or given.is_inference():
                    return False
                if not known.numel():
                    return known.shape == given.shape and known.dtype is given.dtype
                return given._version == version and known.is_set_to(given)
            if isinstance(known, list):
                listed = isinstance(given, (tuple, list)) and len(given) == len(known)
                return listed and all(map(same, known, given))
            return known is given or (type(known) is type(given) and type(known) in _NUMBERS and known == given)

        return (
            len(args) == len(self.args)
            and kwargs.keys() == self.kwargs.keys()
            and all(map(same, self.args, args))
            and all(same(known, kwargs[name]) for name, known in self.kwargs.items())
        )


#: A tangent rule and how many leading arguments may carry tangents.
TangentRule = Callable[..., Any]
_TANGENTS: dict[Callable[..., Any], tuple[TangentRule, int]] = {}

#: Operations whose tangent rule takes ``known``: from the result of a run of the operation, what to keep of it besides.
REUSED: dict[Callable[..., Any], Callable[[Tensor], Any]] = {}


def no_more(out: Tensor) -> None:
    """Nothing but the result itself."""


def register_tangent(
    *functions: Callable[..., Any], duals: int = 1, known: Callable[[Tensor], Any] | None = None
) -> Callable[[TangentRule], TangentRule]:
    """Decorator: a closed-form tangent ``rule(x, dx, *rest, **kwargs) -> (out, dout)`` for these torch functions.

    ``dx`` is never None; nothing in ``rest`` and ``kwargs`` carries a tangent. A rule may return ``NotImplemented``:
    torch's own serves then. With ``duals=3``, say, it is ``rule((q, k, v), (dq, dk, dv), *rest, **kwargs)``, some (not
    all) of the tangents None; a number among the first arguments (``x * 2``) comes with None as well.

    ``known``: the rule takes a keyword of that name, a ``CachedCall`` with the operation's result (or None): what a
    guess's pull-back has computed already. The function given here finds ``CachedCall.more`` from the result of such
    a run.

    >>> @register_tangent(torch.special.exp2)
    ... def exp2(x, dx):
    ...     out = torch.special.exp2(x)
    ...     return out, out * dx * 0.6931471805599453
    >>> tangent_for(torch.special.exp2)[1]
    1
    """

    def decorate(rule: TangentRule) -> TangentRule:
        for fn in functions:
            _TANGENTS[fn] = (rule, duals)
            if known is not None:
                REUSED[fn] = known
        return rule

    return decorate


def tangent_for(fn: Callable[..., Any]) -> tuple[TangentRule, int] | None:
    """The registered tangent rule, if there is one."""
    try:
        return _TANGENTS.get(fn)
    except TypeError:  # unhashable callables
        return None


#: What stands in for an operation where a segment is pulled back or pushed forward: faster, or differentiable twice.
PULLED_BACK: dict[Callable[..., Any], Callable[..., Any]] = {}


def is_in_place(fn: Callable[..., Any]) -> bool:
    """Whether a torch function writes its first argument (``add_``, ``__iadd__``, ``x[i] = y``)."""
    name = getattr(fn, "__name__", "")
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or (name.startswith("__i") and name not in _NOT_IN_PLACE)
    return name.endswith("_")


_NOT_IN_PLACE = ("__invert__", "__int__", "__index__")


def pick_output(out: Any, output: int) -> Tensor:
    """The ``output``-th tensor of what an operation returned."""
    tensor = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)][output]
    return tensor


def push(run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], vs: Sequence[Tensor]) -> list[Tensor]:
    """``J v`` by reverse mode twice (``J^T u`` is linear in u), since forward mode may be under way
    and does not nest."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused kernels cannot be differentiated twice
        variables = [t.detach().requires_grad_() for t in inputs]
        outs = run(*variables)
        us = [torch.zeros_like(out, requires_grad=True) for out in outs]
        pulled = torch.autograd.grad(outs, variables, us, create_graph=True, allow_unused=True)
        through = [(p, v) for p, v in zip(pulled, vs, strict=True) if p is not None and p.requires_grad]
        if not through:
            return [torch.zeros_like(u) for u in us]
        found = torch.autograd.grad([p for p, _ in through], us, [v.to(p.dtype) for p, v in through], allow_unused=True)
    return [torch.zeros_like(u) if jv is None else jv for u, jv in zip(us, found, strict=True)]


def pull_back_by_vjp(fn: Callable[[Tensor], Tensor], x: Tensor, e: Tensor) -> Tensor:
    """``J^T e`` of one operation at ``x``."""
    return vjp(fn, x)[1](e)[0]
