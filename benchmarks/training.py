"""The training loop of every experiment. Two methods differ only in how they make their gradients."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.data import Dataset
from guessopt import ClosureError
from guessopt.diagnostics import cosine

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """The settings that all methods of one experiment share. The defaults are those of Wang, section 4.1."""

    epochs: int = 300
    batch: int = 512
    lr: float = 1e-4


class Learner(ABC):
    """A model, its loss, and the optimizer that trains it.

    The loss is the cross-entropy of ``model(x)``, class scores ``[N, C]`` or ``[N, C, T]``, with the classes ``y``.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)

    def set_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @abstractmethod
    def step(self, x: Tensor, y: Tensor) -> None:
        """One update on one batch."""

    @abstractmethod
    def cosine(self, x: Tensor, y: Tensor) -> float:
        """Cosine between the method's gradient on the batch and the true gradient."""


class Backprop(Learner):
    """The usual loop of PyTorch."""

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(x, y).backward()
        self.optimizer.step()

    def cosine(self, x: Tensor, y: Tensor) -> float:
        return 1.0


class Forward(Learner):
    """The same loop with an optimizer that evaluates the loss itself, such as ``GuessGradOptimizer``."""

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self.optimizer.step(lambda: self.loss(x, y))

    def cosine(self, x: Tensor, y: Tensor) -> float:
        return cosine(self.optimizer, lambda: self.loss(x, y)).total


# --- the loop ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a run of ``fit`` ended.

    Attributes:
        steps: updates made.
        seconds: time spent on the updates, without the looks.
        failed: the loss was no longer finite, so the run stopped early.
    """

    steps: int
    seconds: float
    failed: bool = False


def fit(
    learner: Learner,
    batches: Iterable[Batch],
    steps: int,
    *,
    looks: Collection[int] = (),
    look: Callable[[int], object] = lambda step: None,
    rate: Callable[[int], float] | None = None,
    label: str = "",
) -> Outcome:
    """Train for so many steps, under a progress bar.

    Args:
        batches: at least ``steps`` of them.
        looks: numbers of steps after which ``look`` is called with that number; 0 is before the first step.
        rate: the learning rate of step 1, 2, ...; None leaves the optimizer's own.
    """
    clock, seconds, done, failed = clock_of(next(learner.model.parameters()).device), 0.0, 0, False
    with tqdm(total=steps, desc=f"{label:>24}", unit="step", leave=False, disable=None) as bar:
        try:
            if 0 in looks:
                look(0)
            start = clock()
            for x, y in islice(batches, steps):
                if rate is not None:
                    learner.set_rate(rate(done + 1))
                learner.step(x, y)
                done += 1
                bar.update()
                if done in looks:
                    seconds += clock() - start
                    look(done)
                    start = clock()
            seconds += clock() - start
        except ClosureError as error:
            if "finite" not in str(error):
                raise
            failed = True
    return Outcome(done, seconds, failed)


def clock_of(device: torch.device | str) -> Callable[[], float]:
    """Seconds: on a CPU those of this thread, which other processes do not lengthen; on a GPU those of the wall."""
    return time.perf_counter if torch.device(device).type == "cuda" else time.thread_time


def is_due(step: int, steps: int, looks: int) -> bool:
    """Whether one of ``looks`` evenly spaced moments is after this step; the last one is after the last step."""
    return step * looks // steps > (step - 1) * looks // steps


def batches_of(data: Dataset, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Batches of the training set, epoch after epoch without end.

    Each epoch has an order of its own, drawn from the generator. The last batch of an epoch may be smaller.
    """
    while True:
        order = torch.randperm(len(data.x), generator=generator).to(data.x.device)
        for index in order.split(size):
            yield data.x[index], data.y[index]


def epoch_of(data: Dataset, size: int) -> Iterator[Batch]:
    """The batches of one epoch in a fixed order."""
    return islice(batches_of(data, size, torch.Generator().manual_seed(0)), steps_per_epoch(data, size))


def steps_per_epoch(data: Dataset, size: int) -> int:
    return -(-len(data.x) // size)


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, chunk: int | None = None) -> tuple[float, float]:
    """Accuracy and mean loss; ``chunk``: examples that go through the model at once (None: all)."""
    chunk = chunk or len(x)
    hits, loss = 0, 0.0
    for part, wanted in zip(x.split(chunk), y.split(chunk), strict=True):
        scores = model(part)
        hits += int((scores.argmax(1) == wanted).sum())
        loss += float(F.cross_entropy(scores, wanted, reduction="sum"))
    return hits / y.numel(), loss / y.numel()


# --- by epochs --------------------------------------------------------------------------------------------------------


@dataclass
class History:
    """Train and test accuracy after each of ``epochs``, and the cosine to the true gradient after some of them."""

    epochs: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    cosine_epochs: list[int] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)


def fit_epochs(
    learner: Learner,
    data: Dataset,
    settings: Settings,
    *,
    seed: int,
    label: str = "",
    cosines: int = 0,
    every: int = 1,
    each: Callable[[int], object] | None = None,
) -> tuple[History, Outcome]:
    """``fit`` for ``settings.epochs`` epochs, with looks at accuracy and cosine.

    Args:
        seed: orders the batches.
        cosines: number of looks at the cosine; each is the mean over the batches of one epoch.
        every: epochs between two looks at the accuracy; there is one after the last epoch too.
        each: called with the epoch's number after every epoch.
    """
    history, last, size = History(), settings.epochs, steps_per_epoch(data, settings.batch)

    def look(step: int) -> None:
        epoch = step // size
        if epoch % every == 0 or epoch == last:
            history.epochs.append(epoch)
            history.train.append(evaluate(learner.model, data.x, data.y)[0])
            history.test.append(evaluate(learner.model, data.x_test, data.y_test)[0])
        if cosines and is_due(epoch, last, cosines):
            values = [learner.cosine(x, y) for x, y in epoch_of(data, settings.batch)]
            history.cosine_epochs.append(epoch)
            history.cosine.append(sum(values) / len(values))
        if each is not None:
            each(epoch)

    batches = batches_of(data, settings.batch, torch.Generator().manual_seed(seed))
    outcome = fit(learner, batches, last * size, looks=range(size, last * size + 1, size), look=look, label=label)
    return history, outcome
