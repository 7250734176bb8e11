"""A function mode that sees every torch call of a closure.

Parameters are recognised by identity, so ``F.linear`` in a plain function is seen as well as ``nn.Linear``. A call
whose tensors are all parameters, or computed from parameters alone, is a *parameter expression* (``W.t()``, ``1 + w``).
It records an ordinary autograd graph, which never contains an activation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode

from guessopt.errors import ClosureError, refusal, refused
from guessopt.exclusive import Interrupts, interrupts_now, running
from guessopt.sites import label
from guessopt.tracing.answers import (
    ANSWERS,
    FREEZING,
    GETTER,
    GRAD_FN,
    IN_NO_GRAPH,
    IS_LEAF,
    REQUIRES_GRAD,
    VIEWS,
    attention,
    module_hook,
    refuse_freezing,
    uncompiled,
    visible_functions,
)
from guessopt.tracing.functions import NoGrad
from guessopt.tree import split


class Interceptor(TorchFunctionMode):
    """Hands each torch call of a closure to ``call``, with its tensors and the outline of its arguments.

    Args:
        params: ``id`` of each trainable parameter -> its position in the optimizer.

    Attributes:
        expressions: ``id`` of each parameter expression -> the tensor, and the positions of its parameters.
        count: calls so far.
        enabled: whether gradients are enabled at this point of the closure.
        delivering: whether the base is updating parameters in the middle of the run. An error is then none of the
            closure's.
        raised: whether the run has ended with an error of the closure's own, and not of a torch call.
        refused: the ``ClosureError`` of a refused call. It ends the run even if the closure has caught it.
    """

    def __init__(self, params: Mapping[int, int]) -> None:
        super().__init__()
        self.params = params
        self.expressions: dict[int, tuple[Tensor, frozenset[int]]] = {}
        self.count = 0
        self.enabled = True
        self.delivering = False
        self.raised = False
        self.refused: ClosureError | None = None
        self.no_grad: AbstractContextManager[Any] = NoGrad()
        self._failed: Exception | None = None
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
        if fn in ANSWERS:
            if fn is torch._C._set_grad_enabled:
                self.enabled = args[0]
            elif fn in FREEZING and id(args[0]) in self.params:
                refuse_freezing(args, kwargs)
            out = ANSWERS[fn](fn, args, kwargs)
            return IN_NO_GRAPH if out is None and fn == GRAD_FN and self.moves(args[0]) else out
        if fn is F.multi_head_attention_forward:
            with self:
                return attention(*args, **kwargs)
        getter = type(fn) is GETTER and fn.__name__ == "__get__" and fn not in VIEWS
        if getter and not isinstance(out := fn(*args), Tensor):
            if fn == IS_LEAF:
                return out and not self.moves(args[0])
            return self._requires_grad(out) if fn == REQUIRES_GRAD else out  # x.shape, x.device: no tensor, no trace
        if torch.is_inference_mode_enabled() or torch.is_grad_enabled() != self.enabled:
            raise _misplaced(fn)
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
        """Make one torch call and return its result.

        Args:
            index: the call's number in the closure, from 0.
            fn, args, kwargs: the call.
            tensors, outline: of the arguments; see ``tree.split``.
        """
        raise NotImplementedError

    def _requires_grad(self, answer: bool) -> bool:
        asks = sys._getframe(3)
        if asks.f_globals.get("__name__") == "torch.utils.hooks" and torch.is_grad_enabled():
            raise module_hook(getattr(asks.f_locals.get("self"), "module", None))
        return self.requires_grad(answer)

    def requires_grad(self, answer: bool) -> bool:
        """The answer when the closure asks for ``activation.requires_grad``."""
        return answer

    def moves(self, t: Tensor) -> bool:
        """Whether derivatives reach the tensor. In ordinary training it would then be no leaf of a graph."""
        return False

    def positions(self, tensor: Tensor) -> frozenset[int]:
        """The optimizer's parameters that ``tensor`` is, or is computed from."""
        position = self.params.get(id(tensor))
        return frozenset([position]) if position is not None else self.expressions[id(tensor)][1]

    def plain(self, t: Tensor) -> Tensor:
        """``t`` outside any transform."""
        return t

    def express(self, results: list[Tensor], mine: list[Tensor]) -> None:
        """Remember the results of a parameter expression; ``mine``: the parameters and expressions that it reads."""
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
            with torch.enable_grad(), visible_functions(), uncompiled(), self:
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
            while torch._C._len_torch_function_stack() > modes:  # an interrupt came while this mode was being left
                _pop_mode()


def _stems_from(error: BaseException | None, origin: BaseException | None) -> bool:
    """Whether ``origin`` is the error, or one of the errors that led to it."""
    while error is not None and error is not origin:
        error = error.__cause__ or error.__context__
    return error is not None


def _misplaced(fn: Callable[..., Any]) -> ClosureError:
    """The error for a call inside ``torch.inference_mode``, or inside a custom function that is not visible."""
    if torch.is_inference_mode_enabled():
        return ClosureError(
            f"the closure calls {label(fn)} inside torch.inference_mode(), where derivatives are "
            "silently lost; use torch.no_grad() there, or move the call out of the closure"
        )
    return ClosureError(
        f"{label(fn)} is called inside the forward of a torch.autograd.Function whose apply was "
        "looked up before the closure ran (f = MyFunction.apply); write MyFunction.apply(...) in the closure"
    )
