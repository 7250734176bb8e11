"""Figures 4 and 5 and Table 2 of Singhal et al. 2023: how each is run, and how its results are shown."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data import Dataset
from benchmarks.methods import METHODS, labels
from benchmarks.mnist1d import PAPER_TRAIN, thinned
from benchmarks.problems import relu_mlp
from benchmarks.report import Curve, Table, spread
from benchmarks.training import Learner, Settings, epoch_of, fit_epochs, is_due, steps_per_epoch
from guessopt.diagnostics import (
    cosine,
    cosine_by_guesses,
    effective_rank,
    effective_rank_of,
    expected_gradient,
    true_gradient,
)
from guessopt.diagnostics.gradients import joined, similarity

NAMES = (
    "backprop", "directional_descent", "activation_perturbation", "activation_mixing", "w_transpose", "downstream",
    "self_sharpening", "w_perp", "learned_feedback", "power_0.1", "power_0.5", "power_2", "power_4",
)  # fmt: skip
LABELS = {**labels(NAMES), "guesses_1": "1 guess", "guesses_4": "4 guesses"}

PAPER_4 = {"activation_perturbation": "rises"}
"""The figure has no numbers. The other methods, says the paper, "saturate after approximately 1000 guesses"."""
PAPER_5 = {"self_sharpening": "to 0.6", "power_4": "rises most", "power_0.1": "least"}
PAPER_2 = {
    "directional_descent": (0.322, 0.317),
    "activation_perturbation": (0.269, 0.324),
    "activation_mixing": (0.522, 0.449),
    "w_transpose": (0.467, 0.452),
    "downstream": (0.376, 0.406),
    "self_sharpening": (0.975, 0.335),
    "backprop": (1.000, 0.524),
}
"""Train and test accuracy after 1000 epochs, 6 hidden layers of 1024."""
AIMS = {"guesses_1": 0.68, "guesses_4": 0.80}
"""Train accuracy to be reached with the exact error at the last layer."""
LOOKS = 20
MIXED = 16
"""Examples whose activations are mixed in figure 4."""


@dataclass(frozen=True)
class Setup:
    """Settings of one part.

    Attributes:
        images: size of the training set.
        epochs: of training; in figure 4 of backprop, before the cosines are measured.
        steps: where ``epochs`` is 0, the steps of training, rounded up to whole epochs.
    """

    width: int
    hidden_layers: int
    batch: int
    lr: float
    images: int
    epochs: int = 0
    steps: int = 0
    guesses: int = 0
    weight_decay: float = 0.01

    def training(self) -> Settings:
        each = -(-self.images // self.batch)
        return Settings(epochs=self.epochs or -(-self.steps // each), batch=self.batch, lr=self.lr)

    def model(self, data: Dataset, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return relu_mlp(self.width, self.hidden_layers, inputs=data.x.shape[1]).to(data.x.device)


Cells = Sequence[dict[str, Any]]
"""Runs: each has ``method``, ``seed``, and its figures."""


# --- Figure 4: cosine by the number of guesses ------------------------------------------------------------------------


def run_figure4(method: str, seed: int, setup: Setup, data: Dataset) -> dict[str, Any]:
    """Cosine between one example's gradient and the mean of many guesses.

    ``limit`` is the cosine of the expected estimate, for estimators that declare it. A batch of copies of the example
    gives as many guesses in one pass. Activation mixing needs other examples to mix: its batch has ``MIXED`` examples,
    each copied, and the loss is that of the first one. This changes the scale of the mixtures, not their directions.
    """
    model, mixes = setup.model(data, seed), method == "activation_mixing"
    settings = setup.training()
    learner = METHODS["backprop"].learner(model, setup.lr)
    fit_epochs(learner, data, settings, seed=seed, label="backprop", every=settings.epochs)
    x, y = next(epoch_of(data, MIXED if mixes else 1))
    most, largest = (64, min(setup.guesses, 8192)) if mixes else (128, setup.guesses)
    opt = METHODS[method].learner(model, 0.0, base=torch.optim.SGD, seed=seed).optimizer

    def closure(copies: int) -> Tensor:
        losses = F.cross_entropy(model(x.repeat(copies, 1)), y.repeat(copies), reduction="none")
        result: Tensor = losses.unflatten(0, (copies, -1))[:, 0].mean()
        return result

    counts = [2**e for e in range(1, largest.bit_length())]
    few = [cosine(opt, lambda: closure(count)).total for count in counts if count < most]  # noqa: B023 (called here)
    many = cosine_by_guesses(opt, lambda: closure(most), [count // most for count in counts if count >= most])
    found = {"guesses": counts, "cosine": [*few, *many.cosine]}
    if mixes:  # normalised: no closed form
        return found
    expected, true = (joined(f(opt, lambda: closure(1))) for f in (expected_gradient, true_gradient))
    return found | {"limit": similarity(expected, true)}


def table_figure4(title: str, cells: Cells, setup: Setup) -> Table:
    shown = [count for count in (2, 128, 1024, 8192, 65536) if count <= setup.guesses]
    rows = []
    for method, runs in by_method(cells).items():
        curves = [dict(zip(run["guesses"], run["cosine"], strict=True)) for run in runs]
        found = [[curve[count] for curve in curves if count in curve] for count in shown]
        found.append([run["limit"] for run in runs if "limit" in run])
        values = (f"{mean(column):.3f}" if column else "-" for column in found)
        rows.append([LABELS[method], *values, PAPER_4.get(method, "flat from 1000")])
    return Table(title, ["guesses", *map(str, shown), "all", "paper"], rows, "all: cosine of the expected estimate.")


def panels_figure4(cells: Cells) -> dict[str, dict[str, Curve]]:
    lines: dict[str, Curve] = {
        LABELS[method]: ([float(k) for k in range(1, len(runs[0]["guesses"]) + 1)], [run["cosine"] for run in runs])
        for method, runs in by_method(cells).items()
    }
    return {"Figure 4: cosine by log2 of the guesses": lines}


# --- Figure 5: self-sharpening ----------------------------------------------------------------------------------------


def run_figure5(method: str, seed: int, setup: Setup, data: Dataset) -> dict[str, Any]:
    """Training with looks at the cosine (mean of 20 guesses) and at effective ranks, on a fixed batch.

    ``cosine`` is of all parameters, among which the exact last layer weighs most; ``sites`` has it by layer.
    """
    model = setup.model(data, seed)
    learner = METHODS[method].learner(model, setup.lr, weight_decay=setup.weight_decay, exact_last=True, seed=seed)
    x, y = next(epoch_of(data, setup.batch))
    settings = setup.training()
    found: dict[str, list[Any]] = {"steps": [], "cosine": [], "sites": [], "weights": [], "activations": []}

    def look(epoch: int) -> None:
        if epoch and not is_due(epoch, settings.epochs, LOOKS):
            return
        opt = learner.optimizer
        found["steps"].append(epoch * steps_per_epoch(data, setup.batch))
        looks = [cosine(opt, lambda: learner.loss(x, y)) for _ in range(20)]
        found["cosine"].append(mean(each.total for each in looks))
        found["sites"].append(
            [mean(values) for values in zip(*(each.per_site.values() for each in looks), strict=True)]
        )
        found["weights"].append([*effective_rank(opt).per_parameter.values()])
        found["activations"].append(activation_ranks(model, x))

    look(0)
    history, _ = fit_epochs(learner, data, settings, seed=seed, label=LABELS[method], every=settings.epochs, each=look)
    return {**found, "train": history.train[-1], "test": history.test[-1]}


@torch.no_grad()
def activation_ranks(model: nn.Module, x: Tensor) -> list[float]:
    """Effective rank of every hidden layer's activations over the batch."""
    found = []
    for layer in model.children():
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            found.append(effective_rank_of(x))
    return found


def table_figure5(title: str, cells: Cells, setup: Setup) -> Table:
    def change(runs: Cells, values: Callable[[dict[str, Any]], list[float]]) -> str:
        first, last = (mean(values(run)[k] for run in runs) for k in (0, -1))
        return f"{first:.3g}→{last:.3g}"

    rows = [
        [
            LABELS[method],
            change(runs, hidden_cosine),
            change(runs, lambda run: run["cosine"]),
            change(runs, lambda run: [w[0] for w in run["weights"]]),
            change(runs, lambda run: [mean(w[:-1]) for w in run["weights"]]),
            spread([run["train"] for run in runs]),
            PAPER_5.get(method, "-"),
        ]
        for method, runs in by_method(cells).items()
    ]
    return Table(
        title,
        ["start→end", "cosine\nhidden", "cosine\nall", "rank\nlayer 1", "rank\nhidden", "train", "paper,\ncosine"],
        rows,
    )


def hidden_cosine(run: dict[str, Any]) -> list[float]:
    """Mean over the hidden layers, by look. The last layer has the exact error, whatever the method."""
    return [mean(sites[:-1]) for sites in run["sites"]]


def panels_figure5(cells: Cells) -> dict[str, dict[str, Curve]]:
    def lines(values: Callable[[dict[str, Any]], list[float]]) -> dict[str, Curve]:
        return {LABELS[m]: (runs[0]["steps"], [values(run) for run in runs]) for m, runs in by_method(cells).items()}

    return {
        "Figure 5: cosine by step, mean of hidden layers": lines(hidden_cosine),
        "effective rank, layer 1": lines(lambda run: [w[0] for w in run["weights"]]),
        "effective rank, hidden layers": lines(lambda run: [mean(w[:-1]) for w in run["weights"]]),
        "effective rank, activations": lines(lambda run: [mean(a) for a in run["activations"]]),
    }


# --- Table 2, and the exact error at the last layer -------------------------------------------------------------------


def run_table2(method: str, seed: int, setup: Setup, data: Dataset) -> dict[str, Any]:
    """Self-sharpening with StableAdamW, as in the paper (A.2); the others with AdamW."""
    options = {}
    if method == "self_sharpening":
        options["base"] = importlib.import_module("optimi").StableAdamW
    learner = METHODS[method].learner(setup.model(data, seed), setup.lr, **options)
    return trained(learner, method, seed, setup, data)


def run_exact_last(method: str, seed: int, setup: Setup, data: Dataset) -> dict[str, Any]:
    guesses = int(method.rpartition("_")[2])
    learner = METHODS["w_perp"].learner(setup.model(data, seed), setup.lr, exact_last=True, guesses=guesses)
    return trained(learner, method, seed, setup, data)


def trained(learner: Learner, method: str, seed: int, setup: Setup, data: Dataset) -> dict[str, Any]:
    history, outcome = fit_epochs(learner, data, setup.training(), seed=seed, label=LABELS[method])
    kept = thinned(history)
    return {"epochs": kept.epochs, "train": kept.train, "test": kept.test, "seconds": outcome.seconds}


def accuracies(runs: Cells) -> list[str]:
    return [spread([run[part][-1] for run in runs]) for part in ("train", "test")]


def table_table2(title: str, cells: Cells, setup: Setup) -> Table:
    def published(method: str) -> list[str]:
        return [f"{value:.3f}" for value in PAPER_2[method]] if method in PAPER_2 else ["-", "-"]

    rows = [[LABELS[method], *accuracies(runs), *published(method)] for method, runs in by_method(cells).items()]
    return Table(title, [f"after {setup.epochs} epochs", "train", "test", "paper train\n(1000 epochs)", "test"], rows)


def table_exact_last(title: str, cells: Cells, setup: Setup) -> Table:
    guess = PAPER_TRAIN.get(setup.width, {}).get("w_perp")
    rows = [
        [LABELS[method], *accuracies(runs), f"{AIMS[method]:.2f}", "-" if guess is None else f"{guess:.3f}"]
        for method, runs in by_method(cells).items()
    ]
    columns = ["exact last error", "train", "test", "aim, train", "Wang: a guess\nthere too"]
    return Table(title, columns, rows)


def panels_accuracy(name: str) -> Callable[[Cells], dict[str, dict[str, Curve]]]:
    def panels(cells: Cells) -> dict[str, dict[str, Curve]]:
        lines: dict[str, Curve] = {}
        for method, runs in by_method(cells).items():
            lines[LABELS[method]] = (runs[0]["epochs"], [run["train"] for run in runs])
        return {f"{name}: train accuracy by epoch": lines}

    return panels


def by_method(cells: Cells) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        found.setdefault(cell["method"], []).append(cell)
    return found
