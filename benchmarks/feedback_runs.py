"""The problems on which learned feedback is judged, and the runs on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.data import Dataset, characters, cifar10, mnist1d
from benchmarks.methods import METHODS as TABLE
from benchmarks.methods import Method
from benchmarks.problems import MeanToken, causal_lm, cnn, relu_mlp, resnet, vit

METHODS: dict[str, Method] = {
    "backprop": TABLE["backprop"],
    "learned_feedback": TABLE["learned_feedback_every"],
    **{
        name: TABLE[name]
        for name in (
            "random_feedback", "fixed_feedback", "w_perp", "w_transpose", "activation_perturbation",
            # For losses with positions; parts of learned feedback. They run only if --methods names them.
            "activation_credit", "w_perp_credit", "activation_credit_exact", "w_perp_credit_exact",
            "learned_feedback_near", "learned_feedback_skips",
            "learned_feedback_sites", "learned_feedback_position", "learned_feedback_shared",
            "learned_feedback_guesses",
            "learned_feedback_weights", "learned_feedback_zero", "learned_feedback_auto",
        )
    },
}  # fmt: skip
"""By the names that the JSON has."""
LABELS = {name: method.label for name, method in METHODS.items()}
DEFAULT = tuple(METHODS)[:7]
"""The methods that are run unless ``--methods`` names others."""
LRS = (1e-4, 3e-4, 1e-3, 3e-3)
WIDER = (1e-2, 3e-2)
WIDENED = ("activation_credit", "w_perp_credit", "activation_credit_exact", "w_perp_credit_exact")


@dataclass(frozen=True)
class Problem:
    """A network, its data and a budget.

    Attributes:
        judge: the figure by which a learning rate is chosen: ``train`` or ``test`` accuracy, or the test ``loss``.
        target: the share of backprop's figure that learned feedback should reach. (For a loss: of backprop's drop below
            the unigram loss.)
        looks: moments at which a run is judged.
        seeds: runs at the best learning rate.
        lowest: of the learning rates that are tried.
        extra: methods that are run by default on this network alone.
        decays: the learning rate falls linearly to zero. At a constant rate AdamW sometimes throws a deep network back,
            with any gradient, and then the figure of the last step says little.
    """

    title: str
    network: Callable[[], nn.Module]
    data: Callable[[Path | None, bool], Dataset]
    steps: int
    batch: int
    judge: str
    target: float
    looks: int = 8
    seeds: int = 2
    lowest: float = 3e-4
    decays: bool = True
    extra: tuple[str, ...] = ()

    def settings(self, quick: bool) -> dict[str, Any]:
        """All that a figure depends on; ``judged``: the number of examples on which it is measured."""
        if quick:
            budget = {"steps": 2, "batch": 8, "looks": 1, "judged": 50}
        else:
            budget = {"steps": self.steps, "batch": self.batch, "looks": self.looks, "judged": 2000}
        return {"title": self.title, **budget, "decays": self.decays}


def _cifar(root: Path | None, quick: bool, images: int = 10_000, test_images: int = 2_000) -> Dataset:
    data = cifar10(root, 200, 100) if quick else cifar10(root, images, test_images)
    return replace(data, x=data.x.unflatten(1, (3, 32, 32)), x_test=data.x_test.unflatten(1, (3, 32, 32)))


def _cifar_all(root: Path | None, quick: bool) -> Dataset:
    return _cifar(root, quick, 50_000, 10_000)


def _signals(root: Path | None, quick: bool) -> Dataset:
    return mnist1d(root)


def _text(root: Path | None, quick: bool) -> Dataset:
    return characters(root)


def _mlp(width: int, depth: int, target: float) -> Problem:
    return Problem(
        f"MNIST-1D, MLP {depth}x{width}",
        partial(relu_mlp, width, depth),
        _signals,
        2400,
        512,
        "train",
        target,
        looks=60,
        seeds=5,
        lowest=1e-4,
        decays=depth > 3,  # three layers: as in Wang 4.1
    )


PROBLEMS = {
    **{f"mnist1d_{width}": _mlp(width, 3, 0.99) for width in (64, 128, 256, 512)},
    "depth6": _mlp(128, 6, 0.97),
    "depth12": _mlp(128, 12, 0.97),
    "cifar_mlp": Problem(
        "CIFAR-10, MLP 6x512",
        lambda: nn.Sequential(nn.Flatten(), *relu_mlp(512, 6, inputs=3072)),
        _cifar_all,
        3910,
        128,
        "test",
        0.97,
        looks=20,
    ),
    "cnn": Problem("CIFAR-10 (10,000), CNN", cnn, _cifar, 800, 64, "test", 0.95),
    "resnet": Problem("CIFAR-10 (10,000), ResNet", partial(resnet, 16, 2), _cifar, 800, 64, "test", 0.95),
    "vit": Problem(
        "CIFAR-10 (10,000), ViT 64x4",
        partial(vit, 64, 4, 4, patch=4, token=MeanToken),
        _cifar,
        800,
        64,
        "test",
        0.95,
    ),
    "charlm": Problem(
        "tinyshakespeare, causal LM 64x4",
        partial(causal_lm, 65, 64, 4, 4, hidden=172),
        _text,
        600,
        32,
        "loss",
        0.9,
        extra=("activation_credit", "w_perp_credit", "w_perp_credit_exact"),
    ),
}


QUICK = ["mnist1d_64", "cnn", "resnet", "vit", "charlm"]
"""The problems of the quick version."""


@dataclass(frozen=True)
class Look:
    """One moment of a run: accuracies and the test loss.

    Attributes:
        cosine: to the true gradient of all parameters; None for backprop, or where it was not asked for.
        sites: the cosine by site, of the site's cotangent.
    """

    step: int
    train: float
    test: float
    loss: float
    cosine: float | None = None
    sites: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One training run; ``seconds`` and ``failed`` as in ``training.Outcome``."""

    problem: str
    method: str
    lr: float
    seed: int
    settings: dict[str, Any]
    looks: list[Look]
    seconds: float
    failed: bool = False

    @property
    def key(self) -> Key:
        return self.problem, self.method, self.lr, self.seed

    def figure(self, judge: str) -> float:
        """The last look's figure; larger is better."""
        if self.failed or not self.looks:
            return -math.inf
        last = self.looks[-1]
        return judged(last, judge)

    def reaches(self, judge: str, figure: float) -> float | None:
        """Steps until a figure is reached, interpolated between two looks; None if it is never reached."""
        steps, before = 0.0, None
        for look in self.looks:
            now = judged(look, judge)
            if now >= figure:
                share = 1.0 if before is None else (figure - before) / (now - before)
                return steps + share * (look.step - steps)
            steps, before = look.step, now
        return None


def judged(look: Look, judge: str) -> float:
    """A look's figure; larger is better."""
    figure: float = -look.loss if judge == "loss" else getattr(look, judge)
    return figure


Key = tuple[str, str, float, int]
Cells = dict[Key, Cell]
Pace = dict[str, dict[str, float]]


class Runs:
    """The runs so far.

    Attributes:
        unigram: by problem that is judged by a loss, the loss of a model that knows only the letters' frequencies.
        pace: by problem and method, the time of a step over that of a backprop step.
    """

    def __init__(self, lrs: tuple[float, ...], cells: Cells, unigram: dict[str, float], pace: Pace) -> None:
        self.lrs, self.cells, self.unigram, self.pace = lrs, cells, unigram, pace

    def paced(self, problem: str, method: str) -> float | None:
        """``pace``; None: not known."""
        return 1.0 if method == "backprop" else self.pace.get(problem, {}).get(method)

    def grid(self, problem: str, method: str) -> tuple[float, ...]:
        """The learning rates of seed 0. For ``WIDENED`` methods, ``WIDER`` rates follow while the best is the last."""
        found = [lr for lr in self.lrs if lr >= PROBLEMS[problem].lowest]
        for lr in WIDER if method in WIDENED else ():
            scores = [self.score(problem, method, each) for each in found]
            if None in scores or max(scores, key=lambda score: score or 0.0) != scores[-1]:
                break
            found.append(lr)
        return tuple(found)

    def score(self, problem: str, method: str, lr: float) -> float | None:
        """The figure of the run with seed 0; None: not run yet."""
        cell = self.cells.get((problem, method, lr, 0))
        return None if cell is None else cell.figure(PROBLEMS[problem].judge)

    def best(self, problem: str, method: str) -> float:
        """The learning rate whose run with seed 0 ended best."""
        scores = {lr: self.score(problem, method, lr) for lr in self.grid(problem, method)}
        return max(scores, key=lambda lr: -math.inf if scores[lr] is None else float(scores[lr] or 0.0))

    def chosen(self, problem: str, method: str) -> list[Cell]:
        """All runs at the best rate, by seed; none where the grid is not complete."""
        if any((problem, method, lr, 0) not in self.cells for lr in self.grid(problem, method)):
            return []
        at = problem, method, self.best(problem, method)
        return [self.cells[key] for key in sorted(self.cells) if key[:3] == at]


def cells_of(content: dict[str, Any]) -> Cells:
    """The runs in the content of a JSON."""
    cells = (Cell(**{**each, "looks": [Look(**look) for look in each["looks"]]}) for each in content["figures"])
    return {cell.key: cell for cell in cells}
