"""Runs in which every call is watched: through which calls has no tangent come yet, and where do examples interact?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from guessopt.engine.forward import ForwardRun
from guessopt.engine.jvp.base import JvpEngine
from guessopt.record import ForwardRecord
from guessopt.sites import name_of
from guessopt.tracing.analysis import Analysis
from guessopt.tree import results_of, tensors_in

#: Called before a call, with the engine and the call's index, function and tensors. It may return a function, which is
#: called after the call with the tensors that this has returned.
Watch = Callable[[JvpEngine, int, Callable[..., Any], list[Tensor]], "Callable[[list[Tensor]], None] | None"]

#: Products -> the number of their tensors that are factors. A factor of zeros stops the other factors' tangents.
_FACTORS = {"mul": 2, "multiply": 2, "imul": 2, "rmul": 2, "div": 2, "truediv": 2, "matmul": 2, "rmatmul": 2,
            "mm": 2, "bmm": 2, "mv": 2, "linear": 2, "conv1d": 2, "conv2d": 2, "conv3d": 2, "einsum": 9,
            "scaled_dot_product_attention": 3}  # fmt: skip

#: Operations whose derivative is always zero.
_FLAT = {"sign", "sgn", "round", "floor", "ceil", "trunc", "fix", "heaviside", "zeros_like", "ones_like"}


class WatchedRun(ForwardRun):
    """Shows ``watch`` every call with derivatives, and its outputs before they get a guess.

    Attributes:
        failure: the exception that the engine, not the closure, has raised.
    """

    watch: Watch | None = None
    failure: Exception | None = None
    _at: int = -1

    def execute(self, closure: Callable[[], Any], params: Mapping[int, Tensor]) -> ForwardRecord:
        try:
            return super().execute(closure, params)
        finally:  # the engine's methods hold the run, and with it the run's tensors
            vars(self.engine).pop("call", None)
            vars(self.engine).pop("cut", None)

    def call(self, index: int, *rest: Any) -> Any:
        if self._at < 0:
            self._follow(self.engine)
        self._at = index
        return super().call(index, *rest)

    def _follow(self, engine: JvpEngine) -> None:
        inner = engine.call

        def call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, writes: bool) -> Any:
            read = tensors_in(args, kwargs)
            see = None if self.watch is None else self.watch(engine, self._at, fn, read)
            try:
                out = inner(fn, args, kwargs, writes=writes)
            except Exception as error:
                self.failure = error
                raise
            if see is not None:
                see(results_of(out, read))
            return out

        ends = engine.cut

        def cut(number: int, v: Tensor) -> tuple[Tensor, Tensor]:
            try:
                return ends(number, v)
            except Exception as error:
                self.failure = error
                raise

        engine.call, engine.cut = call, cut  # type: ignore[method-assign]


class Witness:
    """Watches several runs.

    Attributes:
        asleep: indices of the calls that tangents have reached, and through which none has come in any run.
    """

    def __init__(self, analysis: Analysis) -> None:
        calls = [analysis.tape.calls[c] for c in analysis.useful - analysis.loss]
        self._awake = {call.index for call in calls if call.op in _FLAT}
        self._open = {call.index for call in calls if analysis.active.intersection(call.sources)}
        self._asleep: set[int] = set()

    @property
    def asleep(self) -> frozenset[int]:
        return frozenset(self._asleep - self._awake)

    def watch(
        self, engine: JvpEngine, index: int, fn: Callable[..., Any], read: list[Tensor]
    ) -> Callable[[list[Tensor]], None] | None:
        if index in self._awake or index not in self._open:
            return None
        moving = [_moves(engine.tangent(t)) for t in read]
        if not any(moving):
            return None
        factors = read[: _FACTORS.get(name_of(fn), 0)]
        stopped = any(any(moving[:k] + moving[k + 1 :]) and _is_zero(engine.primal(t)) for k, t in enumerate(factors))

        def see(made: list[Tensor]) -> None:
            passes = not stopped and any(_moves(engine.tangent(t)) for t in made)
            (self._awake if passes else self._asleep).add(index)

        return see


class Mixing:
    """Finds the first call after which other examples move than before it.

    Args:
        moving: ``[N]``, 1 for the examples that have tangents.

    Attributes:
        call: the call's index and the shape of its output; None until it is found.
    """

    def __init__(self, moving: Tensor) -> None:
        self.moving = moving
        self.call: tuple[int, tuple[int, ...]] | None = None

    def watch(
        self, engine: JvpEngine, index: int, fn: Callable[..., Any], read: list[Tensor]
    ) -> Callable[[list[Tensor]], None] | None:
        if self.call is not None or not all(self._apart(engine.tangent(t)) for t in read):
            return None

        def see(made: list[Tensor]) -> None:
            mixed = next((t for t in made if not self._apart(engine.tangent(t))), None)
            if mixed is not None:
                self.call = index, tuple(mixed.shape)

        return see

    def _apart(self, tangent: Tensor | None) -> bool:
        """Whether the tangent, along some dimension or part of one, is zero for the examples that must not move."""
        if tangent is None or not _moves(tangent):
            return True
        size, n = tangent.abs().double().nan_to_num(0.0, 0.0, 0.0), len(self.moving)
        rest = self.moving.to(size) == 0
        for dim, length in enumerate(size.shape):
            if length % n:
                continue
            along = size.movedim(dim, 0).reshape(length, -1).sum(1)
            for each in (along.view(n, -1).sum(1), along.view(-1, n).sum(0)):
                if float(each[rest].sum()) <= 1e-5 * float(each.max()):
                    return True
        return False


def _is_zero(t: Tensor) -> bool:
    ordinary = t.layout is torch.strided and not is_traceable_wrapper_subclass(t)
    return ordinary and not bool(t.any())


def _moves(tangent: Tensor | None) -> bool:
    return tangent is not None and bool(torch.count_nonzero(tangent))
