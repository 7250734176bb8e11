"""What the fine-tuning scripts share: the methods, one learning-rate grid, a resumable file, a table, a picture."""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from benchmarks.baselines import MeZO
from benchmarks.measure import Ratio, peak_memory, time_ratios
from benchmarks.report import Table, spread, write_json
from benchmarks.training import ESTIMATORS, Learner
from guessopt import ClosureError, GuessGradOptimizer
from guessopt.diagnostics import cosine

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """Of one task. ``passes``: each method's budget in passes through the network; ``train``, ``validation``, ``test``:
    examples; ``looks``: evaluations along a run; ``grid``: the learning rates' lowest and highest level."""

    passes: int
    batch: int
    train: int
    validation: int
    test: int
    looks: int = 6
    grid: tuple[int, int] = (-16, 0)


@dataclass(frozen=True)
class Problem:
    """A pretrained model, of which what is to be tuned requires gradients, and data.

    The loss is the cross-entropy of ``model(x)``, class scores in dimension 1, with ``y``.

    Attributes:
        blocks: of a model, the modules to checkpoint.
        note: what a reader must know of model and data.
        head: the name of the last layer, where it is tuned.
    """

    model: nn.Module
    blocks: Callable[[Any], Iterable[nn.Module]]
    train: Pair
    validation: Pair
    test: Pair
    note: str
    head: str | None = None

    @property
    def tuned(self) -> float:
        """The share of the parameters that is tuned."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return sum(n for n, wanted in sizes if wanted) / sum(n for n, _ in sizes)

    def to(self, device: str) -> Problem:
        def moved(pair: Pair) -> Pair:
            return pair[0].to(device), pair[1].to(device)

        train, validation, test = (moved(pair) for pair in (self.train, self.validation, self.test))
        return replace(self, model=self.model.to(device), train=train, validation=validation, test=test)


def split(x: Tensor, y: Tensor, settings: Settings) -> tuple[Pair, Pair, Pair]:
    """The first examples in an order of their own for training, the next for validation; the last are the test set."""
    known = len(x) - settings.test
    order = torch.randperm(known, generator=torch.Generator().manual_seed(0))
    train, validation = order[: settings.train], order[settings.train : settings.train + settings.validation]
    return (x[train], y[train]), (x[validation], y[validation]), (x[known:], y[known:])


# --- the methods ------------------------------------------------------------------------------------------------------


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class Exact(Learner):
    """Backpropagation; with ``blocks``, what is inside each of them is forgotten and computed again."""

    def __init__(self, model: nn.Module, lr: float, blocks: Iterable[nn.Module] = ()) -> None:
        super().__init__(model)
        self.optimizer = AdamW(trainable(model), lr=lr)
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(x, y).backward()
        self.optimizer.step()

    def cosine(self, x: Tensor, y: Tensor) -> float:
        return 1.0


class Forward(Learner):
    """An optimizer that needs the loss as a function, and no backward pass."""

    optimizer: Any

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        super().__init__(model)
        self.optimizer = optimizer

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.step(lambda: self.loss(x, y))

    def cosine(self, x: Tensor, y: Tensor) -> float:
        assert isinstance(self.optimizer, GuessGradOptimizer)
        return cosine(self.optimizer, lambda: self.loss(x, y)).total


def head_alone(problem: Problem, model: nn.Module, lr: float) -> Learner:
    """The control: all else stays as it is, so that the gradient is exact without backpropagation."""
    assert problem.head is not None
    model.requires_grad_(False).get_submodule(problem.head).requires_grad_(True)
    return Exact(model, lr)


def guess(estimator: str, **options: Any) -> Callable[[Problem, nn.Module, float], Learner]:
    def make(problem: Problem, model: nn.Module, lr: float) -> Learner:
        chosen = ESTIMATORS[estimator]()
        return Forward(model, GuessGradOptimizer(trainable(model), AdamW, chosen, lr=lr, **options))

    return make


@dataclass(frozen=True)
class Method:
    """``make`` takes problem, model and learning rate. A step costs ``passes``, and ``tuned`` times the share of the
    weights that is tuned. ``follows``: the method whose gradients, and so runs, are this one's."""

    label: str
    make: Callable[[Problem, nn.Module, float], Learner]
    passes: float
    tuned: float = 0.0
    follows: str | None = None

    def steps(self, settings: Settings, problem: Problem) -> int:
        return int(settings.passes / (self.passes + self.tuned * problem.tuned))


METHODS = {
    "backprop": Method("backprop", lambda problem, model, lr: Exact(model, lr), 2, 1),
    "checkpointed": Method(
        "checkpointed backprop",
        lambda problem, model, lr: Exact(model, lr, problem.blocks(model)),
        3,
        1,
        follows="backprop",
    ),
    "head": Method("head alone", head_alone, 1),
    "mezo": Method("MeZO", lambda problem, model, lr: Forward(model, MeZO(trainable(model), lr)), 2),
    "directional_descent": Method("forward gradient", guess("directional_descent"), 2),
    "w_perp": Method("W-perp", guess("w_perp", exact_last=True), 2, 1),
    "w_perp_stream": Method(
        "W-perp, stream", guess("w_perp", exact_last=True, memory="stream"), 3, 1, follows="w_perp"
    ),
    "learned_feedback": Method("learned feedback", guess("learned_feedback", memory="replay"), 4, 1),
}
"""A pass is the network evaluated once, or tangents or gradients carried through it once; gradients of parameters cost
another one times the share of the weights tuned. Along a residual stream, as all these models have, learned feedback
carries no tangents; it runs each block once more, to keep no more than one, and carries gradients through it twice."""


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training run: test accuracy and loss after each of ``steps`` (the first is 0: before tuning); validation
    accuracy at the end. The learning rate is ``10 ** (level / 2)``."""

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
        """Test accuracy after so many steps, between two looks in proportion."""
        index = next((k for k, s in enumerate(self.steps) if s >= step), len(self.steps) - 1)
        if self.steps[index] <= step:
            return self.test[index]
        low, high = self.steps[index - 1], self.steps[index]
        part = (step - low) / (high - low)
        return (1 - part) * self.test[index - 1] + part * self.test[index]


def rate(level: int) -> float:
    """The learning rates' grid: two a decade."""
    return float(f"{10 ** (level / 2):.2g}")


@torch.no_grad()
def evaluate(model: nn.Module, pair: Pair) -> tuple[float, float]:
    """Accuracy and mean loss (a diverged one is reported as the largest single-precision number)."""
    hits, loss = 0.0, 0.0
    for x, y in zip(pair[0].split(100), pair[1].split(100), strict=True):
        scores = model(x)
        hits += (scores.argmax(1) == y).double().mean().item() * len(x)
        loss += nn.functional.cross_entropy(scores, y).item() * len(x)
    largest = torch.finfo(torch.float32).max
    return hits / len(pair[0]), min(torch.tensor(loss / len(pair[0])).nan_to_num(largest, largest).item(), largest)


def tune(problem: Problem, method: str, level: int, seed: int, settings: Settings) -> Run:
    """A run of a method's whole budget. One whose loss is no longer finite is left where it stopped."""
    torch.manual_seed(seed)
    learner = METHODS[method].make(problem, copy.deepcopy(problem.model), rate(level))
    total, generator = METHODS[method].steps(settings, problem), torch.Generator().manual_seed(seed)
    looks = {round(total * k / settings.looks) for k in range(settings.looks + 1)}
    found, alive, (x, y) = Run(method, level, seed), True, problem.train
    for step in tqdm(range(total + 1), desc=f"{METHODS[method].label:>22} {rate(level):g}", unit="step", disable=None):
        if step in looks:
            accuracy, loss = evaluate(learner.model, problem.test)
            found.steps.append(step)
            found.test.append(accuracy)
            found.loss.append(loss)
        index = torch.randint(len(x), (settings.batch,), generator=generator).to(x.device)
        if step < total and alive:
            try:
                learner.step(x[index], y[index])
            except ClosureError:
                alive = False
    validation, _ = evaluate(learner.model, problem.validation)
    return Run(**{**asdict(found), "validation": validation})


START, STRIDE = -6, 2


def best_level(score: Callable[[int], float], low: int, high: int) -> int:
    """Decades from 1e-3 outward until the best has a worse one on either side, then its neighbours half a decade off.
    The same grid for every method; only as much of it is run as it takes. Of equals the lowest is best: rates that all
    end in chance are too high."""
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
    """A step's time over a backprop step's, its passes, and its peak memory above parameters and optimizer state."""

    time: Ratio
    steps: int
    peak_bytes: int


@dataclass
class Results:
    """Of one task, as in its file."""

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
        """The runs at a method's learning rate, a seed each."""
        leader = METHODS[method].follows or method
        level = self.levels.get(leader)
        return [run for (name, at, _), run in self.runs.items() if name == leader and at == level]


@dataclass(frozen=True)
class Session:
    """A task under way: ``save`` is called after every run; times are medians of so many ``rounds``."""

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
        """Costs, the sweep on seed 0, then the other seeds at the best learning rate; nothing is run twice."""
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
        return METHODS[method].make(self.problem, copy.deepcopy(self.problem.model), 1e-6)

    def costs(self, methods: Sequence[str], block: int = 4) -> dict[str, Cost]:
        x, y = (part[: self.settings.batch] for part in self.problem.train)
        named = {"backprop": METHODS["backprop"], **{m: METHODS[m] for m in methods}}
        models = {m: copy.deepcopy(self.problem.model) for m in named}
        peaks = {m: peak_memory(partial(v.make, self.problem, models[m], 1e-6), x, y) for m, v in named.items()}
        steps = {m: partial(self.learner(m).step, x, y) for m in named}
        times = time_ratios(steps, baseline="backprop", rounds=self.rounds, block=block, device=x.device.type)
        return {m: Cost(times[m], METHODS[m].steps(self.settings, self.problem), peaks[m]) for m in methods}

    def seconds(self, methods: Sequence[str], seeds: int, sweep: int = 6) -> dict[str, float]:
        """How long a method's missing runs will take, judged by its fifth to seventh step and one evaluation."""
        x, y = (part[: self.settings.batch] for part in self.problem.train)
        found: dict[str, float] = {}
        start = time.perf_counter()
        evaluate(self.problem.model, (x, y))
        each = (time.perf_counter() - start) / len(x)
        looks = each * (self.settings.test * (self.settings.looks + 1) + self.settings.validation)
        for method in (m for m in methods if METHODS[m].follows is None):
            done = sum(name == method for name, *_ in self.results.runs)
            finished = len(self.results.finished(method))
            runs = seeds - finished if method in self.results.levels else max(sweep - done, 1) + seeds - 1
            learner = self.learner(method)
            for _ in range(4):  # where the examples lie is looked at again before the 2nd, 4th and 8th step
                learner.step(x, y)
            start = time.perf_counter()
            for _ in range(3):
                learner.step(x, y)
            step = (time.perf_counter() - start) / 3
            found[method] = max(runs, 0) * (METHODS[method].steps(self.settings, self.problem) * step + looks)
        return found


# --- the file, the table, the picture ---------------------------------------------------------------------------------


def open_file(path: Path, args: argparse.Namespace, settings: Settings, new: Results) -> tuple[Results, Any]:
    """What an earlier call with the same settings left (else ``new``), and a function that writes it."""
    recorded = {**asdict(settings), "grid": list(settings.grid), "device": args.device}
    results = new
    if path.is_file() and not args.fresh and not args.quick:
        content = json.loads(path.read_text())
        if content["settings"] == recorded:
            results = Results.of(content["figures"])

    def save() -> None:
        seeds = sorted({run.seed for run in results.runs.values()})
        write_json(path, args, seeds=seeds, settings=recorded, figures=results.figures())

    return results, save


def shown(results: Results) -> list[str]:
    """Methods with something to show, in the order of ``METHODS``."""
    return [m for m in METHODS if m in results.costs and results.finished(m)]


def time_budget(results: Results) -> float:
    """In backprop steps: the time that the quickest method takes for its passes, so that every one has got so far."""
    return min(results.costs[m].steps * results.costs[m].time.ratio for m in shown(results))


def table(results: Results, settings: Mapping[str, Any]) -> Table:
    rows, budget = [], time_budget(results)
    for method in shown(results):
        cost, runs = results.costs[method], results.finished(method)
        rows.append(
            [
                METHODS[method].label,
                f"{rate(runs[0].level):.0e}".replace("e-0", "e-"),
                spread([run.at(cost.steps) for run in runs]),
                spread([run.at(budget / cost.time.ratio) for run in runs]),
                str(cost.steps),
                f"{cost.time.ratio:.2f}",
                f"{cost.peak_bytes / 1e6:.1f}",
            ]
        )
    columns = ["method", "lr", "equal\npasses", "equal\ntime", "steps", "time", "peak\nMB"]
    before = next(iter(results.runs.values())).test[0]
    seeds = max(len(results.finished(m)) for m in shown(results))
    note = (
        f"{results.note} Test accuracy before tuning {before:.3f}; {100 * results.tuned:.2g} % of the weights tuned; "
        f"{seeds} seed(s), mean ± standard deviation. Equal passes: {settings['passes']} for each method; equal time: "
        f"that of {budget:.0f} backprop steps. time: a step's over a backprop step's, interleaved medians. peak MB: a "
        "step's, above parameters and optimizer state."
    )
    return Table(results.title, columns, rows, note)


def plot(results: Results, path: Path) -> None:
    """Test accuracy over passes, over time, and against peak memory; the mean over seeds in a band of all of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", sharey=True)
    for number, method in enumerate(METHODS):
        if method not in shown(results):
            continue
        cost, runs, label = results.costs[method], results.finished(method), METHODS[method].label
        ends = [run.at(cost.steps) for run in runs]
        axes[2].plot(cost.peak_bytes / 1e6, mean(ends), "o", color=f"C{number}", label=label)
        if METHODS[method].follows is not None:
            continue
        columns = list(zip(*(run.test for run in runs), strict=True))
        for axis, unit in ((axes[0], 1 / cost.steps), (axes[1], cost.time.ratio)):
            x = [step * unit for step in runs[0].steps]
            axis.plot(x, [mean(c) for c in columns], color=f"C{number}", label=label)
            axis.fill_between(x, [*map(min, columns)], [*map(max, columns)], color=f"C{number}", alpha=0.2, linewidth=0)
    axes[0].set(title=results.title, xlabel="share of the passes", ylabel="test accuracy")
    axes[1].set(title="over time", xlabel="time, in backprop steps")
    axes[2].set(title="against memory", xlabel="peak MB of a step", xscale="log")
    axes[2].legend(fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
