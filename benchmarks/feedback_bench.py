"""How the runs of the experiment ``feedback`` are made and timed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F

from benchmarks.data import Dataset
from benchmarks.feedback_runs import LABELS, METHODS, PROBLEMS, Cell, Cells, Key, Look, Pace, Runs
from benchmarks.measure import seconds, time_ratios
from benchmarks.report import print_table
from benchmarks.training import Backprop, Learner, batches_of, clock_of, evaluate, fit, is_due
from guessopt.diagnostics import cosine


class Bench(Runs):
    """The runs so far, and how to make more."""

    def __init__(self, args: argparse.Namespace, lrs: tuple[float, ...], cells: Cells, pace: Pace) -> None:
        super().__init__(lrs, cells, {}, pace)
        self.root, self.device, self.quick = args.data_root, args.device, args.quick
        self.data = cache(lambda problem: PROBLEMS[problem].data(self.root, self.quick).to(self.device))
        for problem in {cell.problem for cell in cells.values()}:
            self._weigh(problem)

    def _weigh(self, problem: str) -> None:
        if PROBLEMS[problem].judge == "loss" and problem not in self.unigram:
            self.unigram[problem] = unigram_loss(self.data(problem))

    def missing(self, problem: str, methods: tuple[str, ...], seeds: int) -> Iterator[Key]:
        """The runs still to be made: seed 0 at all rates, and after them the other seeds at the best rate."""
        for method in methods:
            asked = {lr for name, each, lr, seed in self.cells if (name, each, seed) == (problem, method, 0)}
            while new := [lr for lr in self.grid(problem, method) if lr not in asked]:
                asked.add(new[0])  # the grid may grow with its result
                yield problem, method, new[0], 0
        for seed in range(1, seeds):
            for method in methods:
                key = (problem, method, self.best(problem, method), seed)
                if key not in self.cells:
                    yield key

    def learner(self, problem: str, method: str, seed: int, lr: float = 1e-4) -> Learner:
        torch.manual_seed(seed)
        return METHODS[method].learner(PROBLEMS[problem].network().to(self.device), lr)

    def train(self, key: Key) -> Cell:
        name, method, lr, seed = key
        data, settings = self.data(name), PROBLEMS[name].settings(self.quick)
        self._weigh(name)
        learner, steps, looks = self.learner(name, method, seed, lr), settings["steps"], list[Look]()

        def look(step: int) -> None:
            measured = is_due(step, steps, min(2, settings["looks"]))
            looks.append(look_at(learner, step, data, settings["judged"], settings["batch"] if measured else 0))

        outcome = fit(
            learner,
            batches_of(data, settings["batch"], torch.Generator().manual_seed(seed)),
            steps,
            looks=[step for step in range(1, steps + 1) if is_due(step, steps, settings["looks"])],
            look=look,
            rate=(lambda step: lr * (1 - (step - 1) / steps)) if settings["decays"] else None,
            label=f"{name} {LABELS[method]}",
        )
        failed = outcome.failed or not math.isfinite(looks[-1].loss)
        looks = [look for look in looks if math.isfinite(look.loss)]
        return Cell(name, method, lr, seed, settings, looks, outcome.seconds, failed)

    def batch(self, problem: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Any one batch."""
        return next(batches_of(self.data(problem), PROBLEMS[problem].settings(self.quick)["batch"], torch.Generator()))

    def measure(self, problem: str, methods: tuple[str, ...]) -> bool:
        """Measures the paces that are missing, in turns; whether there were any."""
        known = self.pace.setdefault(problem, {})
        missing = [m for m in methods if m not in known and m != "backprop"]
        if missing:
            x, y = self.batch(problem)
            steps = {m: partial(self.learner(problem, m, seed=0).step, x, y) for m in ("backprop", *missing)}
            rounds, block = (2, 1) if self.quick else (9, 16)  # forward-mode passes are at most 16 steps apart
            clock = clock_of(self.device)
            times = time_ratios(steps, baseline="backprop", rounds=rounds, block=block, device=self.device, clock=clock)
            known |= {method: times[method].ratio for method in missing}
        return bool(missing)

    def estimate(self, problems: list[str], methods: tuple[str, ...], seeds: dict[str, int]) -> None:
        """Prints how long the missing runs will take, from a few steps of each."""
        rows, total = [], 0.0
        for name in problems:
            steps = PROBLEMS[name].settings(self.quick)["steps"]
            for method in methods:
                wanted = len(self.grid(name, method)) + seeds[name] - 1
                left = wanted - sum(key[:2] == (name, method) for key in self.cells)
                if left <= 0:
                    continue
                step = partial(self.learner(name, method, seed=0).step, *self.batch(name))
                seconds(step, 4, self.device)  # tracing and its probes
                each = seconds(step, 4, self.device) / 4
                total += left * each * steps
                rows.append([f"{name} {LABELS[method]}", str(left), f"{1e3 * each:.0f}", f"{each * steps / 60:.1f}"])
        print_table("Estimated time", ["problem, method", "runs", "ms/step", "min/run"], rows)
        print(f"{total / 3600:.1f} h in all, one after another, without the looks at accuracy and cosine")


def look_at(learner: Learner, step: int, data: Dataset, judged: int, batch: int) -> Look:
    """Accuracies and loss on the first ``judged`` examples; the cosine on the first ``batch`` (0: no cosine)."""
    learner.model.eval()
    train, _ = evaluate(learner.model, data.x[:judged], data.y[:judged], chunk=250)
    test, loss = evaluate(learner.model, data.x_test[:judged], data.y_test[:judged], chunk=250)
    learner.model.train()
    if isinstance(learner, Backprop) or not batch:
        return Look(step, train, test, loss)
    found = cosine(learner.optimizer, lambda: learner.loss(data.x[:batch], data.y[:batch]))
    return Look(step, train, test, loss, found.total, found.per_site)


def unigram_loss(data: Dataset) -> float:
    """Loss on the test characters of a model that predicts the training set's frequencies (one added to each count)."""
    counts = torch.bincount(data.y.flatten(), minlength=int(data.y_test.max()) + 1) + 1
    return float(F.nll_loss((counts / counts.sum()).log().expand(data.y_test.numel(), -1), data.y_test.flatten()))
