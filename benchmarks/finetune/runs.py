"""The runs of a fine-tuning task: training, the search for a learning rate, costs of a step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import training
from benchmarks.finetune.problem import METHODS, Pair, Problem, Settings
from benchmarks.measure import Ratio, peak_memory, seconds, time_ratios
from benchmarks.training import Learner, fit


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        level: the learning rate is ``rate(level)``.
        validation: accuracy at the end.
        steps: when test accuracy and loss were measured; the first is 0, before tuning.
    """

    method: str
    level: int
    seed: int
    validation: float = 0.0
    steps: list[int] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int, int]:
        return self.method, self.level, self.seed

    def at(self, step: float) -> float:
        """Test accuracy after so many steps, interpolated between two looks."""
        index = next((k for k, s in enumerate(self.steps) if s >= step), len(self.steps) - 1)
        if self.steps[index] <= step:
            return self.test[index]
        low, high = self.steps[index - 1], self.steps[index]
        part = (step - low) / (high - low)
        return (1 - part) * self.test[index - 1] + part * self.test[index]


def rate(level: int) -> float:
    """The learning rate ``10 ** (level / 2)``: two levels for a decade."""
    return float(f"{10 ** (level / 2):.2g}")


def evaluate(model: nn.Module, pair: Pair) -> tuple[float, float]:
    """Accuracy and mean loss. A loss that is not finite is reported as the largest number of float32."""
    accuracy, loss = training.evaluate(model, *pair, chunk=100)
    largest = torch.finfo(torch.float32).max
    return accuracy, min(torch.tensor(loss).nan_to_num(largest, largest).item(), largest)


def examples(x: Tensor, y: Tensor, size: int, generator: torch.Generator) -> Iterator[Pair]:
    """Batches without end, drawn with replacement."""
    while True:
        index = torch.randint(len(x), (size,), generator=generator).to(x.device)
        yield x[index], y[index]


def tune(problem: Problem, method: str, level: int, seed: int, settings: Settings) -> Run:
    """A run of a method's whole budget. If the loss is no longer finite, the run keeps the parameters that it has."""
    torch.manual_seed(seed)
    learner = METHODS[method].learner(problem, copy.deepcopy(problem.model), rate(level))
    total, found = METHODS[method].steps(settings, problem), Run(method, level, seed)

    def look(step: int) -> None:
        accuracy, loss = evaluate(learner.model, problem.test)
        found.steps.append(step)
        found.test.append(accuracy)
        found.loss.append(loss)

    looks = sorted({round(total * k / settings.looks) for k in range(settings.looks + 1)})
    batches = examples(*problem.train, settings.batch, torch.Generator().manual_seed(seed))
    fit(learner, batches, total, looks=looks, look=look, label=f"{METHODS[method].label} {rate(level):g}")
    for step in looks[len(found.steps) :]:  # those that a failed run has missed
        look(step)
    validation, _ = evaluate(learner.model, problem.validation)
    return Run(**{**asdict(found), "validation": validation})


START, STRIDE = -6, 2


def best_level(score: Callable[[int], float], low: int, high: int) -> int:
    """The level with the best score, found with few runs.

    First decades from 1e-3 outward, until the best has a worse one on either side; then the levels half a decade to
    either side of the best. Of equal scores the lowest level wins: rates that all end in chance are too high.
    """
    found: dict[int, float] = {}

    def look(*levels: int) -> int:
        found.update({level: score(level) for level in levels if low <= level <= high and level not in found})
        return max(found, key=lambda level: (found[level], -level))

    best = look(START, START - STRIDE, START + STRIDE)
    while (further := look(best - STRIDE, best + STRIDE)) != best:
        best = further
    return look(best - 1, best + 1)


@dataclass(frozen=True)
class Cost:
    """Time of a step over that of a backprop step, steps of the budget, and peak memory of a step (above parameters and
    optimizer state)."""

    time: Ratio
    steps: int
    peak_bytes: int


@dataclass
class Results:
    """Results of one task, as in its file."""

    title: str
    note: str
    tuned: float
    costs: dict[str, Cost] = field(default_factory=dict)
    levels: dict[str, int] = field(default_factory=dict)
    runs: dict[tuple[str, int, int], Run] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        runs = [asdict(self.runs[key]) for key in sorted(self.runs)]
        return {**{k: v for k, v in vars(self).items() if k != "costs"}, "costs": asdict(self)["costs"], "runs": runs}

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Results:
        costs = {name: Cost(**{**cost, "time": Ratio(**cost["time"])}) for name, cost in figures["costs"].items()}
        runs = {run.key: run for run in (Run(**each) for each in figures["runs"])}
        return cls(**{**figures, "costs": costs, "runs": runs})

    def finished(self, method: str) -> list[Run]:
        """The runs at a method's learning rate, one for each seed."""
        leader = METHODS[method].follows or method
        level = self.levels.get(leader)
        return [run for (name, at, _), run in self.runs.items() if name == leader and at == level]


@dataclass(frozen=True)
class Session:
    """A task under way. ``save`` is called after every run; ``rounds``: of timed steps."""

    problem: Problem
    settings: Settings
    results: Results
    save: Callable[[], None]
    rounds: int = 5

    def run(self, method: str, level: int, seed: int) -> Run:
        key = method, level, seed
        if key not in self.results.runs:
            self.results.runs[key] = tune(self.problem, method, level, seed, self.settings)
            self.save()
        return self.results.runs[key]

    def compare(self, methods: Sequence[str], seeds: int) -> None:
        """Costs, the search on seed 0, then the other seeds at the best learning rate. Nothing is run twice."""
        missing = [m for m in methods if m not in self.results.costs]
        if missing:
            self.results.costs |= self.costs(missing)
            self.save()
        for method in methods:
            if METHODS[method].follows is None:
                level = best_level(partial(self.score, method), *self.settings.grid)
                self.results.levels[method] = level
                for seed in range(1, seeds):
                    self.run(method, level, seed)
                self.save()

    def score(self, method: str, level: int) -> float:
        return self.run(method, level, 0).validation

    def learner(self, method: str) -> Learner:
        return METHODS[method].learner(self.problem, copy.deepcopy(self.problem.model), 1e-6)

    def costs(self, methods: Sequence[str], block: int = 4) -> dict[str, Cost]:
        x, y = (part[: self.settings.batch] for part in self.problem.train)
        named = {"backprop": METHODS["backprop"], **{m: METHODS[m] for m in methods}}
        models = {m: copy.deepcopy(self.problem.model) for m in named}
        peaks = {m: peak_memory(partial(v.learner, self.problem, models[m], 1e-6), x, y) for m, v in named.items()}
        steps = {m: partial(self.learner(m).step, x, y) for m in named}
        times = time_ratios(steps, baseline="backprop", rounds=self.rounds, block=block, device=x.device.type)
        return {m: Cost(times[m], METHODS[m].steps(self.settings, self.problem), peaks[m]) for m in methods}

    def seconds(self, methods: Sequence[str], seeds: int, sweep: int = 6) -> dict[str, float]:
        """Seconds of each method's missing runs, judged by three of its steps and one evaluation."""
        x, y = (part[: self.settings.batch] for part in self.problem.train)
        found: dict[str, float] = {}
        device = x.device.type
        each = seconds(partial(evaluate, self.problem.model, (x, y)), 1, device) / len(x)
        looks = each * (self.settings.test * (self.settings.looks + 1) + self.settings.validation)
        for method in (m for m in methods if METHODS[m].follows is None):
            done = sum(name == method for name, *_ in self.results.runs)
            finished = len(self.results.finished(method))
            runs = seeds - finished if method in self.results.levels else max(sweep - done, 1) + seeds - 1
            step = partial(self.learner(method).step, x, y)
            seconds(step, 4, device)  # steps 1, 2 and 4 look for the examples' dimension, and take longer
            one = seconds(step, 3, device) / 3
            found[method] = max(runs, 0) * (METHODS[method].steps(self.settings, self.problem) * one + looks)
        return found
