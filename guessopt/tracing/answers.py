"""Torch functions that an ``Interceptor`` answers in a way of its own.

| the closure calls | the answer |
|---|---|
| ``backward``, ``torch.autograd.grad`` | ``ClosureError``: the closure computes the loss and nothing else |
| ``register_hook`` and module backward hooks | ``ClosureError``: no graph of the network exists, so no hook would run |
| ``requires_grad_``, ``retain_grad`` on activations | nothing happens (transformers' checkpointing calls them) |
| ``h.grad_fn`` of an activation | a stand-in, for code that asks whether there is a graph |
| ``MyFunction.apply`` of a ``torch.autograd.Function`` | the call becomes visible, as a ``CustomFunction`` |
| gradient checkpointing | the function runs once, as it stands: nothing is stored for a backward pass |
| ``F.multi_head_attention_forward`` | its body runs, so that its projections are ordinary calls |
| modules of ``torch.compile`` | they run uncompiled |
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import handle_torch_function
from torch.utils.checkpoint import CheckpointFunction

from guessopt.errors import ClosureError

# --- custom functions, checkpoints, compiled code, attention ----------------------------------------------------------


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
_CHECKPOINT = "_checkpoint_without_reentrant_generator"


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of ``torch.autograd.Function.apply``."""
    if cls is CheckpointFunction and torch._C._len_torch_function_stack():
        run, _, *inputs = args
        return run(*inputs)
    return CustomFunction(cls)(*args, **kwargs)


def _stores_nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    """In place of non-reentrant checkpointing around a function."""
    yield


@contextmanager
def visible_functions() -> Iterator[None]:
    """Within, function modes see ``torch.autograd.Function.apply``, which torch hides from them, and checkpointed
    functions run as they stand."""
    checkpoint = getattr(torch.utils.checkpoint, _CHECKPOINT)
    torch.autograd.Function.apply = classmethod(_apply)  # type: ignore[assignment, method-assign]
    try:
        setattr(torch.utils.checkpoint, _CHECKPOINT, _stores_nothing)
        yield
    finally:
        torch.autograd.Function.apply = _APPLY  # type: ignore[method-assign]
        setattr(torch.utils.checkpoint, _CHECKPOINT, checkpoint)


def uncompiled() -> AbstractContextManager[Any]:
    """Within, modules of ``torch.compile`` run uncompiled: a function mode does not see the calls of compiled code."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    result: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return result


#: ``F.multi_head_attention_forward`` that does not hand itself over to a function mode. The mode sees its calls.
attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


# --- gradients, hooks and grad_fn -------------------------------------------------------------------------------------


def _run(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return fn(*args, **kwargs)


def _nothing(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0]


def _refuse_backward(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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


def module_hook(module: Any) -> ClosureError:
    """The error for a module with a backward hook; None where the module is not known."""
    return ClosureError(
        f"a module of the closure{'' if module is None else f' ({type(module).__name__})'} has a backward hook "
        "(register_full_backward_hook, register_full_backward_pre_hook or register_backward_hook): no gradient of the "
        "loss passes through the network here, so that it would never be called; remove it, or change the gradient by "
        "a torch.autograd.Function with a jvp or a differentiable backward"
    )


def refuse_freezing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ``ClosureError`` if these arguments of ``requires_grad_`` freeze a trainable parameter, ``args[0]``."""
    if not (*args[1:], *kwargs.values(), True)[0]:
        raise ClosureError(
            f"the closure sets requires_grad = False for a parameter of shape {list(args[0].shape)} that the "
            "optimizer trains; freeze it before the step"
        )


def _grad_fn(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``grad_fn``. Torch asks for it where it is about to attach a hook; the frame that asks tells."""
    asks = sys._getframe(3)
    where = asks.f_globals.get("__name__") if torch.is_grad_enabled() else None
    if where == "torch.nn.modules.module" and asks.f_code.co_name not in ("register_parameter", "__setattr__"):
        raise module_hook(asks.f_locals.get("self"))
    if where == "torch.autograd.graph":
        _refuse_hook(torch.autograd.graph.register_multi_grad_hook, args, kwargs)
    return fn(*args)


class _InNoGraph:
    """Stands for ``h.grad_fn`` of an activation, for code that asks whether there is one."""

    def name(self) -> str:
        return "none: guessopt keeps no graph of the network"


IN_NO_GRAPH = _InNoGraph()

#: The type of the functions that read a tensor's attributes.
GETTER = type(Tensor.requires_grad.__get__)  # type: ignore[attr-defined]
GRAD_FN = Tensor.grad_fn.__get__  # type: ignore[union-attr]
IS_LEAF = Tensor.is_leaf.__get__  # type: ignore[attr-defined]
REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
#: Attributes that are tensors: operations like any other.
VIEWS = frozenset(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag", "data"))

#: These set ``requires_grad``.
FREEZING: set[Callable[..., Any]] = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]

#: By function, the answer to ``(fn, args, kwargs)``.
ANSWERS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._C._set_grad_enabled: _run,
    Tensor.requires_grad_: _nothing,
    Tensor.requires_grad.__set__: _nothing,  # type: ignore[attr-defined]
    Tensor.retain_grad: _nothing,
    Tensor.grad.__set__: _run,  # type: ignore[union-attr]
    Tensor.register_hook: _refuse_hook,
    Tensor.register_post_accumulate_grad_hook: _refuse_hook,
    Tensor.grad_fn.__get__: _grad_fn,  # type: ignore[union-attr]
    Tensor.backward: _refuse_backward,
    torch.autograd.backward: _refuse_backward,
    torch.autograd.grad: _refuse_backward,
    torch.ops.profiler._record_function_exit._RecordFunction: _run,
}
