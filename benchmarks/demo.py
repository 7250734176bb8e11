"""Guessed gradients beside backpropagation on MNIST-1D: accuracy, cosine, time and memory."""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean

import torch

from benchmarks.data import Dataset, mnist1d
from benchmarks.measure import Ratio, peak_memory, time_ratios
from benchmarks.methods import METHODS, labels
from benchmarks.problems import relu_mlp
from benchmarks.report import SCRATCH, plot_curves, print_table, spread, write_json
from benchmarks.training import History, Settings, fit_epochs

NAMES = ("backprop", "w_perp", "w_transpose", "activation_perturbation")
LABELS = labels(NAMES)
WIDTH = 128


@dataclass(frozen=True)
class Column:
    """The figures of one method: a history for each seed, the time of a step, and its peak memory in bytes."""

    histories: list[History]
    time: Ratio
    peak_bytes: int


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # layers this small gain little from a second thread, and stall if the machine is busy
    settings = Settings(epochs=16 if args.quick else 300)
    seeds = range(args.seeds or 1)
    data = mnist1d(args.data_root).to(args.device)
    times, peaks = costs(data, settings, rounds=3 if args.quick else 7)
    columns = {
        method: Column([train(method, seed, data, settings) for seed in seeds], times[method], peaks[method])
        for method in NAMES
    }
    show(columns, settings)

    out = args.out or SCRATCH
    recorded = asdict(settings) | {"width": WIDTH, "hidden_layers": 3, "data": data.source}
    figures = {method: asdict(column) for method, column in columns.items()}
    write_json(out / "demo.json", args, seeds=seeds, settings=recorded, figures=figures)
    plot(columns, out / "demo.png")
    print(f"Figures in {out / 'demo.json'}, curves in {out / 'demo.png'}")


def train(method: str, seed: int, data: Dataset, settings: Settings) -> History:
    torch.manual_seed(seed)
    model = relu_mlp(WIDTH).to(data.x.device)
    learner = METHODS[method].learner(model, settings.lr)
    return fit_epochs(learner, data, settings, seed=seed, label=LABELS[method], cosines=20)[0]


def costs(data: Dataset, settings: Settings, rounds: int) -> tuple[dict[str, Ratio], dict[str, int]]:
    """Step time over backprop's, and peak memory of a step. Both are measured on one fixed batch, before training."""
    torch.manual_seed(0)
    model, device = relu_mlp(WIDTH).to(data.x.device), data.x.device.type
    x, y = data.x[: settings.batch], data.y[: settings.batch]
    makers = {method: partial(METHODS[method].learner, copy.deepcopy(model), settings.lr) for method in NAMES}
    peaks = {method: peak_memory(maker, x, y) for method, maker in makers.items()}
    steps = {method: partial(maker().step, x, y) for method, maker in makers.items()}
    return time_ratios(steps, baseline="backprop", rounds=rounds, device=device), peaks


def show(columns: dict[str, Column], settings: Settings) -> None:
    print_table(
        f"MNIST-1D, 3 hidden layers of {WIDTH}, AdamW {settings.lr:g}, {settings.epochs} epochs",
        ["method", "train", "test", "cosine", "time ratio", "peak MB"],
        [
            [
                LABELS[method],
                spread([history.train[-1] for history in column.histories]),
                spread([history.test[-1] for history in column.histories]),
                f"{mean(history.cosine[-1] for history in column.histories):.3f}",
                f"{column.time.ratio:.2f}",
                f"{column.peak_bytes / 1e6:.2f}",
            ]
            for method, column in columns.items()
        ],
    )
    print("cosine: to the true gradient, after training, mean over the training batches.")
    print("time ratio: median time of a step over that of a backprop step, steps taken in turn; with all refreshes.")
    print("peak MB: memory of one step, without parameters, batch and AdamW's state.")


def plot(columns: dict[str, Column], path: Path) -> None:
    histories = {LABELS[method]: column.histories for method, column in columns.items()}
    guesses = {label: runs for label, runs in histories.items() if label != LABELS["backprop"]}
    panels = {
        "train accuracy": {label: (runs[0].epochs, [run.train for run in runs]) for label, runs in histories.items()},
        "test accuracy": {label: (runs[0].epochs, [run.test for run in runs]) for label, runs in histories.items()},
        "cosine to the true gradient": {
            label: (runs[0].cosine_epochs, [run.cosine for run in runs]) for label, runs in guesses.items()
        },
    }
    plot_curves(path, panels)
