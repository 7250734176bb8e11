"""The file, the table and the picture of a fine-tuning task."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.finetune.problem import METHODS, Settings
from benchmarks.finetune.runs import Results, rate
from benchmarks.report import Table, spread, write_json


def open_file(
    path: Path, args: argparse.Namespace, settings: Settings, new: Results
) -> tuple[Results, Callable[[], None]]:
    """The results in the file, if it has the same settings, else ``new``; and a function that writes them."""
    recorded = {**asdict(settings), "grid": list(settings.grid), "device": args.device}
    results = new
    if path.is_file() and not args.fresh and not args.quick:
        content = json.loads(path.read_text())
        if content["settings"] == recorded:
            results = Results.of(content["figures"])

    def save() -> None:
        seeds = sorted({run.seed for run in results.runs.values()})
        write_json(path, args, seeds=seeds, settings=recorded, figures=results.figures())

    return results, save


def shown(results: Results) -> list[str]:
    """The methods that have costs and finished runs, in the order of ``METHODS``."""
    return [m for m in METHODS if m in results.costs and results.finished(m)]


def time_budget(results: Results) -> float:
    """Time until the quickest method has spent its passes, in backprop steps. Every method has run for so long."""
    return min(results.costs[m].steps * results.costs[m].time.ratio for m in shown(results))


def table(results: Results, settings: Mapping[str, Any]) -> Table:
    rows, budget = [], time_budget(results)
    for method in shown(results):
        cost, runs = results.costs[method], results.finished(method)
        rows.append(
            [
                METHODS[method].label,
                f"{rate(runs[0].level):.0e}".replace("e-0", "e-"),
                spread([run.at(cost.steps) for run in runs]),
                spread([run.at(budget / cost.time.ratio) for run in runs]),
                str(cost.steps),
                f"{cost.time.ratio:.2f}",
                f"{cost.peak_bytes / 1e6:.1f}",
            ]
        )
    columns = ["method", "lr", "equal\npasses", "equal\ntime", "steps", "time", "peak\nMB"]
    before = next(iter(results.runs.values())).test[0]
    seeds = max(len(results.finished(m)) for m in shown(results))
    note = (
        f"{results.note} Test accuracy before tuning {before:.3f}; {100 * results.tuned:.2g} % of the weights tuned; "
        f"{seeds} seed(s), mean ± standard deviation. Equal passes: {settings['passes']} for each method; equal time: "
        f"that of {budget:.0f} backprop steps. time: median time of a step over that of a backprop step. peak MB: of a "
        "step, above parameters and optimizer state."
    )
    return Table(results.title, columns, rows, note)


def plot(results: Results, path: Path) -> None:
    """Test accuracy over passes, over time, and against peak memory. A band shows the range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", sharey=True)
    for number, method in enumerate(METHODS):
        if method not in shown(results):
            continue
        cost, runs, label = results.costs[method], results.finished(method), METHODS[method].label
        ends = [run.at(cost.steps) for run in runs]
        axes[2].plot(cost.peak_bytes / 1e6, mean(ends), "o", color=f"C{number}", label=label)
        if METHODS[method].follows is not None:
            continue
        columns = list(zip(*(run.test for run in runs), strict=True))
        for axis, unit in ((axes[0], 1 / cost.steps), (axes[1], cost.time.ratio)):
            x = [step * unit for step in runs[0].steps]
            axis.plot(x, [mean(c) for c in columns], color=f"C{number}", label=label)
            axis.fill_between(x, [*map(min, columns)], [*map(max, columns)], color=f"C{number}", alpha=0.2, linewidth=0)
    axes[0].set(title=results.title, xlabel="share of the passes", ylabel="test accuracy")
    axes[1].set(title="over time", xlabel="time, in backprop steps")
    axes[2].set(title="against memory", xlabel="peak MB of a step", xscale="log")
    axes[2].legend(fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
