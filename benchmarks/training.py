"""One training loop for every method, so that a column differs from the next by its gradients alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.data import Dataset
from guessopt import ActivationPerturbation, DirectionalDescent, GuessGradOptimizer, LearnedFeedback, WPerp, WTranspose
from guessopt.diagnostics import cosine

ESTIMATORS: dict[str, Callable[[], Any]] = {
    "w_perp": lambda: WPerp(k=10),
    "w_transpose": WTranspose,
    "activation_perturbation": ActivationPerturbation,
    "directional_descent": DirectionalDescent,
    "learned_feedback": lambda: LearnedFeedback(gamma=0, every=4),
}
METHODS = ("backprop", *ESTIMATORS)
LABELS = {
    "backprop": "backprop",
    "w_perp": "W-perp (k=10)",
    "w_transpose": "W^T",
    "activation_perturbation": "activation perturbation",
    "directional_descent": "directional descent",
    "learned_feedback": "learned feedback",
}


@dataclass(frozen=True)
class Settings:
    """What every method of one experiment shares (defaults: Wang, section 4.1)."""

    epochs: int = 300
    batch: int = 512
    lr: float = 1e-4


class Learner(ABC):
    """A model and the optimizer that trains it on cross-entropy."""

    optimizer: torch.optim.Optimizer | GuessGradOptimizer

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)

    @abstractmethod
    def step(self, x: Tensor, y: Tensor) -> None:
        """One update on one batch."""

    @abstractmethod
    def cosine(self, x: Tensor, y: Tensor) -> float:
        """Cosine between the gradient this learner would follow on the batch and the true one."""

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        return (self.model(x).argmax(dim=1) == y).double().mean().item()


class Backprop(Learner):
    """The plain PyTorch loop."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(x, y).backward()
        self.optimizer.step()

    def cosine(self, x: Tensor, y: Tensor) -> float:
        return 1.0


class Guess(Learner):
    """The same loop, with the gradient guessed."""

    optimizer: GuessGradOptimizer

    def __init__(self, model: nn.Module, lr: float, method: str) -> None:
        super().__init__(model)
        self.optimizer = GuessGradOptimizer(
            model.parameters(), base=torch.optim.AdamW, estimator=ESTIMATORS[method](), lr=lr
        )

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        self.optimizer.step(lambda: self.loss(x, y))

    def cosine(self, x: Tensor, y: Tensor) -> float:
        return cosine(self.optimizer, lambda: self.loss(x, y)).total


def make_learner(method: str, model: nn.Module, lr: float) -> Learner:
    return Backprop(model, lr) if method == "backprop" else Guess(model, lr, method)


@dataclass
class History:
    """What one training run showed: accuracies after each of `epochs`, the cosine after some of them."""

    epochs: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    cosine_epochs: list[int] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)


def batches(data: Dataset, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """The training set once, in an order drawn from `generator`; the last batch may be smaller."""
    order = torch.randperm(len(data.x), generator=generator).to(data.x.device)
    for index in order.split(size):
        yield data.x[index], data.y[index]


def fit(
    learner: Learner,
    data: Dataset,
    settings: Settings,
    *,
    seed: int,
    label: str = "",
    cosines: int = 0,
    every: int = 1,
    each: Callable[[int], object] | None = None,
) -> History:
    """Train under a progress bar; `seed` orders the batches, `cosines` asks for that many looks at the cosine,
    accuracies are taken after every `every`-th epoch and the last, `each` is called with the epoch after every one.

    A look is the mean over one epoch's batches, so its last one describes the trained network.
    """
    history, generator = History(), torch.Generator().manual_seed(seed)
    bar = tqdm(range(1, settings.epochs + 1), desc=f"{label:>24}", unit="epoch", disable=None)
    for epoch in bar:
        for x, y in batches(data, settings.batch, generator):
            learner.step(x, y)
        if epoch % every == 0 or epoch == settings.epochs:
            history.epochs.append(epoch)
            history.train.append(learner.accuracy(data.x, data.y))
            history.test.append(learner.accuracy(data.x_test, data.y_test))
            bar.set_postfix(train=f"{history.train[-1]:.3f}", test=f"{history.test[-1]:.3f}")
        if cosines and epoch * cosines // settings.epochs > (epoch - 1) * cosines // settings.epochs:
            history.cosine_epochs.append(epoch)
            history.cosine.append(mean_cosine(learner, data, settings.batch))
        if each is not None:
            each(epoch)
    return history


def mean_cosine(learner: Learner, data: Dataset, batch: int) -> float:
    """The cosine averaged over the training set's batches in one fixed order (training's own order is not moved on)."""
    values = [learner.cosine(x, y) for x, y in batches(data, batch, torch.Generator().manual_seed(0))]
    return sum(values) / len(values)
