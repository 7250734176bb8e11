"""The tables and the picture of the experiment ``feedback``."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.feedback_runs import LABELS, LRS, PROBLEMS, Cell, Look, Runs
from benchmarks.report import Table, plot_curves, spread


def tables(runs: Runs, problems: list[str], methods: tuple[str, ...]) -> list[Table]:
    return [table(runs, name, methods) for name in problems]


def table(runs: Runs, name: str, methods: tuple[str, ...]) -> Table:
    problem = PROBLEMS[name]
    judge = problem.judge
    parts = (judge, "test") if judge == "loss" else (judge, "train" if judge == "test" else "test")
    rows, steps = [], 0
    base = runs.chosen(name, "backprop")
    for method in methods:
        cells = [cell for cell in runs.chosen(name, method) if not cell.failed]
        if not cells:
            continue
        ends, steps = [cell.looks[-1] for cell in cells], cells[0].settings["steps"]
        values = [[getattr(end, part) for end in ends] for part in parts]
        reached, slower = relative(runs, name, cells, base), slowness(runs, name, cells, base)
        row = [LABELS[method], f"{cells[0].lr:g}", str(len(cells)), spread(values[0]), f"{mean(values[1]):.3f}"]
        row += ["-" if reached is None else f"{reached:.3f}"]
        row += ["-" if t is None else f"{t:.2f}" for t in (runs.paced(name, method), slower)]
        rows.append([*row, *_cosines(ends)])
    columns = ["method", "lr", "seeds", *parts, "of\nbackprop", "step\ntime", "time\nto 95%", "cosine", "worst\nsite"]
    wanted = f"Learned feedback should reach {problem.target:g} of backprop's {judge}"
    fall = ", falling linearly to zero," if problem.decays else ""
    note = f"Learning rates{fall} by {judge} of seed 0. {wanted}{' drop below the unigram' if judge == 'loss' else ''}."
    small = runs.cells.get((name, "learned_feedback", LRS[0], 0))
    worst = [min(look.sites.values()) for look in small.looks if look.sites] if small is not None else []
    if worst:
        note += f" At lr {LRS[0]:g} its cosine was at least {min(worst):.3f} at every site."
    return Table(f"{problem.title}, {steps} steps", columns, rows, note)


def _cosines(ends: list[Look]) -> list[str]:
    """Cosine to the true gradient: of all parameters, and of the worst site."""
    values = [[end.cosine for end in ends if end.cosine is not None], [min(e.sites.values()) for e in ends if e.sites]]
    return [f"{mean(found):.3f}" if found else "-" for found in values]


def _pairs(cells: list[Cell], base: list[Cell]) -> list[tuple[Cell, Cell]]:
    return [(c, b) for c in cells for b in base if c.seed == b.seed and not b.failed]


def relative(runs: Runs, name: str, cells: list[Cell], base: list[Cell]) -> float | None:
    """The judged figure over backprop's; means over the seeds that both have. For a loss: drops below the unigram."""
    judge, pairs = PROBLEMS[name].judge, _pairs(cells, base)
    if not pairs:
        return None
    zero = runs.unigram.get(name, 0.0)
    return mean(zero + c.figure(judge) for c, _ in pairs) / mean(zero + b.figure(judge) for _, b in pairs)


def slowness(runs: Runs, name: str, cells: list[Cell], base: list[Cell]) -> float | None:
    """Time until 95% of backprop's last figure, over backprop's own time (steps times the pace).

    None: one of the runs never reaches that figure.
    """
    judge, zero = PROBLEMS[name].judge, runs.unigram.get(name, 0.0)
    pace = runs.paced(name, cells[0].method)
    ratios = []
    for c, b in _pairs(cells, base):
        figure = 0.95 * (zero + b.figure(judge)) - zero
        ours, theirs = c.reaches(judge, figure), b.reaches(judge, figure)
        if ours is None or not theirs or pace is None:
            return None
        ratios.append(pace * ours / theirs)
    return mean(ratios) if ratios else None


def plot(runs: Runs, problems: list[str], methods: tuple[str, ...], path: Path) -> None:
    panels: dict[str, dict[str, Any]] = {}
    for name in problems:
        judge = PROBLEMS[name].judge
        lines = {}
        for method in methods:
            cells = [cell for cell in runs.chosen(name, method) if not cell.failed]
            if cells:
                steps = [look.step for look in cells[0].looks]
                lines[LABELS[method]] = (steps, [[getattr(look, judge) for look in cell.looks] for cell in cells])
        panels[f"{judge}: {PROBLEMS[name].title}"] = lines
    plot_curves(path, panels, xlabel="step")
