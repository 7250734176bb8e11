"""``JvpEngine``: the primitives of forward-mode AD behind one small interface.

A run of the closure asks its engine to attach a tangent to a site's output (``inject``), to run each operation with its
derivative (``call``), and to take the tangent off where the network ends (``cut``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from guessopt.engine.jvp.duals import carries_tangent, inner, pack, unpack
from guessopt.ops.base import op_of
from guessopt.ops.cached import CachedCall
from guessopt.record import Graphs
from guessopt.tracing.functions import AS_IT_IS

T = TypeVar("T")


class JvpEngine(ABC):
    """The derivatives of one run of the closure.

    Args:
        frozen_statistics: take batch normalisation's statistics for constants (biased, but examples stay apart).

    Attributes:
        tangents: the cuts' tangents, by the cut's number; complete once ``run`` has returned.
        notes: the tangents of the values that ``note`` was called with, by value; complete once ``run`` has returned.
        reverses: indices of the calls that run with a reverse graph.
        needs: values to keep, of those that the graph watches; None for all.
        graphs: the reverse graphs of a residual chain's blocks; None if they are not kept.
    """

    name: ClassVar[str]

    #: Whether ``reuse`` can take results that were computed before the closure made the call.
    reuses: ClassVar[bool] = False
    #: Whether an operation that returns its argument unchanged returns the same object.
    same_objects: ClassVar[bool] = True
    #: Whether the closure is handed wrapped tensors, which are of no use once ``run`` has returned.
    wraps: ClassVar[bool] = False
    #: Whether a step may use ``StackedEngine`` in place of this engine, to carry several guesses in one run.
    stacks: ClassVar[bool] = False
    #: Whether a step that makes no guess may use a run without tangents in place of this engine.
    rests: ClassVar[bool] = False

    reverses: frozenset[int] = frozenset()
    needs: frozenset[int] | None = None
    graphs: Graphs | None = None

    def __init__(self, *, frozen_statistics: bool = False) -> None:
        self.frozen_statistics = frozen_statistics
        self.tangents: dict[int, Tensor | None] = {}
        self.notes: dict[int, Tensor] = {}

    # --- what every engine defines ------------------------------------------------------------------------------------

    @abstractmethod
    def run(self, body: Callable[[], T]) -> T:
        """``body()`` with tangents alive."""

    @abstractmethod
    def primal(self, t: Tensor) -> Tensor:
        """``t`` without its tangent, an ordinary tensor."""

    @abstractmethod
    def plain(self, t: Tensor) -> Tensor:
        """``t`` without tangent, still connected in reverse mode."""

    @abstractmethod
    def inject(self, s: Tensor, y: Tensor, in_place: bool) -> Tensor:
        """``s`` with ``y`` added to its tangent. ``in_place``: the operation has written its result ``s`` into its
        argument, and the closure may hold that tensor."""

    @abstractmethod
    def substitute(self, p: Tensor, v: Tensor) -> Tensor:
        """Parameter ``p`` with tangent ``v``."""

    def cut(self, number: int, v: Tensor) -> tuple[Tensor, Tensor]:
        """End the network at ``v`` and note its tangent.

        Returns:
            The tensor that the loss reads in place of ``v``, and the leaf whose gradient is the exact error.
        """
        self.tangents[number] = self.tangent(v)
        leaf = self.primal(v).requires_grad_()
        return leaf, leaf

    # --- what some engines redefine -----------------------------------------------------------------------------------

    def tangent(self, t: Tensor) -> Tensor | None:
        """The tangent of ``t``, if the engine can tell before the run has ended."""
        return None

    def note(self, value: int, t: Tensor, clone: bool) -> Tensor:
        """Keep the tangent of ``t``, a state of the residual chain.

        Args:
            clone: whether a later call writes into ``t``.

        Returns:
            The tensor that the closure goes on with.
        """
        return t

    def mark(self, value: int, t: Tensor, clone: bool) -> Tensor:
        """Remember where ``t`` lies in a reverse graph, if the value is wanted. Arguments and result: see ``note``."""
        return t

    def outside(self) -> AbstractContextManager[Any]:
        """Within, ordinary tensors are computed with as if no run were under way."""
        return AS_IT_IS

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, writes: bool) -> Any:
        """Run one operation with its derivative.

        Args:
            writes: whether it writes into tensors that the closure did not make (buffers).

        Raises:
            NotImplementedError: forward mode has no derivative of it.
        """
        context = op_of(fn).context
        if context is not None:
            with context():
                return fn(*args, **kwargs)
        if self.frozen_statistics and fn is F.batch_norm:
            return F.batch_norm(*self.with_frozen_statistics(*args, **kwargs))
        return fn(*args, **kwargs)

    def without_tangent(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation of the loss, or on tensors without tangents."""
        return fn(*args, **kwargs)

    def write(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation without derivatives that writes into tensors which the closure has not made."""
        return fn(*args, **kwargs)

    def reuse(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], known: CachedCall) -> Any:
        """``call`` of an operation whose result is known; ``NotImplemented`` if it has to be made again."""
        return NotImplemented

    def each(self, f: Callable[[list[Any]], Tensor], tensors: Sequence[Any]) -> Tensor:
        """``f(tensors)``. An engine that carries K guesses calls ``f`` for each of them and returns ``[K, ...]``."""
        return f(list(tensors))

    # --- operations without a forward derivative ----------------------------------------------------------------------

    def through_backward(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that has a backward but no forward derivative.

        ``J^T u`` is linear in ``u``, so the backward of ``u -> J^T u`` along the tangents ``v`` gives ``J v``.

        Raises:
            RuntimeError: its backward cannot be differentiated.
        """
        if (out := self._by_own_rule(fn, args, kwargs)) is not NotImplemented:
            return out
        leaves, spec = tree_flatten((args, kwargs))
        pairs = [self.pair(t) if isinstance(t, Tensor) else (t, None) for t in leaves]
        moving = {k: tangent for k, (_, tangent) in enumerate(pairs) if tangent is not None}
        if not moving:
            return fn(*args, **kwargs)
        with self.outside(), torch.enable_grad():
            plain = [t.detach().requires_grad_() if k in moving else t for k, (t, _) in enumerate(pairs)]
            call_args, call_kwargs = tree_unflatten(plain, spec)
            results, shape = tree_flatten(fn(*call_args, **call_kwargs))
            outs = [t for t in results if isinstance(t, Tensor) and t.requires_grad]
            # J^T u at some u without zeros: linear in u, so that its own derivative must give it back.
            us = [_between_one_and_two(out).requires_grad_() for out in outs]
            pulled = torch.autograd.grad(outs, [plain[k] for k in moving], us, create_graph=True, allow_unused=True)
            known = [(p, v.to(p.dtype)) for p, v in zip(pulled, moving.values(), strict=True) if p is not None]
            jvs = torch.autograd.grad([p for p, _ in known], us, [v for _, v in known])
            pairs_of_us = zip(us, jvs, strict=True)
            there, back = (sum(float(inner(a, b).detach().sum()) for a, b in both) for both in (pairs_of_us, known))
            size = sum(float(inner(p, v).detach().abs().sum()) for p, v in known)
        if abs(there - back) > max(1e-3, *(16 * torch.finfo(out.dtype).eps for out in outs)) * size:
            raise RuntimeError("its backward hides part of what it computes")
        tangents = iter(jvs)
        duals = [
            pack(t.detach(), next(tangents).detach()) if isinstance(t, Tensor) and t.requires_grad else t
            for t in results
        ]
        return tree_unflatten(duals, shape)

    def pair(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Primal and tangent, ordinary tensors."""
        return unpack(t)

    def _by_own_rule(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """By this package's rule, for an operation to which torch gives no tangent."""
        op = op_of(fn)
        rule, duals = op.tangent, op.duals
        if rule is None or duals < 2 or len(args) < duals:
            return NotImplemented
        primals, tangents = zip(*(self.pair(t) for t in args[:duals]), strict=True)
        rest = tree_map_only(Tensor, self.plain, (args[duals:], kwargs))
        if carries_tangent(*rest):
            return NotImplemented
        with self.outside():
            result = rule(primals, tangents, *rest[0], **rest[1])
        return result if result is NotImplemented else pack(*result)

    # --- batch normalisation ------------------------------------------------------------------------------------------

    def with_frozen_statistics(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> tuple[Any, ...]:
        """Arguments for ``F.batch_norm`` with the batch's statistics as constants: a tangent passes through the scale
        alone, and examples stay apart. The running statistics are updated here."""
        if not training:
            return input, running_mean, running_var, weight, bias, False, momentum, eps
        x = self.primal(input)
        with self.outside():
            variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], unbiased=False)
            F.batch_norm(x, running_mean, running_var, None, None, True, momentum, eps)
        return input, mean, variance, weight, bias, False, momentum, eps


def _between_one_and_two(like: Tensor) -> Tensor:
    """Numbers from 1 to 2 in the shape of ``like``; of a complex tensor both parts."""
    n = like.numel()
    numbers = torch.linspace(1, 2, n, device=like.device)
    if like.is_complex():
        numbers = torch.complex(numbers, numbers.flip(0))
    return numbers.to(like).view(like.shape)
