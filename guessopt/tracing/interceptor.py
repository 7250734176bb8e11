"""A function mode that sees every torch call of a closure.

Parameters are recognised by identity, so ``F.linear`` in a plain function is seen as well as ``nn.Linear``. A call
whose tensors are all parameters, or computed from parameters alone, is a *parameter expression* (``W.t()``, ``1 + w``):
it records an ordinary autograd graph, which never contains an activation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode, handle_torch_function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import CheckpointFunction

from guessopt.errors import ClosureError, refusal, refused
from guessopt.exclusive import Interrupts, interrupts_now, running
from guessopt.layout import is_differentiable
from guessopt.tree import split


class NoGrad:
    """``torch.no_grad()`` at a fraction of its cost, which a pass would pay at every call."""

    def __init__(self) -> None:
        self._before: list[bool] = []

    def __enter__(self) -> None:
        self._before.append(torch.is_grad_enabled())
        torch._C._set_grad_enabled(False)

    def __exit__(self, *error: object) -> None:
        torch._C._set_grad_enabled(self._before.pop())


#: A context that does nothing: one object for all calls, for speed.
AS_IT_IS = nullcontext[None]()


class Interceptor(TorchFunctionMode):
    """Hands each torch call to ``call``, with its tensors and the outline of its arguments.

    Args:
        params: ``id`` of each trainable parameter handed to the optimizer, to its position there.
    """

    def __init__(self, params: Mapping[int, int]) -> None:
        super().__init__()
        self.params = params
        self.expressions: dict[int, tuple[Tensor, frozenset[int]]] = {}
        self.count = 0
        self.enabled = True
        #: Whether the base is updating parameters in the middle of the run: an error is then not the closure's.
        self.delivering = False
        #: Whether the run has ended with an error of the closure's own, and not of a torch call.
        self.raised = False
        self._failed: Exception | None = None
        #: What was refused: it stands although the closure may have caught it.
        self.refused: ClosureError | None = None
        self.no_grad: AbstractContextManager[Any] = NoGrad()
        self._interrupts: Interrupts | None = None

    def __torch_function__(
        self, fn: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        interrupts = self._interrupts
        frees = interrupts is not None and not interrupts.busy
        if interrupts is not None:
            interrupts.busy = True
        try:
            return self._handle(fn, args, kwargs or {})
        except ClosureError as error:
            self.refused = error
            raise
        finally:
            if frees and interrupts is not None:
                interrupts.free()

    def _handle(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if fn in _CONTROL:
            if fn is torch._C._set_grad_enabled:
                self.enabled = args[0]
            elif fn in _FREEZING and id(args[0]) in self.params and not (*args[1:], *kwargs.values(), True)[0]:
                raise ClosureError(
                    f"the closure sets requires_grad = False for a parameter of shape {list(args[0].shape)} that the "
                    "optimizer trains; freeze it before the step"
                )
            out = _CONTROL[fn](fn, args, kwargs)
            return _IN_NO_GRAPH if out is None and fn == _GRAD_FN and self.moves(args[0]) else out
        if fn is F.multi_head_attention_forward:
            with self:  # its projections are ordinary calls
                return _attention(*args, **kwargs)
        getter = type(fn) is _GETTER and fn.__name__ == "__get__" and fn not in _VIEWS
        if getter and not isinstance(out := fn(*args), Tensor):
            if fn == _IS_LEAF:
                return out and not self.moves(args[0])
            return self._requires_grad(out) if fn == _REQUIRES_GRAD else out  # x.shape, x.device: no tensor, no trace
        if torch.is_inference_mode_enabled():
            raise ClosureError(
                f"the closure calls {getattr(fn, '__name__', fn)} inside torch.inference_mode(), where derivatives are "
                "silently lost; use torch.no_grad() there, or move the call out of the closure"
            )
        if torch.is_grad_enabled() != self.enabled:
            raise ClosureError(
                f"{getattr(fn, '__name__', fn)} is called inside the forward of a torch.autograd.Function whose "
                "apply was looked up before the closure ran (f = MyFunction.apply); write MyFunction.apply(...) in "
                "the closure"
            )
        index = self.count
        self.count += 1
        try:
            return self.call(index, fn, args, kwargs, *split(args, kwargs))
        except Exception as error:
            self._failed = error
            refusable = isinstance(error, (RuntimeError, AssertionError)) and not self.delivering
            if not refusable or (why := refusal(error)) is None:
                raise
            raise refused(fn, why) from error

    def call(
        self,
        index: int,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        outline: list[Any],
    ) -> Any:
        """One torch call: its number in the closure, its arguments, their tensors, and their outline (``split``)."""
        raise NotImplementedError

    def _requires_grad(self, answer: bool) -> bool:
        asks = sys._getframe(3)
        if asks.f_globals.get("__name__") == "torch.utils.hooks" and torch.is_grad_enabled():
            raise _module_hook(getattr(asks.f_locals.get("self"), "module", None))
        return self.requires_grad(answer)

    def requires_grad(self, answer: bool) -> bool:
        """The answer when the closure asks for ``activation.requires_grad``."""
        return answer

    def moves(self, t: Tensor) -> bool:
        """Whether derivatives reach the tensor, so that in ordinary training it would be no leaf of a graph."""
        return False

    def positions(self, tensor: Tensor) -> frozenset[int]:
        """The optimizer's parameters that ``tensor`` is, or is computed from."""
        position = self.params.get(id(tensor))
        return frozenset([position]) if position is not None else self.expressions[id(tensor)][1]

    def plain(self, t: Tensor) -> Tensor:
        """``t`` outside any transform."""
        return t

    def express(self, results: list[Tensor], mine: list[Tensor]) -> None:
        """Remember the results of a parameter expression."""
        origin: frozenset[int] | None = None
        for t in results:
            if self.plain(t).requires_grad and id(t) not in self.params:
                if origin is None:
                    origin = frozenset().union(*(self.positions(m) for m in mine))
                self.expressions[id(t)] = (t, origin)

    def run(self, closure: Callable[[], Any]) -> Any:
        """The closure's result under this mode, with gradients enabled as a training script has them."""
        self._interrupts = interrupts_now()
        modes = torch._C._len_torch_function_stack()
        try:
            with torch.enable_grad(), _visible_functions(), _uncompiled(), self:
                result = running(closure)
            if self.refused is not None:
                raise self.refused
            return result
        except Exception as error:
            if isinstance(error, RuntimeError) and isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None  # it came while torch had taken a mode away
            self.raised = not _stems_from(error, self._failed)
            raise
        finally:
            self._failed = None
            while torch._C._len_torch_function_stack() > modes:  # an interrupt came as this one was to be left
                _pop_mode()


def _stems_from(error: BaseException | None, origin: BaseException | None) -> bool:
    """Whether ``origin`` is the error, or what it was raised for."""
    while error is not None and error is not origin:
        error = error.__cause__ or error.__context__
    return error is not None


# ``F.multi_head_attention_forward`` without the handing over to a function mode, which would see one call in its place.
_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def _uncompiled() -> AbstractContextManager[Any]:
    """Run modules of ``torch.compile`` uncompiled: a function mode does not see the calls of compiled code."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@dataclass(frozen=True)
class CustomFunction:
    """``MyFunction.apply`` of a ``torch.autograd.Function``, as a call that a function mode sees."""

    cls: Any

    @property
    def __name__(self) -> str:
        return f"{self.cls.__name__}.apply"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch._C._len_torch_function_stack():
            return handle_torch_function(self, (), *args, **kwargs)
        return _APPLY.__get__(None, self.cls)(*args, **kwargs)


_APPLY = torch.autograd.Function.__dict__["apply"]


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    if cls is CheckpointFunction and torch._C._len_torch_function_stack():
        run, _, *inputs = args
        return run(*inputs)  # nothing is stored for a backward pass, so there is nothing to compute again
    return CustomFunction(cls)(*args, **kwargs)


def _stores_nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    """In place of non-reentrant checkpointing around a function: nothing is stored for a backward pass."""
    yield


_CHECKPOINT = "_checkpoint_without_reentrant_generator"


@contextmanager
def _visible_functions() -> Iterator[None]:
    """Let function modes see ``torch.autograd.Function.apply``, which torch hides from them, and run what is
    checkpointed as it stands."""
    checkpoint = getattr(torch.utils.checkpoint, _CHECKPOINT)
    torch.autograd.Function.apply = classmethod(_apply)  # type: ignore[assignment, method-assign]
    try:
        setattr(torch.utils.checkpoint, _CHECKPOINT, _stores_nothing)
        yield
    finally:
        torch.autograd.Function.apply = _APPLY  # type: ignore[method-assign]
        setattr(torch.utils.checkpoint, _CHECKPOINT, checkpoint)


def _plainly(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return fn(*args, **kwargs)


def _nothing(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0]


def _refuse(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(fn, "__name__", "backward")
    what = "Tensor.backward()" if fn is Tensor.backward else f"torch.autograd.{name}()"
    raise ClosureError(
        f"the closure calls {what}; it must only compute the loss: return it, and let step() or estimate() fill .grad"
    )


def _refuse_hook(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise ClosureError(
        f"the closure calls {fn.__name__}() on a tensor of shape {list(args[0].shape)}: no gradient of the loss "
        "passes through the network here, so that the hook would never be called; change the gradient by a "
        "torch.autograd.Function with a jvp or a differentiable backward, and register hooks on parameters outside the "
        "closure"
    )


def _module_hook(module: Any) -> ClosureError:
    return ClosureError(
        f"a module of the closure{'' if module is None else f' ({type(module).__name__})'} has a backward hook "
        "(register_full_backward_hook, register_full_backward_pre_hook or register_backward_hook): no gradient of the "
        "loss passes through the network here, so that it would never be called; remove it, or change the gradient by "
        "a torch.autograd.Function with a jvp or a differentiable backward"
    )


def _grad_fn(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``grad_fn``, which torch itself asks for where it is about to hang a hook on it."""
    asks = sys._getframe(3)
    where = asks.f_globals.get("__name__") if torch.is_grad_enabled() else None
    if where == "torch.nn.modules.module" and asks.f_code.co_name not in ("register_parameter", "__setattr__"):
        raise _module_hook(asks.f_locals.get("self"))
    if where == "torch.autograd.graph":
        _refuse_hook(torch.autograd.graph.register_multi_grad_hook, args, kwargs)
    return fn(*args)


# Calls that a pass handles apart. Gradient checkpointing of transformers sets requires_grad on activations; hooks and
# retain_grad need a graph of the network, and there is none.
_CONTROL: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._C._set_grad_enabled: _plainly,
    Tensor.requires_grad_: _nothing,
    Tensor.requires_grad.__set__: _nothing,  # type: ignore[attr-defined]
    Tensor.retain_grad: _nothing,
    Tensor.grad.__set__: _plainly,  # type: ignore[union-attr]
    Tensor.register_hook: _refuse_hook,
    Tensor.register_post_accumulate_grad_hook: _refuse_hook,
    Tensor.grad_fn.__get__: _grad_fn,  # type: ignore[union-attr]
    Tensor.backward: _refuse,
    torch.autograd.backward: _refuse,
    torch.autograd.grad: _refuse,
    torch.ops.profiler._record_function_exit._RecordFunction: _plainly,
}


def autocast_of(t: Tensor) -> tuple[str, torch.dtype] | None:
    """The autocast in force for the tensor's device, if any."""
    if not torch._C._is_any_autocast_enabled():
        return None
    kind = t.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return (kind, torch.get_autocast_dtype(kind)) if enabled else None


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """No autocast on the tensor's device."""
    return torch.autocast(t.device.type, enabled=False) if autocast_of(t) else nullcontext()


#: Of their second tensor these read only the dtype or the shape (``x.type_as(self.weight)``).
_AFTER_ANOTHER: set[Callable[..., Any]] = {
    Tensor.type_as, Tensor.to, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as,
}  # fmt: skip


#: These make a sparse matrix of indices, which have no derivative, and values.
_SPARSE: set[Callable[..., Any]] = {
    torch.sparse_coo_tensor, torch.sparse_csr_tensor, torch.sparse_csc_tensor, torch.sparse_compressed_tensor,
}  # fmt: skip


def read_by(fn: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """Those of a call's tensors on whose values its result depends."""
    if fn in _SPARSE:
        return [t for t in tensors if is_differentiable(t)]
    return tensors[:1] if fn in _AFTER_ANOTHER else tensors


def dense(w: Tensor) -> Tensor:
    """The weight as an ordinary tensor; a quantised one, of a tensor class of its own, is dequantised."""
    return w.dequantize() if is_traceable_wrapper_subclass(w) and hasattr(w, "dequantize") else w


_FREEZING: set[Callable[..., Any]] = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]

_GETTER = type(Tensor.requires_grad.__get__)  # type: ignore[attr-defined]


class _InNoGraph:
    """Stands for ``h.grad_fn`` of an activation, for code that asks whether there is one."""

    def name(self) -> str:
        return "none: guessopt keeps no graph of the network"


_IN_NO_GRAPH = _InNoGraph()
_GRAD_FN = Tensor.grad_fn.__get__  # type: ignore[union-attr]
_IS_LEAF = Tensor.is_leaf.__get__  # type: ignore[attr-defined]
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
#: Attributes that are tensors: operations like any other.
_VIEWS = frozenset(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag", "data"))

_STOPPING: set[Callable[..., Any]] = {
    Tensor.detach,
    torch.detach,
    Tensor.detach_,
    Tensor.data.__get__,  # type: ignore[attr-defined]
    Tensor.data.__set__,  # type: ignore[attr-defined]
}


def stops_gradient(fn: Callable[..., Any]) -> bool:
    """``detach`` in its spellings."""
    return fn in _STOPPING
