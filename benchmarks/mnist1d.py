"""Train and test accuracy on MNIST-1D by width and method, next to the published figures (Wang, Tables 3 and 4)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import Dataset, mnist1d
from benchmarks.methods import METHODS, labels
from benchmarks.problems import relu_mlp
from benchmarks.report import COMMITTED, SCRATCH, Table, plot_curves, print_table, spread, write_json
from benchmarks.training import History, Settings, fit_epochs

NAMES = ("backprop", "w_perp", "w_transpose", "activation_perturbation", "directional_descent", "learned_feedback")
LABELS = labels(NAMES)

# Wang, Table 3: train accuracy after 300 epochs. The paper calls directional descent "weight perturbation".
PAPER_TRAIN = {
    64: {
        "directional_descent": 0.121,
        "activation_perturbation": 0.201,
        "w_transpose": 0.268,
        "w_perp": 0.268,
        "backprop": 0.536,
    },
    128: {
        "directional_descent": 0.124,
        "activation_perturbation": 0.275,
        "w_transpose": 0.312,
        "w_perp": 0.323,
        "backprop": 0.709,
    },
    256: {
        "directional_descent": 0.179,
        "activation_perturbation": 0.309,
        "w_transpose": 0.376,
        "w_perp": 0.434,
        "backprop": 0.887,
    },
    512: {
        "directional_descent": 0.177,
        "activation_perturbation": 0.319,
        "w_transpose": 0.494,
        "w_perp": 0.581,
        "backprop": 1.000,
    },
}
# Wang, Tables 4 and 5: test accuracy after 300 epochs.
PAPER_TEST = {
    128: {"w_transpose": 0.277, "w_perp": 0.283},
    256: {"w_transpose": 0.316, "w_perp": 0.383},
    512: {"w_transpose": 0.438, "w_perp": 0.498},
}
THIN = 5
"""Of so many epochs one is kept in the JSON; the last epoch is always kept."""


@dataclass(frozen=True)
class Cell:
    """One training run."""

    width: int
    method: str
    seed: int
    history: History

    @property
    def key(self) -> tuple[int, str, int]:
        return self.width, self.method, self.seed


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--widths", type=int, nargs="+", help="hidden widths (default: 128 512)")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES), metavar="METHOD")
    parser.add_argument("--fresh", action="store_true", help="repeat the runs that the file has already")


def run(args: argparse.Namespace) -> None:
    settings = Settings(epochs=10 if args.quick else 300)
    seeds = range(args.seeds or (1 if args.quick else 3))
    widths = args.widths or ([128] if args.quick else [128, 512])
    data = mnist1d(args.data_root).to(args.device)
    recorded = asdict(settings) | {"hidden_layers": 3, "device": args.device}
    out = args.out or (SCRATCH if args.quick else COMMITTED)
    path = out / "mnist1d.json"

    cells = [] if args.fresh or args.quick else finished(path, recorded)
    if cells:
        print(f"{len(cells)} finished runs taken from {path} (--fresh runs them again)")
    for width, method, seed in product(widths, args.methods, seeds):
        if (width, method, seed) in [cell.key for cell in cells]:
            continue
        cells.append(Cell(width, method, seed, train(width, method, seed, data, settings)))
        cells.sort(key=lambda cell: (cell.width, NAMES.index(cell.method), cell.seed))
        kept_seeds = sorted({cell.seed for cell in cells})
        write_json(path, args, seeds=kept_seeds, settings=recorded, figures=[asdict(cell) for cell in cells])
    print_table(*table(cells, settings))
    plot(cells, out / "mnist1d.png")
    print(f"Figures in {path}, curves in {out / 'mnist1d.png'}")


def finished(path: Path, settings: dict[str, Any]) -> list[Cell]:
    """The runs in the file, if it was written with the same settings."""
    if not path.is_file():
        return []
    content = json.loads(path.read_text())
    return cells_of(content) if content["settings"] == settings else []


def cells_of(content: dict[str, Any]) -> list[Cell]:
    return [Cell(**{**figures, "history": History(**figures["history"])}) for figures in content["figures"]]


def tables_of(content: dict[str, Any]) -> list[Table]:
    """The tables for the content of this experiment's JSON."""
    recorded = content["settings"]
    return [table(cells_of(content), Settings(recorded["epochs"], recorded["batch"], recorded["lr"]))]


def train(width: int, method: str, seed: int, data: Dataset, settings: Settings) -> History:
    torch.manual_seed(seed)
    model = relu_mlp(width).to(data.x.device)
    label = f"{LABELS[method]} {width} #{seed}"
    history, _ = fit_epochs(METHODS[method].learner(model, settings.lr), data, settings, seed=seed, label=label)
    return thinned(history)


def thinned(history: History) -> History:
    kept = [i for i, epoch in enumerate(history.epochs) if epoch % THIN == 0 or epoch == history.epochs[-1]]
    return History(
        epochs=[history.epochs[i] for i in kept],
        train=[history.train[i] for i in kept],
        test=[history.test[i] for i in kept],
    )


def grouped(cells: Iterable[Cell]) -> dict[int, dict[str, list[History]]]:
    """Histories of all seeds by width and method."""
    groups: dict[int, dict[str, list[History]]] = {}
    for cell in cells:
        groups.setdefault(cell.width, {}).setdefault(cell.method, []).append(cell.history)
    return groups


def table(cells: list[Cell], settings: Settings) -> Table:
    def published(table: dict[int, dict[str, float]], width: int, method: str) -> str:
        value = table.get(width, {}).get(method)
        return "-" if value is None else f"{value:.3f}"

    seeds = ", ".join(map(str, sorted({cell.seed for cell in cells})))
    return Table(
        f"MNIST-1D, 3 hidden layers, AdamW {settings.lr:g}, {settings.epochs} epochs (paper: 300), seeds {seeds}",
        ["width, method", "train", "test", "paper\ntrain", "paper\ntest"],
        [
            [
                f"{width} {LABELS[method]}",
                spread([history.train[-1] for history in runs]),
                spread([history.test[-1] for history in runs]),
                published(PAPER_TRAIN, width, method),
                published(PAPER_TEST, width, method),
            ]
            for width, methods in grouped(cells).items()
            for method, runs in methods.items()
        ],
    )


def plot(cells: list[Cell], path: Path) -> None:
    def lines(methods: dict[str, list[History]], values: Callable[[History], list[float]]) -> dict[str, Any]:
        return {LABELS[method]: (runs[0].epochs, [values(run) for run in runs]) for method, runs in methods.items()}

    panels = {}
    for width, methods in grouped(cells).items():
        panels[f"train accuracy, width {width}"] = lines(methods, lambda history: history.train)
        panels[f"test accuracy, width {width}"] = lines(methods, lambda history: history.test)
    plot_curves(path, panels)
