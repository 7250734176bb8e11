"""The cost of a step: its time over that of a baseline, and its peak memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.training import Learner
from guessopt.memory_plan import cpu_peak, cuda_peak

Step = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """A ratio of median times; ``low`` and ``high``: quartiles of the ratios of single rounds."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({self.low:.2f}-{self.high:.2f})"


def time_ratios(
    steps: Mapping[str, Step],
    *,
    baseline: str,
    rounds: int = 7,
    block: int = 50,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Ratio]:
    """Time of each step over that of the baseline: the ratio of medians over the rounds.

    A round times ``block`` steps of every method in turn, so that a slow moment of the machine meets all methods. A
    block is as long as the period after which estimators make their cached bases again, so that it contains that cost.
    """
    for step in steps.values():
        seconds(step, 3, device)  # warm-up
    times = interleaved(steps, rounds=rounds, block=block, device=device, clock=clock)
    return {name: ratio(each, times[baseline]) for name, each in times.items()}


def interleaved(
    steps: Mapping[str, Step],
    *,
    rounds: int,
    block: int = 1,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of a block of each step, by round. Every second round takes the steps in the opposite order."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        for name in list(steps) if index % 2 == 0 else reversed(list(steps)):
            times[name].append(seconds(steps[name], block, device, clock))
    return times


def seconds(step: Step, repeats: int, device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that so many calls take."""
    _synchronize(device)
    start = clock()
    for _ in range(repeats):
        step()
    _synchronize(device)
    return clock() - start


def ratio(times: list[float], base: list[float]) -> Ratio:
    """Ratio of two lists of times, which were measured in turns."""
    each = [t / b for t, b in zip(times, base, strict=True)]
    low, _, high = statistics.quantiles(each, n=4, method="inclusive")
    return Ratio(statistics.median(times) / statistics.median(base), low, high)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Stopwatch:
    """Adds up time by phase. Phases nest: the time of an inner phase does not count for the outer one.

    A phase named in ``whole`` has no inner phases: all its time is its own.
    """

    def __init__(self, device: str, whole: tuple[str, ...] = ()) -> None:
        self.device, self.whole = device, whole
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if any(phase in self.whole for phase in self._open):
            yield
            return
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        _synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last lap."""
        found, self._seconds = dict(self._seconds), defaultdict(float)
        return found


def peak_memory(make_learner: Callable[[], Learner], x: Tensor, y: Tensor) -> int:
    """Peak bytes of one training step above the parameters, the batch and the base optimizer's state.

    The count starts before the learner exists. So gradients, activations, guesses, temporaries, and all that a method
    keeps between steps are in it. The second step is measured, in which nothing is set up. ``make_learner`` only wraps
    a model that exists already.
    """
    learners: list[Learner] = []

    def prepare() -> None:
        learners.append(make_learner())
        learners[0].step(x, y)
        learners[0].optimizer.zero_grad()

    recorder = cuda_peak if x.is_cuda else cpu_peak
    kept, _ = recorder(prepare)
    _, peak = recorder(lambda: learners[0].step(x, y))
    return kept + peak - _state_bytes(learners[0])


@dataclass(frozen=True)
class Peaks:
    """Bytes above the parameters.

    Attributes:
        peak: the most at any moment of all steps.
        kept: between two steps; of these, ``state`` of the optimizer and ``gradients`` (``.grad``).
    """

    peak: int
    kept: int
    state: int
    gradients: int


def peaks(
    make_learner: Callable[[], Learner], x: Tensor, y: Tensor, steps: int, state: Callable[[Learner], int]
) -> Peaks:
    """Peaks over so many steps from the first one on, with tracing, decompositions and updates.

    The count starts before the learner exists, and after the model and the batch exist. ``state`` returns the bytes of
    the optimizer's state, which the first update allocates.
    """
    learners: list[Learner] = []
    recorder = cuda_peak if x.is_cuda else cpu_peak

    def make() -> None:
        learners.append(make_learner())
        gc.collect()

    def step() -> None:
        learners[0].step(x, y)
        gc.collect()

    live, _ = recorder(make)
    peak = live
    for _ in range(steps):
        left, top = recorder(step)
        peak, live = max(peak, live + top), live + left
    gradients = [p.grad for p in learners[0].model.parameters() if p.grad is not None]
    return Peaks(peak, live, state(learners[0]), sum(g.nbytes for g in gradients))


def _state_bytes(learner: Learner) -> int:
    """Bytes of the base optimizer's state: AdamW's moments and step counts; MeZO has none."""
    optimizer = getattr(learner.optimizer, "base", learner.optimizer)
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
