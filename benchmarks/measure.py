"""What a step costs: time as a ratio to a baseline, and memory at its peak."""

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
    """A ratio of median times, and the quartiles of the ratios seen round by round."""

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
    """Time of each step over the baseline's: ratio of medians over interleaved rounds.

    A round times `block` steps of every method in turn, so that a slow moment of the machine meets all of them; the
    block is as long as the period at which estimators refresh what they cache, so that its cost is in."""
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
    """Seconds that a block of each step took, round by round; every other round goes through them backwards."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        for name in list(steps) if index % 2 == 0 else reversed(list(steps)):
            times[name].append(seconds(steps[name], block, device, clock))
    return times


def seconds(step: Step, repeats: int, device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """How long so many calls take."""
    _synchronize(device)
    start = clock()
    for _ in range(repeats):
        step()
    _synchronize(device)
    return clock() - start


def ratio(times: list[float], base: list[float]) -> Ratio:
    """Of two lists that were measured side by side."""
    each = [t / b for t, b in zip(times, base, strict=True)]
    low, _, high = statistics.quantiles(each, n=4, method="inclusive")
    return Ratio(statistics.median(times) / statistics.median(base), low, high)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Stopwatch:
    """Adds up time by phase. Phases nest: what an inner one takes is not the outer one's.

    Within a phase named in ``whole`` nothing is told apart.
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

    Counted from before the learner exists, so that gradients, activations, guesses, temporaries and whatever a method
    keeps between steps are all in. The step measured is the second one: nothing is being set up or refreshed. The
    model must exist before: `make_learner` only wraps it.
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
    """Bytes above the parameters: the most at once over all steps, what lasts between them, and of this the
    optimizer's state (``state``) and ``.grad`` (``gradients``, which a training loop may drop).
    """

    peak: int
    kept: int
    state: int
    gradients: int


def peaks(
    make_learner: Callable[[], Learner], x: Tensor, y: Tensor, steps: int, state: Callable[[Learner], int]
) -> Peaks:
    """Of so many steps from the first on: tracing, decompositions, updates and whatever a method keeps are all in.

    Counted from before the learner exists; the model and the batch must exist before. `state` tells the bytes of the
    optimizer's state, which the first update allocates.
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
    """Of the base optimizer's state as it is: AdamW's two moments and step counts, MeZO's nothing."""
    optimizer = getattr(learner.optimizer, "base", learner.optimizer)
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
