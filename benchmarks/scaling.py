"""Peak memory and time of a step against depth, width, batch, sequence length and number of parameters."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.isolated import Task, collect
from benchmarks.memory_cases import METHODS
from benchmarks.memory_measures import Cell, measured
from benchmarks.memory_tables import above, mb
from benchmarks.problems import Problem, mlp, text
from benchmarks.report import COMMITTED, SCRATCH, Table, print_table


@dataclass(frozen=True)
class Axis:
    """``make`` builds a problem of a size; ``quick``: the sizes of ``--quick``."""

    title: str
    make: Callable[[int], Problem]
    sizes: tuple[int, ...]
    quick: tuple[int, ...]


AXES = {
    "depth": Axis("depth, MLP of width 256, batch 256", lambda n: mlp(256, n, 256), (6, 12, 24, 48), (2, 8)),
    "width": Axis("width, MLP of depth 6, batch 256", lambda n: mlp(n, 6, 256), (128, 256, 512, 1024), (16, 32)),
    "batch": Axis("batch, MLP 6x256", lambda n: mlp(256, 6, n), (64, 256, 1024, 4096), (16, 32)),
    "tokens": Axis(
        "tokens, causal LM of depth 2, batch 4", lambda n: text(4, n, dim=64, depth=2), (32, 64, 128, 256), (8, 16)
    ),
    "parameters": Axis(
        "width = 32 depth, MLP, batch 256: parameters", lambda n: mlp(32 * n, n, 256), (4, 8, 16, 24), (2, 4)
    ),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), metavar="AXIS", help=", ".join(AXES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--fresh", action="store_true", help="repeat the measurements that the file has already")


def run(args: argparse.Namespace) -> None:
    out = args.out or (SCRATCH if args.quick else COMMITTED)
    sizes = {name: AXES[name].quick if args.quick else AXES[name].sizes for name in args.axes}
    few = ("backprop", "w_perp_store", "w_perp_stream") if args.quick else tuple(METHODS)
    methods = tuple(args.methods or few)
    settings = {"quick": args.quick, "device": args.device, "steps": 2, "rounds": 2}
    tasks: dict[str, Task] = {
        f"{axis} {size} {method}": (point, (axis, size, method, args.device))
        for axis, each in sizes.items()
        for size in each
        for method in methods
    }
    path = out / "scaling.json"
    figures = collect(path, args, settings, tasks)
    for table in tables(figures, sizes, methods):
        print_table(*table)
    plot(figures, sizes, methods, out / "scaling.png")
    print(f"Figures in {path}, curves in {out / 'scaling.png'}")


def point(axis: str, size: int, method: str, device: str) -> Cell:
    return measured(AXES[axis].make(size).to(device), method, steps=2, rounds=2)


def place(figures: Any, axis: str, size: int, method: str) -> float:
    """The value on the axis; for the axis of parameters, their number (a parameter has 4 bytes)."""
    return figures[f"{axis} {size} {method}"]["parameters"] / 4 if axis == "parameters" else size


def tables_of(content: Mapping[str, Any]) -> list[Table]:
    """For the page of results: the axes whose sizes have all been measured."""
    figures = content["figures"]
    methods = tuple(m for m in METHODS if any(key.split()[2] == m for key in figures))
    whole = {
        name: axis.sizes
        for name, axis in AXES.items()
        if all(f"{name} {size} {m}" in figures for size in axis.sizes for m in methods)
    }
    return list(tables(figures, whole, methods))


def tables(figures: Any, sizes: dict[str, tuple[int, ...]], methods: tuple[str, ...]) -> Iterator[Table]:
    for axis, each in sizes.items():
        columns = [f"{place(figures, axis, size, methods[0]):.3g}" for size in each]
        found = {m: [figures[f"{axis} {size} {m}"] for size in each] for m in methods}
        peak = {m: [mb(above(cell["peaks"])) for cell in cells] for m, cells in found.items()}
        time = {m: [f"{cell['time']['ratio']:.2f}" for cell in cells] for m, cells in found.items()}
        for what, rows in (("peak in MB above parameters and state", peak), ("time over backprop", time)):
            yield Table(f"{AXES[axis].title}: {what}", ["", *columns], [[METHODS[m].label, *rows[m]] for m in methods])


def plot(figures: Any, sizes: dict[str, tuple[int, ...]], methods: tuple[str, ...], path: Path) -> None:
    """One column for each axis: peaks above, times below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(sizes), figsize=(3.4 * len(sizes) + 2, 6), squeeze=False, layout="constrained")
    for column, (axis, each) in enumerate(sizes.items()):
        for method in methods:
            cells = [figures[f"{axis} {size} {method}"] for size in each]
            x, label = [place(figures, axis, size, method) for size in each], METHODS[method].label
            style: dict[str, Any] = {"color": f"C{list(METHODS).index(method)}", "marker": "."}
            axes[0][column].loglog(x, [above(cell["peaks"]) / 1e6 for cell in cells], label=label, **style)
            axes[1][column].loglog(x, [cell["time"]["ratio"] for cell in cells], **style)
        axes[1][column].set_xlabel(axis)
    axes[0][0].set_ylabel("MB above parameters and state")
    axes[1][0].set_ylabel("time over backprop")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
