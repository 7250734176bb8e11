"""Figures 4 and 5 and Table 2 of Singhal et al. 2023 on CIFAR-10, and the exact error at the last layer on MNIST-1D."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import Dataset, cifar10, mnist1d
from benchmarks.report import COMMITTED, SCRATCH, Curve, Table, plot_curves, print_table, write_json
from benchmarks.singhal_parts import (
    AIMS,
    LABELS,
    Cells,
    Setup,
    panels_accuracy,
    panels_figure4,
    panels_figure5,
    run_exact_last,
    run_figure4,
    run_figure5,
    run_table2,
    table_exact_last,
    table_figure4,
    table_figure5,
    table_table2,
)


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
    parser.add_argument("--fresh", action="store_true", help="repeat the runs that the file has already")


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
    """The tables for the content of this experiment's JSON, one for each part in it."""
    found = []
    for name, part in PARTS.items():
        if name in content["figures"]:
            recorded = {key: value for key, value in content["settings"][name].items() if key != "device"}
            found.append(part.table(part.title, content["figures"][name]["cells"], Setup(**recorded)))
    return found
