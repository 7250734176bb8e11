"""The cost of each memory mode on a user's closure, measured; the cost of backpropagation, estimated."""

from __future__ import annotations

import gc
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils.weak import WeakIdKeyDictionary

from guessopt.engine.transaction import Transaction
from guessopt.errors import GuessWarning
from guessopt.options import HasEstimation
from guessopt.step.checks import check_plan
from guessopt.step.estimation import Estimation
from guessopt.step.learning import learn
from guessopt.step.modes import estimate, first_run, second_run
from guessopt.step.trace import trace
from guessopt.tracing.functions import read_by
from guessopt.tracing.interceptor import Interceptor
from guessopt.tree import results_of, tensors_in

Closure = Callable[[], Any]
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12} | {
    f"{letter}i": 2 ** (10 * power) for power, letter in enumerate("kmgt", 1)
}


@dataclass(frozen=True)
class ModeCost:
    """The cost of one way to train.

    Attributes:
        peak: bytes at a step's peak, beyond the parameters and the base's state; None: out of memory.
        seconds: duration of a step without the update; None: out of memory.
        fits: whether the peak is within the budget.
    """

    mode: str
    peak: int | None
    seconds: float | None
    fits: bool


@dataclass(frozen=True)
class MemoryPlan:
    """The result of ``plan``; ``print`` it for a table.

    Attributes:
        modes: measured, one for each mode that the estimators allow.
        backprop: estimated: peak of the tensors that autograd saves plus gradients; time of three forward passes.
        checkpointed: estimated: backpropagation with checkpoints where a single value connects both sides, at the
            spacing that needs least memory; time of four forward passes.
        budget: bytes, or None.
        recommended: the fastest mode that fits; None if none does.
    """

    modes: tuple[ModeCost, ...]
    backprop: ModeCost
    checkpointed: ModeCost
    budget: int | None
    recommended: str | None

    @property
    def exact(self) -> ModeCost | None:
        """Backpropagation if its estimate fits, else checkpointed backpropagation if that fits, else None. Prefer it
        where it can be used: its gradients are exact."""
        return next((each for each in (self.backprop, self.checkpointed) if each.fits), None)

    def __str__(self) -> str:
        rows = [("memory", "peak", "seconds", "fits")]
        for each in (*self.modes, self.backprop, self.checkpointed):
            about = "" if each in self.modes else "about "
            peak = "out of memory" if each.peak is None else f"{about}{each.peak / 1e6:.1f} MB"
            rows.append((each.mode, peak, "-" if each.seconds is None else f"{each.seconds:.3g}", str(each.fits)))
        widths = [max(len(row[k]) for row in rows) for k in range(4)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        limit = "" if self.budget is None else f" within {self.budget / 1e6:.1f} MB"
        lines.append(f"recommended{limit}: {'none fits' if self.recommended is None else repr(self.recommended)}")
        if self.exact is not None:
            lines.append(f"{self.exact.mode} fits too, and its gradients are exact: prefer it where it can be used")
        return "\n".join(lines)


def plan(opt: HasEstimation, closure: Closure, budget: int | str | None = None) -> MemoryPlan:
    """Try each memory mode on the closure, and recommend the fastest that fits.

    Nothing is changed: gradients are discarded; buffers, random states, ``.grad`` and the optimizer are restored. Each
    mode steps twice: from scratch for its peak (decompositions included), and again for its time. If only some steps
    make a forward-mode run, the peak is that of such a step, and the time is the mean over steps. The peak comes from
    the CPU allocator's events; on a GPU from CUDA's counters, whose peak statistics are reset.

    Args:
        opt: an optimizer in any mode.
        closure: as for ``step``.
        budget: bytes that a step may take beyond the parameters and the base optimizer's state: an integer, or a string
            such as ``"8GB"`` or ``"512MiB"``; None: no limit.

    Raises:
        ValueError: ``budget`` is not a positive number of bytes.
        ClosureError: as ``step`` would.
        RuntimeError: torch's profiler is running; the CPU's peak is measured with this profiler.

    >>> import torch, guessopt
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    >>> opt = guessopt.GuessGradOptimizer(net.parameters(), torch.optim.SGD, lr=1e-3)
    >>> found = plan(opt, lambda: net(torch.ones(256, 64)).square().mean(), budget="1GB")
    >>> [each.mode for each in found.modes], found.recommended is not None
    (['store', 'replay', 'stream'], True)
    """
    return _plan(opt.estimation, closure, budget)


def _plan(est: Estimation, closure: Closure, budget: int | str | None) -> MemoryPlan:
    limit = None if budget is None else bytes_of(budget)
    if not est.devices and torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        raise RuntimeError("plan measures memory with torch's profiler, which is running: call it outside")
    memory, warned = est.memory, set(est.warned)
    try:
        with est.transaction(closure) as transaction, warnings.catch_warnings():
            warnings.simplefilter("ignore", GuessWarning)
            found = _measured(est, closure, transaction, limit)
            raise _Discard
    except _Discard:
        return found
    finally:
        est.memory, est.warned = memory, warned


class _Discard(Exception):
    """Ends a dry run: everything is put back."""


def choose(est: Estimation, closure: Closure, budget: int | None) -> str:
    """The mode for ``memory="auto"``: the fastest within the budget. ``budget`` None: the GPU's free memory; on a CPU,
    ``"store"``. Raises ``ValueError`` if no mode fits."""
    if budget is None:
        if not est.devices:
            return "store"
        budget = min(_free(est, device) for device in est.devices)
    found = _plan(est, closure, max(budget, 1))
    if found.recommended is None:
        least = min((each for each in found.modes if each.peak is not None), key=lambda e: e.peak or 0, default=None)
        needs = "every mode ran out of memory" if least is None else f"memory={least.mode!r} needs {least.peak}"
        raise ValueError(f"budget: no memory mode fits {budget} bytes ({needs}); use smaller batches, or a larger one")
    return found.recommended


def _free(est: Estimation, device: int) -> int:
    """Free bytes on a GPU. If the base has no state yet, two moments per parameter (Adam's) are subtracted."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    later = 0 if est.base.state else sum(2 * p.nbytes for p in est.by_position.values() if p.device.index == device)
    return torch.cuda.mem_get_info(device)[0] + cached - later


def bytes_of(budget: int | str) -> int:
    """A number of bytes; strings may carry a unit: kB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (of 1024).

    >>> bytes_of("8GB"), bytes_of("0.5 MiB"), bytes_of(100)
    (8000000000, 524288, 100)
    """
    found = float("nan")
    if isinstance(budget, int) and not isinstance(budget, bool):
        found = budget
    elif isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:([kmgt]i?)?b)?\s*", budget.lower())
        found = float(match[1]) * _UNITS[match[2] or ""] if match else found
    if not found >= 1:
        raise ValueError(
            f"budget: {budget!r} is no positive number of bytes; give an integer or a string such as '8GB' or '512MiB'"
        )
    return int(found)


def _measured(est: Estimation, closure: Closure, transaction: Transaction, limit: int | None) -> MemoryPlan:
    peak_of = cuda_peak if est.devices else cpu_peak
    steps, noise = est.steps, est.noise.snapshot()
    learns = any(e.learns for e in est.estimators)
    traced: list[Any] = []
    est.memory = "store"  # this mode refuses nothing

    def look() -> None:
        traced.append(
            trace(est, closure, transaction, finite=est.check_finite, together=False)
        )  # fmt: skip
        check_plan(est, traced[0])

    _, floor = peak_of(look)
    est.plans = traced
    period = max(e.period(traced[0].graph) for e in est.estimators)
    moving = -(-steps // period) * period  # a step with a forward-mode pass

    def restart() -> None:
        transaction.rewind()
        est.noise.restore(noise)
        est.steps = steps

    def step(mode: str, number: int = moving, uses: int = 16) -> None:  # 16 is past the probes of the first steps
        restart()
        traced[0].uses = uses
        est.memory, est.steps = mode, number
        if mode == "stream":
            found, records = first_run(est, closure, transaction)
            second_run(est, found, records, closure, transaction, deliver=lambda gradients: None)
            learn(est, found, records[0])
        else:
            estimate(est, closure, transaction)

    def fits(peak: int) -> bool:
        return limit is None or peak <= limit

    modes = []
    for mode in ("store", "replay", "stream"):
        if est.refused(mode, traced[0].graph):
            continue
        est.cache.restore({})
        try:
            peak = max(floor, peak_of(lambda: step(mode, uses=0))[1])  # noqa: B023 (called here); a first step's
            if learns:  # a step with the states that the first step has learned
                peak = max(peak, peak_of(lambda: step(mode))[1])  # noqa: B023
            seconds = _seconds(lambda: step(mode), est.devices)  # noqa: B023
            if period > 1:
                others = _seconds(lambda: step(mode, moving + 1), est.devices)  # noqa: B023
                seconds = (seconds + (period - 1) * others) / period
            modes.append(ModeCost(mode, peak, seconds, fits(peak)))
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
                raise
            modes.append(ModeCost(mode, None, None, False))
    restart()
    forward = _seconds(torch.no_grad()(closure), est.devices)
    restart()
    saved = _Saved(est.ids)
    saved.run(closure)
    sizes = {position: p.nbytes for position, p in est.by_position.items()}
    whole, cut = saved.backprop(sizes), saved.checkpointed(sizes)
    chosen = min((each for each in modes if each.fits), key=lambda each: each.seconds or 0.0, default=None)
    return MemoryPlan(
        tuple(modes),
        ModeCost("backprop", whole, 3 * forward, fits(whole)),
        ModeCost("checkpointed backprop", cut, 4 * forward, fits(cut)),
        limit,
        None if chosen is None else chosen.mode,
    )


def _seconds(work: Callable[[], object], devices: tuple[int, ...]) -> float:
    for device in devices:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    for device in devices:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def cpu_peak(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes that ``work`` leaves allocated, and bytes at its peak, from the CPU allocator's events."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()  # negative where memory is given back
        peak = max(peak, live)
    return live, peak


def cuda_peak(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes that ``work`` leaves allocated on all GPUs, and bytes at its peak, from the allocator's counters."""
    gc.collect()
    devices = range(torch.cuda.device_count())
    for device in devices:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = [torch.cuda.memory_allocated(device) for device in devices]
    work()
    for device in devices:
        torch.cuda.synchronize(device)
    left = sum(torch.cuda.memory_allocated(device) - b for device, b in zip(devices, before, strict=True))
    return left, sum(torch.cuda.max_memory_allocated(device) - b for device, b in zip(devices, before, strict=True))


class _Saved(Interceptor):
    """Runs the closure with autograd on, and counts the bytes that autograd would save, by call. Nothing is saved, and
    no gradient is computed."""

    def __init__(self, params: Mapping[int, int]) -> None:
        super().__init__(params)
        self.last: dict[int, int] = {}  # parameter -> the last call that reads it, where its gradient arrives
        self.made: list[int] = []  # bytes of each call's outputs
        self.spans: list[list[int]] = []  # of values with a gradient: the call that makes it, the last that reads it
        self.saved: list[int] = []
        self._found: dict[int, tuple[StorageWeakRef, int, int]] = {}
        self._values = WeakIdKeyDictionary()

    def call(
        self,
        index: int,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        outline: list[Any],
    ) -> Any:
        mine = [t for t in read_by(fn, tensors) if id(t) in self.params or id(t) in self.expressions]
        out = fn(*args, **kwargs)
        for m in mine:
            self.last |= dict.fromkeys(self.positions(m), index)
        for t in tensors:
            if t in self._values:
                self.spans[self._values[t]][1] = index
        results = [t for t in tensors_in((out,)) if t.requires_grad]
        self.made.append(sum(t.nbytes for t in results))
        if mine and len(mine) == len(tensors):
            self.express(results_of(out, tensors), mine)
        else:
            for t in results:
                self._values[t] = len(self.spans)
                self.spans.append([index, index, t.nbytes])
        return out

    def run(self, closure: Closure) -> None:
        with torch.autograd.graph.saved_tensors_hooks(self._note, _never):
            super().run(closure)
        gc.collect()
        self.saved = [0] * self.count
        for reference, size, index in self._found.values():
            if reference.expired():  # parameters, buffers and the batch are there anyway
                self.saved[index] += size

    def _note(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata not in self._found:
            self._found[reference.cdata] = reference, storage.nbytes(), self.count - 1

    def backprop(self, sizes: Mapping[int, int]) -> int:
        """Bytes at the peak of backward: saved tensors, parameter gradients so far, gradients of a call's outputs."""
        peak, saved, gradients = 0, sum(self.saved), 0
        arrive = self._arrivals(sizes)
        for index in reversed(range(self.count)):
            gradients += arrive.get(index, 0)
            peak = max(peak, saved + gradients + 2 * self.made[index])
            saved -= self.saved[index]
        return peak

    def checkpointed(self, sizes: Mapping[int, int]) -> int:
        """Bytes at the peak with checkpoints: only values at the cuts are kept; one piece at a time is run again."""
        cuts = self._cuts()
        every = [2**k for k in range(max(1, math.ceil(math.log2(len(cuts) + 1)) + 1))]
        return min(self.backprop(sizes), *(self._piecewise(cuts[::n], sizes) for n in every))

    def _piecewise(self, cuts: list[tuple[int, int]], sizes: Mapping[int, int]) -> int:
        peak, gradients, arrive = 0, 0, self._arrivals(sizes)
        kept, stop = sum(size for _, size in cuts), self.count
        for index, size in [*reversed(cuts), (-1, 0)]:
            piece = range(index + 1, stop)
            flying = 2 * max((self.made[k] for k in piece), default=0)
            before = gradients
            gradients += sum(arrive.get(k, 0) for k in piece)
            inside = sum(self.saved[k] for k in piece)
            peak = max(peak, kept + before + inside + flying, kept + gradients + flying)
            kept, stop = kept - size, index + 1
        return peak

    def _arrivals(self, sizes: Mapping[int, int]) -> dict[int, int]:
        found: dict[int, int] = {}
        for position, index in self.last.items():
            found[index] = found.get(index, 0) + sizes[position]
        return found

    def _cuts(self) -> list[tuple[int, int]]:
        """Calls after which a single value leads to the loss, and the value's bytes."""
        across, size = [0] * (self.count + 1), [0] * (self.count + 1)
        for start, stop, nbytes in self.spans:
            for changes, value in ((across, 1), (size, nbytes)):
                changes[start] += value
                changes[stop] -= value
        found, n, total = [], 0, 0
        for index in range(self.count):
            n, total = n + across[index], total + size[index]
            if n == 1:
                found.append((index, total))
        return found


def _never(_: Any) -> Tensor:
    raise AssertionError("nothing was saved: no gradient can be computed")
