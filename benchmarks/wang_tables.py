"""The tables and pictures of the experiment ``wang``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.mnist1d import PAPER_TEST, PAPER_TRAIN
from benchmarks.report import Table, plot_curves, spread
from benchmarks.wang_parts import (
    LABELS,
    LAYER_1,
    LAYERS,
    PAPER_1,
    PAPER_4,
    PAPER_5,
    PAPER_MOMENTS,
    Cell,
    Part,
    of,
)


def known(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def tables(cells: list[Cell], parts: dict[str, Part]) -> list[Table]:
    found = []
    for name, part in parts.items():
        if name == "figure1":
            found.append(overlap_table(cells, part))
        elif part.measured:
            found.append(moments_table(cells, part, name))
        elif name != "figure2" or "3" not in parts:  # the figure draws Table 3
            found.append(accuracy_table(cells, part, name))
    return found


def took(runs: Sequence[Cell]) -> str:
    known = [run.seconds for run in runs if run.seconds is not None]
    return f"{mean(known):.0f} s" if known else "-"


def accuracy_table(cells: list[Cell], part: Part, name: str) -> Table:
    timed = name == "4"
    rows = []
    for width in part.widths:
        for method in part.methods:
            runs = of(cells, width, method)
            if not runs:
                continue
            paper = PAPER_4.get((width, method)) if timed else None
            train_ = paper[0] if paper else _paper_train(name, width, method)
            test = paper[1] if paper else PAPER_TEST.get(width, {}).get(method)
            row = [
                f"{width} {LABELS[method]}",
                spread([run.history.train[-1] for run in runs]),
                spread([run.history.test[-1] for run in runs]),
                known(train_),
                known(test),
            ]
            rows.append(row + ([took(runs), paper[2] if paper else "-"] if timed else []))
    columns = ["width, method", "train", "test", "paper\ntrain", "paper\ntest"]
    return Table(
        part.title,
        columns + (["time", "paper\ntime"] if timed else []),
        rows,
        "A figure without a spread is of one seed.",
    )


def _paper_train(name: str, width: int, method: str) -> float | None:
    if name == "1":
        return PAPER_1.get(method) if width == 128 else None
    return PAPER_TRAIN.get(width, {}).get(method)


def average(cells: Sequence[Cell], metric: str, layer: str = LAYER_1) -> float | None:
    """Mean of a metric of one layer over all looks and seeds. None: the estimator does not declare that moment."""
    values = [getattr(look, metric).get(layer) for cell in cells for look in cell.looks]
    there = [value for value in values if value is not None]
    return mean(there) if there else None


def moments_table(cells: list[Cell], part: Part, name: str) -> Table:
    def small(value: float | None) -> str:
        return known(value, ".2e").replace("e-0", "e-")

    rows = []
    for width in part.widths:
        for method in part.methods:
            runs = of(cells, width, method)
            if not runs:
                continue
            paper = PAPER_MOMENTS[name][method]
            row = [f"{width} {LABELS[method]}", small(average(runs, "variance")), small(average(runs, "bias"))]
            row.append(known(average(runs, "relative_bias"), ".2f"))
            row += map(small, paper[:2])
            if name == "2":
                row += [known(average(runs, "covariance_norm")), known(paper[2])]
            else:
                row += [f"{mean(run.history.train[-1] for run in runs):.3f}", known(PAPER_5[method][0])]
            rows.append(row)
    last = "cov." if name == "2" else "train"
    columns = ["width, method", "var.", "bias", "rel.\nbias", "paper\nvar.", "paper\nbias", last, f"paper\n{last}"]
    note = (
        "Layer 1, mean over looks and seeds: variance (18), bias (17), bias over the norm of the mean gradient, norm "
        "of the covariance. All layers, and the other reading of (18), are in the JSON."
    )
    return Table(part.title, columns, rows, note)


def mean_overlap(cells: Sequence[Cell], layer: str) -> list[float]:
    """For k = 1, 2, ...: the mean over looks and seeds, up to the largest k that all of them have."""
    curves = [look.overlap[layer] for cell in cells for look in cell.looks if layer in look.overlap]
    return [mean(column) for column in zip(*curves, strict=False)]


def overlap_table(cells: list[Cell], part: Part) -> Table:
    rows = []
    for width in part.widths:
        for method in part.methods:
            for number, layer in enumerate(LAYERS, 1):
                found = mean_overlap(of(cells, width, method), layer)
                if found:
                    at = [found[k - 1] if k <= len(found) else None for k in (1, 5, 10, 25, 50)]
                    rows.append([f"{width} layer {number}", *(known(value) for value in at), str(len(found))])
    return Table(part.title, ["width, layer", "k = 1", "5", "10", "25", "50", "rank"], rows)


def plot(cells: list[Cell], parts: dict[str, Part], path: Path) -> None:
    """The curves of Figure 2, then those of Figure 1, one panel for each width that was run."""
    panels: dict[str, dict[str, Any]] = {}
    for width in sorted({cell.width for cell in cells}):
        lines = {}
        for method in LABELS:
            runs = of(cells, width, method)
            if runs:
                lines[LABELS[method]] = (runs[0].history.epochs, [run.history.train for run in runs])
        panels[f"train accuracy, width {width}"] = lines
    plot_curves(path, panels)
    if "figure1" not in parts:
        return
    part, overlaps = parts["figure1"], dict[str, dict[str, Any]]()
    for width in part.widths:
        lines = {}
        for number, layer in enumerate(LAYERS, 1):
            found = mean_overlap(of(cells, width, "w_perp"), layer)
            if found:
                lines[f"layer {number}"] = ([*range(1, len(found) + 1)], [found])
        if lines:
            overlaps[f"overlap (19), width {width}"] = lines
    if overlaps:
        plot_curves(path.with_name("wang_overlap.png"), overlaps, xlabel="k")
