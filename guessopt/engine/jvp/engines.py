"""Where tangents live: the primitives of forward-mode AD behind one small interface.

``FuncEngine`` is the reference, ``torch.func.jvp`` with ``s + t y`` (t a scalar with primal 0 and tangent 1).
``DualEngine`` attaches tangents to tensors directly (``torch.autograd.forward_ad``): the same numbers, less arithmetic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, TypeVar

import torch
import torch.autograd.forward_ad as fw
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._ops import OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from guessopt.chains import ResidualChain
from guessopt.layout import is_differentiable
from guessopt.ops.attention import drops_out
from guessopt.ops.base import CachedCall, tangent_for, without_side_effects
from guessopt.ops.drawing import RECURRENT
from guessopt.record import GraphInput, Graphs
from guessopt.tracing.functions import AS_IT_IS
from guessopt.tracing.writes import plain

T = TypeVar("T")


class JvpEngine(ABC):
    """One forward-mode pass. ``tangents`` holds those of the cuts, by number, and ``notes`` those of the values noted,
    once ``run`` has returned."""

    name: ClassVar[str]

    #: Whether ``reuse`` is there.
    reuses: ClassVar[bool] = False
    #: Whether a call that returns its argument untouched returns the same object.
    same_objects: ClassVar[bool] = True

    #: Whether the closure is handed tensors that are of no use once ``run`` has returned.
    wraps: ClassVar[bool] = False

    def __init__(self, *, frozen_statistics: bool = False) -> None:
        #: Take batch normalisation's statistics for constants (biased, but examples stay apart).
        self.frozen_statistics = frozen_statistics
        self.tangents: dict[int, Tensor | None] = {}
        self.notes: dict[int, Tensor] = {}

    @abstractmethod
    def run(self, body: Callable[[], T]) -> T:
        """``body()`` with tangents alive."""

    @abstractmethod
    def primal(self, t: Tensor) -> Tensor:
        """``t`` without its tangent, an ordinary tensor."""

    def tangent(self, t: Tensor) -> Tensor | None:
        """The tangent of ``t``, where the level can tell in the middle of a pass."""
        return None

    @abstractmethod
    def plain(self, t: Tensor) -> Tensor:
        """``t`` without tangent, still connected in reverse mode."""

    @abstractmethod
    def inject(self, s: Tensor, y: Tensor, in_place: bool) -> Tensor:
        """``s`` with ``y`` added to its tangent."""

    @abstractmethod
    def substitute(self, p: Tensor, v: Tensor) -> Tensor:
        """Parameter ``p`` with tangent ``v``."""

    @abstractmethod
    def cut(self, number: int, v: Tensor) -> tuple[Tensor, Tensor]:
        """End the network at ``v``: note its tangent. Returns the tensor that the loss reads in its place, and the leaf
        whose gradient is the exact error."""

    #: Calls that run with a reverse graph.
    reverses: frozenset[int] = frozenset()

    #: Values to keep aside, of those that the graph watches; None: all.
    needs: frozenset[int] | None = None

    #: The reverse graphs of a stream's blocks, where they are kept.
    graphs: Graphs | None = None

    def note(self, value: int, t: Tensor, clone: bool) -> Tensor:
        """Keep the tangent of ``t``, a state of the residual stream, if it has one; return what the closure goes on
        with. ``clone``: a later call writes into it."""
        return t

    def mark(self, value: int, t: Tensor, clone: bool) -> Tensor:
        """Remember where ``t`` lies in a reverse graph, if that is wanted of a value; return what the closure goes on
        with. ``clone``: as for ``note``."""
        return t

    def outside(self) -> AbstractContextManager[Any]:
        """Where ordinary tensors are worked on as if no pass were under way."""
        return AS_IT_IS

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, writes: bool) -> Any:
        """Run one operation; ``writes``: into tensors that the closure did not make (buffers)."""
        if fn in RECURRENT:  # oneDNN's fused recurrence has no forward derivative; the plain one has
            with _without_mkldnn():
                return fn(*args, **kwargs)
        if fn is F.scaled_dot_product_attention:  # only the plain formula has a forward derivative
            with sdpa_kernel(SDPBackend.MATH):
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
        """``call`` of an operation whose result is known; ``NotImplemented`` where it has to be made again."""
        return NotImplemented

    def through_backward(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that has no forward derivative but a backward: ``J^T u`` is linear in ``u``, so its own
        derivative along the tangents is ``J v``.

        Raises:
            RuntimeError: its backward cannot be differentiated.
        """
        if (out := self._by_own_rule(fn, args, kwargs)) is not NotImplemented:
            return out
        leaves, spec = tree_flatten((args, kwargs))
        pairs = [self._pair(t) if isinstance(t, Tensor) else (t, None) for t in leaves]
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
            _pack(t.detach(), next(tangents).detach()) if isinstance(t, Tensor) and t.requires_grad else t
            for t in results
        ]
        return tree_unflatten(duals, shape)

    def _pair(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Primal and tangent, ordinary tensors."""
        return _unpack(t)

    def _by_own_rule(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """By this package's rule, for an operation to which torch gives no tangent."""
        rule, duals = tangent_for(fn) or (None, 0)
        if rule is None or duals < 2 or len(args) < duals:
            return NotImplemented
        primals, tangents = zip(*(self._pair(t) for t in args[:duals]), strict=True)
        rest = tree_map_only(Tensor, self.plain, (args[duals:], kwargs))
        if _carries_tangent(*rest):
            return NotImplemented
        with self.outside():
            result = rule(primals, tangents, *rest[0], **rest[1])
        return result if result is NotImplemented else _pack(*result)

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
        """Arguments for ``F.batch_norm`` with the statistics taken for constants: a tangent passes through the scale
        alone, and examples stay apart."""
        if not training:
            return input, running_mean, running_var, weight, bias, False, momentum, eps
        x = self.primal(input)
        with self.outside():
            variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], unbiased=False)
            F.batch_norm(x, running_mean, running_var, None, None, True, momentum, eps)  # moves the running statistics
        return input, mean, variance, weight, bias, False, momentum, eps

    def each(self, f: Callable[[list[Any]], Tensor], tensors: Sequence[Any]) -> Tensor:
        """``f`` of these tensors; where several guesses are carried, ``[K, ...]`` each, of every guess's own."""
        return f(list(tensors))


class DualEngine(JvpEngine):
    """Tangents attached to tensors by ``make_dual``."""

    name = "dual"
    #: The last output of an own rule, whose tangent shares memory with nothing.
    _fresh: Tensor | None = None

    def run(self, body: Callable[[], T]) -> T:
        with fw.dual_level():
            return body()

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, writes: bool) -> Any:
        check_tangent(fn, args, kwargs)
        out = super().call(fn, args, kwargs, writes=writes)
        autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(_device_type(args))
        return _same_dtype(out) if autocast else out

    def tangent(self, t: Tensor) -> Tensor | None:
        return _unpack(t)[1]

    def primal(self, t: Tensor) -> Tensor:
        return _unpack(t)[0].detach()  # as unpacked it is a view, which would keep the tangent alive

    def plain(self, t: Tensor) -> Tensor:
        with torch.enable_grad():
            return _unpack(t)[0]

    def inject(self, s: Tensor, y: Tensor, in_place: bool) -> Tensor:
        primal, tangent = _unpack(s)
        if in_place:
            s.add_(_pack(torch.zeros_like(primal), y))
            return s
        if tangent is not None and s is self._fresh:
            tangent.add_(y)  # in nobody else's hands yet
            return s
        return _pack(primal.detach(), y if tangent is None else tangent.to(y.dtype) + y)

    def substitute(self, p: Tensor, v: Tensor) -> Tensor:
        return _pack(p.detach(), v)

    def cut(self, number: int, v: Tensor) -> tuple[Tensor, Tensor]:
        primal, self.tangents[number] = _unpack(v)
        leaf = primal.detach().requires_grad_()
        return leaf, leaf

    def note(self, value: int, t: Tensor, clone: bool) -> Tensor:
        tangent = _unpack(t)[1]
        if tangent is not None:
            self.notes[value] = tangent.clone() if clone else tangent
        return t


class FastEngine(DualEngine):
    """``DualEngine`` with closed-form tangent rules in place of torch's, where there is one."""

    name = "fast"
    reuses = True

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, writes: bool) -> Any:
        self._fresh = None
        if not (self.frozen_statistics and fn is F.batch_norm):
            out = self._by_rule(fn, args, kwargs)
            if out is not NotImplemented:
                return out
        return super().call(fn, args, kwargs, writes=writes)

    def reuse(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], known: CachedCall) -> Any:
        self._fresh = None
        return self._by_rule(fn, args, kwargs, known=known)

    def _by_rule(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], **known: CachedCall
    ) -> Any:
        entry = tangent_for(fn)
        if entry is None or len(args) < entry[1]:
            return NotImplemented
        rule, duals = entry
        pairs: list[tuple[Any, Any]] = []
        for t in args[:duals]:
            if not isinstance(t, Tensor):
                pairs.append(_unpack_any(t))
            elif t.is_complex():
                return NotImplemented  # the rules are written for real numbers
            else:
                pairs.append((t, None) if type(t) is torch.nn.Parameter else _unpack(t))
        if _carries_tangent(args[duals:], kwargs):
            return NotImplemented
        if all(pair[1] is None for pair in pairs):
            return fn(*args, **kwargs) if _fuses(fn, args, kwargs) else NotImplemented
        if duals == 1:
            result = rule(*pairs[0], *args[1:], **kwargs, **known)
        else:
            primals, tangents = zip(*pairs, strict=True)
            result = rule(primals, tangents, *args[duals:], **kwargs, **known)
        if result is NotImplemented:
            return result
        out, tangent = result
        self._fresh = _pack(out, tangent if tangent.dtype is out.dtype else tangent.to(out.dtype))
        return self._fresh


class PrimalRun(JvpEngine):
    """No tangents: for a pass that only has to see the same values again."""

    name = "plain"
    reuses = True

    def run(self, body: Callable[[], T]) -> T:
        return body()

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, writes: bool) -> Any:
        if _fuses(fn, args, kwargs):
            return fn(*args, **kwargs)
        return super().call(fn, args, kwargs, writes=writes)

    def reuse(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], known: CachedCall) -> Any:
        drops = fn is F.scaled_dot_product_attention and drops_out(args, kwargs)
        return NotImplemented if drops or known.out is None else known.out

    def through_backward(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.call(fn, args, kwargs, writes=False)

    def primal(self, t: Tensor) -> Tensor:
        return t.detach()

    def plain(self, t: Tensor) -> Tensor:
        return t

    def inject(self, s: Tensor, y: Tensor, in_place: bool) -> Tensor:
        return s

    def substitute(self, p: Tensor, v: Tensor) -> Tensor:
        return p

    def cut(self, number: int, v: Tensor) -> tuple[Tensor, Tensor]:
        return v, v


class LossGradRun(PrimalRun):
    """No tangents, but the exact errors: for a step whose estimators learn and make no guess this time."""

    def cut(self, number: int, v: Tensor) -> tuple[Tensor, Tensor]:
        self.tangents[number] = None
        leaf = v.detach().requires_grad_()
        return leaf, leaf


class BlockVjpRun(LossGradRun):
    """``LossGradRun`` that also keeps a reverse graph of every block of a residual stream, from the block's source on.

    Args:
        marked: values to which the graphs will be pulled back, beside their sources and parameters.
    """

    graphs: Graphs

    def __init__(self, chain: ResidualChain, marked: frozenset[int], *, frozen_statistics: bool = False) -> None:
        super().__init__(frozen_statistics=frozen_statistics)
        self.reverses, self.needs, self.goals = chain.reverses, chain.needs, chain.blocks[-1].goals
        self.marked, self.graphs = marked, Graphs()

    def note(self, value: int, t: Tensor, clone: bool) -> Tensor:
        self.graphs.goals[value] = t
        leaf, t = _leaf(t, clone)
        self.graphs.sources[value] = GraphInput.of(leaf)
        return t

    def mark(self, value: int, t: Tensor, clone: bool) -> Tensor:
        if value not in self.marked:
            return t
        before, t = (t, t) if t.requires_grad else _leaf(t, clone)
        self.graphs.marks[value] = GraphInput.of(before)
        return t

    def cut(self, number: int, v: Tensor) -> tuple[Tensor, Tensor]:
        self.graphs.goals[self.goals[number]] = v
        return super().cut(number, v)


def _leaf(t: Tensor, clone: bool) -> tuple[Tensor, Tensor]:
    """Where a graph begins anew, and what goes on from there: a copy if that is written into."""
    with torch.enable_grad():
        leaf = t.detach().requires_grad_()
        return leaf, leaf.clone() if clone else leaf


#: These multiply where they scatter, if asked to: torch's tangent is 0 where a factor is.
_SCATTERS: set[Callable[..., Any]] = {torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_}

#: Functions whose tangent in torch is another than their backward's, at a kink or at zeros: these go by their backward.
_UNEQUAL: set[Callable[..., Any]] = {F.prelu, Tensor.prelu, torch.fmax, Tensor.fmax, *_SCATTERS}


def check_tangent(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ``NotImplementedError`` if torch's tangent of a call is not its backward's."""
    if fn in _UNEQUAL and (
        fn not in _SCATTERS or any(type(a) is str and a == "prod" for a in (*args, *kwargs.values()))
    ):
        raise NotImplementedError("forward AD has another derivative than backward")


#: Operations that do not run as they stand, and what is done instead; told by ``preflight``.
TREATMENTS: dict[Callable[..., Any], str] = {
    **dict.fromkeys(RECURRENT, "runs unfused: oneDNN's fused recurrence has no forward derivative"),
    F.scaled_dot_product_attention: "runs by the explicit formula: the fused kernels have no forward derivative",
}


def is_foreign(fn: Callable[..., Any]) -> bool:
    """Whether ``fn`` is an operation of another library (``torch.library.custom_op``) with its own backward. Forward AD
    drops the tangents of such operations and raises no error."""
    if not isinstance(fn, OpOverload) or fn.namespace in ("aten", "prims", "prim"):
        return False
    return not torch._C._dispatch_has_kernel_for_dispatch_key(fn.name(), "CompositeImplicitAutograd")


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def _device_type(args: tuple[Any, ...]) -> str:
    return next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")


def _same_dtype(out: Any) -> Any:
    """Under autocast some stock rules give a float32 tangent to a bfloat16 output."""
    if not isinstance(out, Tensor) or not is_differentiable(out):
        return out
    primal, tangent = _unpack(out)
    if tangent is None or tangent.dtype is primal.dtype:
        return out
    return _pack(primal, tangent.to(primal.dtype))


def _fuses(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Attention that a fused kernel may run where no tangent passes; with dropout it might draw otherwise."""
    return fn is F.scaled_dot_product_attention and not drops_out(args, kwargs)


def _carries_tangent(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    for a in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(a, Tensor) and type(a) is not torch.nn.Parameter and _unpack(a)[1] is not None:
            return True
    return False


def _unpack(t: Tensor) -> tuple[Tensor, Tensor | None]:
    """``fw.unpack_dual`` without its checks: a level is known to be open, and levels do not nest."""
    if (t.is_floating_point() or t.is_complex()) and t.layout is torch.strided:  # what can carry a tangent
        pair: tuple[Tensor, Tensor | None] = torch._unpack_dual(t, level=0)
        return pair
    return t, None


def _unpack_any(node: Any) -> tuple[Any, Any]:
    """Of what is no tensor: of a list of tensors the lists; None in place of tangents where there is none."""
    if not isinstance(node, (tuple, list)) or not all(isinstance(t, Tensor) for t in node):
        return node, None
    pairs = [_unpack(t) for t in node]
    moving = any(tangent is not None for _, tangent in pairs)
    return [primal for primal, _ in pairs], [tangent for _, tangent in pairs] if moving else None


def _pack(primal: Tensor, tangent: Tensor) -> Tensor:
    """``fw.make_dual``, likewise."""
    dual: Tensor = torch._make_dual(primal, tangent, level=0)
    return dual


def inner(a: Tensor, b: Tensor) -> Tensor:
    """``Re(conj(a) b)``, entry by entry: the inner product of torch's gradients and tangents, complex ones included."""
    return torch.real(a.conj() * b) if a.is_complex() or b.is_complex() else a * b


def _between_one_and_two(like: Tensor) -> Tensor:
    """Numbers without a zero among them; both parts of a complex one."""
    n = like.numel()
    numbers = torch.linspace(1, 2, n, device=like.device)
    if like.is_complex():
        numbers = torch.complex(numbers, numbers.flip(0))
    return numbers.to(like).view(like.shape)


#: Inside ``torch.func`` these fill the mask of a tensor that is not contiguous in the order of its dimensions, and
#: elsewhere in the order of its memory.
_DROPOUTS: set[Callable[..., Any]] = {F.dropout, torch.dropout, torch.dropout_, F.alpha_dropout, torch.alpha_dropout}


class FuncEngine(JvpEngine):
    """``torch.func.jvp``: the documented entry, and what every other level must equal."""

    name = "func"
    same_objects = False
    wraps = True

    def run(self, body: Callable[[], T]) -> T:
        results: list[T] = []
        self._cuts: dict[int, Tensor] = {}
        self._noted: dict[int, Tensor] = {}
        self._anchor = torch.zeros((), requires_grad=True)

        def f(t: Tensor) -> tuple[Tensor, ...]:
            self._t = t
            results.append(body())
            return (*self._cuts.values(), *self._noted.values(), t * 0)

        zero = torch.zeros(())
        tangents = torch.func.jvp(f, (zero,), (torch.ones_like(zero),))[1]
        self.tangents = dict(zip(self._cuts, tangents, strict=False))
        self.notes = dict(zip(self._noted, tangents[len(self._cuts) :], strict=False))
        return results[0]

    def note(self, value: int, t: Tensor, clone: bool) -> Tensor:
        self._noted[value] = t.clone() if clone else t
        return t

    def primal(self, t: Tensor) -> Tensor:
        return self.plain(t.detach())

    def outside(self) -> AbstractContextManager[Any]:
        outside: AbstractContextManager[Any] = temporarily_clear_interpreter_stack()
        return outside

    def plain(self, t: Tensor) -> Tensor:
        return plain(t)

    def _pair(self, t: Tensor) -> tuple[Tensor, Tensor | None]:
        primal, tangent = _unpack(t)
        return self.plain(primal), None if tangent is None else self.plain(tangent)

    def inject(self, s: Tensor, y: Tensor, in_place: bool) -> Tensor:
        ty = self._scalar(y) * y
        if not in_place:
            return s + ty
        if not torch._C._functorch.is_functorch_wrapped_tensor(s):
            raise RuntimeError(
                "engine='func' cannot add a guess to an operation that writes its input in place before any other "
                "site; use engine='dual', or write the operation out of place"
            )
        return s.add_(ty)

    def _scalar(self, like: Tensor) -> Tensor:
        return self._t.to(like.dtype) if like.is_floating_point() else self._t

    def substitute(self, p: Tensor, v: Tensor) -> Tensor:
        return p.detach() + self._scalar(v) * v

    def cut(self, number: int, v: Tensor) -> tuple[Tensor, Tensor]:
        self._cuts[number] = v
        with torch.enable_grad():
            # requires_grad_() is refused inside a transform; adding an outside zero that requires grad serves as well.
            leaf = self.primal(v) + self._anchor.to(v.dtype)
            return leaf, self.plain(leaf)

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, writes: bool) -> Any:
        check_tangent(fn, args, kwargs)
        if not writes and fn in _DROPOUTS:
            return self._in_order_of_memory(fn, *args, **kwargs)
        if not writes or (self.frozen_statistics and fn is F.batch_norm):
            return super().call(fn, args, kwargs, writes=writes)
        if fn in (F.batch_norm, F.instance_norm):
            self.write(fn, args, kwargs)
            return without_side_effects(fn)(*args, **kwargs)
        return self.write(fn, args, kwargs)

    def without_tangent(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._in_order_of_memory(fn, *args, **kwargs) if fn in _DROPOUTS else fn(*args, **kwargs)

    def _in_order_of_memory(self, fn: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Dropout of ``input`` with its dimensions ordered by stride: the mask is then the one of a plain run."""
        with self.outside():
            strides = torch.empty_like(self.plain(input)).stride()
        order = sorted(range(input.dim()), key=lambda d: -strides[d])
        if order == list(range(input.dim())):
            return fn(input, *args, **kwargs)
        back = sorted(range(input.dim()), key=lambda d: order[d])
        return fn(input.permute(order), *args, **kwargs).permute(back)

    def write(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A transform refuses to write what it captured: write outside of it, from values without tangents.
        args, kwargs = tree_map_only(Tensor, self.plain, (args, kwargs))
        with self.outside():
            return fn(*args, **kwargs)


_ENGINES: dict[str, type[JvpEngine]] = {"fast": FastEngine, "dual": DualEngine, "func": FuncEngine}


def make_engine(name: str, *, frozen_statistics: bool = False) -> JvpEngine:
    """A fresh level by name.

    Raises:
        ValueError: unknown name.
    """
    if name not in _ENGINES:
        raise ValueError(f"engine: {name!r} is not one of {', '.join(_ENGINES)}")
    return _ENGINES[name](frozen_statistics=frozen_statistics)
