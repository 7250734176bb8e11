"""Figures 4 and 5 and Table 2 of Singhal et al. 2023 on CIFAR-10, and the exact error at the last layer on MNIST-1D."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data import Dataset, cifar10, mnist1d
from benchmarks.estimators import Estimated
from benchmarks.mnist1d import PAPER_TRAIN, thinned
from benchmarks.problems import relu_mlp
from benchmarks.report import COMMITTED, SCRATCH, Curve, Table, plot_curves, print_table, spread, write_json
from benchmarks.training import Backprop, Learner, Settings, batches, fit
from guessopt import (
    ActivationMixing,
    ActivationPerturbation,
    DirectionalDescent,
    Downstream,
    GuessGradOptimizer,
    LearnedFeedback,
    SelfSharpening,
    WPerp,
    WTranspose,
)
from guessopt.diagnostics import (
    cosine,
    cosine_by_guesses,
    effective_rank,
    effective_rank_of,
    expected_gradient,
    true_gradient,
)
from guessopt.diagnostics.gradients import joined, similarity

ESTIMATORS: dict[str, tuple[str, Callable[[], Any]]] = {
    "directional_descent": ("directional descent", DirectionalDescent),
    "activation_perturbation": ("activation perturbation", ActivationPerturbation),
    "activation_mixing": ("activation mixing", ActivationMixing),
    "w_transpose": ("W^T", WTranspose),
    "downstream": ("downstream", Downstream),
    "self_sharpening": ("self-sharpening", SelfSharpening),
    "w_perp": ("W-perp k=10", lambda: WPerp(k=10)),
    "learned_feedback": ("learned feedback", lambda: LearnedFeedback(gamma=0, every=4)),
    **{f"power_{p:g}": (f"W^T, power {p:g}", functools.partial(WTranspose, power=p)) for p in (0.1, 0.5, 2.0, 4.0)},
}
LABELS = {
    "backprop": "backprop",
    **{name: label for name, (label, _) in ESTIMATORS.items()},
    "guesses_1": "1 guess",
    "guesses_4": "4 guesses",
}

PAPER_4 = {"activation_perturbation": "rises"}
"""The figure has no numbers; for the others the paper says: "saturate after approximately 1000 guesses"."""
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
    """Settings of one part. ``images``: of the training set. ``steps`` rounds up to whole epochs of ``batch``; figure 4
    trains by backprop for ``epochs`` before it looks."""

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
"""One run each: ``method``, ``seed``, and what it found."""


@dataclass(frozen=True)
class Part:
    """A figure or table: ``run(method, seed, setup, data)`` makes a cell's figures, ``table`` and ``panels`` show the
    cells."""

    title: str
    methods: tuple[str, ...]
    setup: Setup
    quick: Setup
    run: Callable[[str, int, Setup, Dataset], dict[str, Any]]
    table: Callable[[str, Cells, Setup], Table]
    panels: Callable[[Cells], dict[str, dict[str, Curve]]]
    mnist1d: bool = False


# --- Figure 4: cosine by the number of guesses ------------------------------------------------------------------------


def run_figure4(method: str, seed: int, setup: Setup, data: Dataset) -> dict[str, Any]:
    """One example's gradient, from means of more and more guesses, and from infinitely many where the estimator
    declares its mean. A batch of copies of the example gives as many guesses in one pass. Mixing has ``MIXED`` examples
    to mix, copied alike, which changes the scale of the mixtures alone; only the first one carries weight."""
    model, mixes = setup.model(data, seed), method == "activation_mixing"
    settings = setup.training()
    fit(Backprop(model, setup.lr), data, settings, seed=seed, label="backprop", every=settings.epochs)
    x, y = next(batches(data, MIXED if mixes else 1, torch.Generator().manual_seed(0)))
    most, largest = (64, min(setup.guesses, 8192)) if mixes else (128, setup.guesses)
    opt = GuessGradOptimizer(model.named_parameters(), torch.optim.SGD, ESTIMATORS[method][1](), lr=0.0, seed=seed)

    def closure(copies: int) -> Tensor:
        losses = F.cross_entropy(model(x.repeat(copies, 1)), y.repeat(copies), reduction="none")
        return losses.unflatten(0, (copies, -1))[:, 0].mean()

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
    """Training with looks at the cosine (mean of 20 guesses; in all, where the exact last layer weighs most, and by
    site) and at effective ranks, on a fixed batch."""
    model = setup.model(data, seed)
    learner = Estimated(
        ESTIMATORS[method][1](), model, setup.lr, weight_decay=setup.weight_decay, exact_last=True, seed=seed
    )
    x, y = next(batches(data, setup.batch, torch.Generator().manual_seed(0)))
    settings = setup.training()
    found: dict[str, list[Any]] = {"steps": [], "cosine": [], "sites": [], "weights": [], "activations": []}

    def look(epoch: int) -> None:
        if epoch * LOOKS // settings.epochs == (epoch - 1) * LOOKS // settings.epochs and epoch:
            return
        opt = learner.optimizer
        found["steps"].append(epoch * -(-len(data.x) // setup.batch))
        looks = [cosine(opt, lambda: learner.loss(x, y)) for _ in range(20)]
        found["cosine"].append(mean(each.total for each in looks))
        found["sites"].append(
            [mean(values) for values in zip(*(each.per_site.values() for each in looks), strict=True)]
        )
        found["weights"].append([*effective_rank(opt).per_parameter.values()])
        found["activations"].append(activation_ranks(model, x))

    look(0)
    history = fit(learner, data, settings, seed=seed, label=LABELS[method], every=settings.epochs, each=look)
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
    """By look: the mean over the hidden layers, whose guesses are all that the method has a part in."""
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
    model = setup.model(data, seed)
    if method == "backprop":
        return trained(Backprop(model, setup.lr), method, seed, setup, data)
    base: Any = torch.optim.AdamW
    if method == "self_sharpening":
        base = importlib.import_module("optimi").StableAdamW
    return trained(Estimated(ESTIMATORS[method][1](), model, setup.lr, base), method, seed, setup, data)


def run_exact_last(method: str, seed: int, setup: Setup, data: Dataset) -> dict[str, Any]:
    guesses = int(method.rpartition("_")[2])
    learner = Estimated(WPerp(k=10), setup.model(data, seed), setup.lr, exact_last=True, guesses=guesses)
    return trained(learner, method, seed, setup, data)


def trained(learner: Learner, method: str, seed: int, setup: Setup, data: Dataset) -> dict[str, Any]:
    start = time.perf_counter()
    kept = thinned(fit(learner, data, setup.training(), seed=seed, label=LABELS[method]))
    return {"epochs": kept.epochs, "train": kept.train, "test": kept.test, "seconds": time.perf_counter() - start}


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


# --- the command ------------------------------------------------------------------------------------------------------

FIGURE_4 = ("activation_perturbation", "w_transpose", "activation_mixing", "downstream")
FIGURE_5 = ("self_sharpening", "power_0.1", "power_0.5", "w_transpose", "power_2", "power_4", "activation_perturbation")
PARTS = {
    "figure4": Part(
        "Figure 4: cosine of the mean of many guesses with one example's gradient",
        FIGURE_4,
        Setup(width=256, hidden_layers=6, batch=512, lr=1e-4, images=10_000, epochs=20, guesses=65_536),
        Setup(width=32, hidden_layers=6, batch=512, lr=1e-4, images=500, epochs=1, guesses=256),
        run_figure4,
        table_figure4,
        panels_figure4,
    ),
    "figure5": Part(
        "Figure 5: self-sharpening",
        FIGURE_5,
        Setup(width=128, hidden_layers=6, batch=128, lr=1e-4, images=50_000, steps=10_000, weight_decay=0.0),
        Setup(width=16, hidden_layers=6, batch=128, lr=1e-4, images=500, steps=8, weight_decay=0.0),
        run_figure5,
        table_figure5,
        panels_figure5,
    ),
    "table2": Part(
        "Table 2: accuracy, 6 hidden layers, CIFAR-10",
        ("directional_descent", *FIGURE_4, "self_sharpening", "w_perp", "learned_feedback", "backprop"),
        Setup(width=1024, hidden_layers=6, batch=512, lr=1e-4, images=50_000, epochs=100),
        Setup(width=16, hidden_layers=6, batch=128, lr=1e-4, images=500, epochs=1),
        run_table2,
        table_table2,
        panels_accuracy("Table 2"),
    ),
    "exact_last": Part(
        "MNIST-1D, W-perp k=10 with the exact error at the last layer",
        tuple(AIMS),
        Setup(width=512, hidden_layers=3, batch=512, lr=1e-4, images=4000, epochs=300),
        Setup(width=16, hidden_layers=3, batch=512, lr=1e-4, images=4000, epochs=2),
        run_exact_last,
        table_exact_last,
        panels_accuracy("exact error at the last layer"),
        mnist1d=True,
    ),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(PARTS)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=names)
    parser.add_argument("--methods", nargs="+", choices=list(LABELS), metavar="METHOD", help=", ".join(LABELS))
    parser.add_argument("--epochs", type=int, help="of table2 (default: 100; paper: 1000)")
    parser.add_argument("--steps", type=int, help="of figure5 (default: 10000; paper: 50000)")
    parser.add_argument("--width", type=int, help="hidden width of table2 and figure4 (paper: 1024)")
    parser.add_argument("--images", type=int, help="training images of the CIFAR-10 parts (paper: 50000)")
    parser.add_argument("--fresh", action="store_true", help="run again what an earlier, interrupted run finished")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    out = args.out or (SCRATCH if args.quick else COMMITTED)
    path = out / "singhal.json"
    content = {} if args.fresh or args.quick or not path.is_file() else json.loads(path.read_text())
    settings, figures = content.get("settings", {}), content.get("figures", {})
    seeds = range(args.seeds or 1)
    for name in args.parts:
        part, setup = PARTS[name], setup_of(name, args)
        methods = [m for m in part.methods if not args.methods or m in args.methods]
        if name == "table2" and "self_sharpening" in methods and importlib.util.find_spec("optimi") is None:
            print('table2 leaves out self-sharpening: its StableAdamW is in torch-optimi (pip install -e ".[bench]")')
            methods.remove("self_sharpening")
        recorded = asdict(setup) | {"device": args.device}
        cells: list[dict[str, Any]] = figures[name]["cells"] if settings.get(name) == recorded else []
        done = {(cell["method"], cell["seed"]) for cell in cells}
        missing = [(m, seed) for seed in seeds for m in methods if (m, seed) not in done]
        if cells:
            print(f"{name}: {len(cells)} finished runs taken from {path} (--fresh runs them again)")
        data = load(args, part, setup) if missing else None
        for number, (method, seed) in enumerate(missing, 1):
            print(f"{name}, run {number} of {len(missing)}: {LABELS[method]}, seed {seed}")
            assert data is not None
            cells.append({"method": method, "seed": seed, **part.run(method, seed, setup, data)})
            cells.sort(key=lambda cell: (part.methods.index(cell["method"]), cell["seed"]))
            settings[name] = recorded
            figures[name] = {"command": args.command, "data": data.source, "cells": cells}
            every = sorted({cell["seed"] for found in figures.values() for cell in found["cells"]})
            write_json(path, args, seeds=every, settings=settings, figures=figures)
    for table in tables_of({"settings": settings, "figures": {k: figures[k] for k in args.parts if k in figures}}):
        print_table(*table)
    shown = [name for name in PARTS if name in figures]
    for name in shown:
        plot_curves(path.with_name(f"singhal_{name}.png"), PARTS[name].panels(figures[name]["cells"]), xlabel="")
    print(f"Figures in {path}, curves in {', '.join(f'singhal_{name}.png' for name in shown)}")


def setup_of(name: str, args: argparse.Namespace) -> Setup:
    setup = PARTS[name].quick if args.quick else PARTS[name].setup
    own: dict[str, int | None] = {}
    if name in ("table2", "figure4"):
        own["width"] = args.width
    if name == "table2":
        own["epochs"] = args.epochs
    if name == "figure5":
        own["steps"] = args.steps
    if not PARTS[name].mnist1d:
        own["images"] = args.images
    return replace(setup, **{key: value for key, value in own.items() if value is not None})


def load(args: argparse.Namespace, part: Part, setup: Setup) -> Dataset:
    root = Path(args.data_root) if args.data_root else None
    if part.mnist1d:
        return mnist1d(root).to(args.device)
    return cifar10(root, setup.images, min(setup.images, 10_000)).to(args.device)


def tables_of(content: dict[str, Any]) -> list[Table]:
    """The tables of a JSON that this experiment wrote, one for each part that it has."""
    found = []
    for name, part in PARTS.items():
        if name in content["figures"]:
            recorded = {key: value for key, value in content["settings"][name].items() if key != "device"}
            found.append(part.table(part.title, content["figures"][name]["cells"], Setup(**recorded)))
    return found


def by_method(cells: Cells) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        found.setdefault(cell["method"], []).append(cell)
    return found
