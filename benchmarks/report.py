"""What an experiment leaves behind: a JSON with its figures and circumstances, a table, a picture."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from rich import table as rich_table
from rich.console import Console
from rich.measure import Measurement

COMMITTED = Path("benchmarks/results")
"""Where results that documents quote are kept."""
SCRATCH = Path("out")
"""Where results that nobody quotes go."""


def printable_command(argv: Sequence[str]) -> str:
    """The command as a reader elsewhere would type it: folders of this machine are left out."""
    words = re.sub(r"--(data-root|out)[= ]\S+ ?", "", " ".join(argv)).strip()
    return f"python -m benchmarks {words}"


def environment(device: str) -> dict[str, Any]:
    """Versions and hardware that a figure may depend on."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def write_json(
    path: Path, args: argparse.Namespace, *, seeds: Iterable[int], settings: Mapping[str, Any], figures: Any
) -> None:
    """Write a result with everything needed to get it again."""
    content = {
        "command": args.command,
        "seeds": list(seeds),
        "settings": dict(settings),
        "environment": environment(args.device),
        "figures": figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(content), indent=1)
    text = re.sub(r"\[[^\[\]{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # lists of numbers: one line
    temporary = path.with_suffix(".part")
    temporary.write_text(text + "\n")
    temporary.replace(path)  # an interrupted run leaves the old file whole


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def spread(values: Sequence[float]) -> str:
    """A mean, with the standard deviation where there is more than one value."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


class Table(NamedTuple):
    """A table that `print_table` prints: the first column is text, the others are figures; `note` stands below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def number(self, row: str, column: str) -> str:
        """The cell of a row, by its first cell, and a column; without the spread or the quartiles.

        Raises:
            KeyError, ValueError: there is no such row or column.
        """
        cells = {cells[0]: cells for cells in self.rows}[row]
        return cells[list(self.columns).index(column)].split()[0]

    def markdown(self) -> list[str]:
        """The lines of a Markdown table, below its title and above its note."""

        def row(cells: Iterable[str]) -> str:
            return "| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in cells) + " |"

        title = [f"**{self.title}**", ""] if self.title else []
        rule = "| --- |" + " ---: |" * (len(self.columns) - 1)
        note = ["", *self.note.splitlines()] if self.note else []
        return [*title, row(self.columns), rule, *map(row, self.rows), *note]


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> None:
    table = rich_table.Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    wide = Console(width=1000)
    needed = Measurement.get(wide, wide.options, table).maximum
    Console(width=max(Console().width, needed)).print(table)  # figures are not cut where the screen is narrow
    if note:
        print(note)


Curve = tuple[Sequence[float], Sequence[Sequence[float]]]
"""Places on the x axis, and one list of values per seed."""


def plot_curves(path: Path, panels: Mapping[str, Mapping[str, Curve]], *, xlabel: str = "epoch") -> None:
    """One panel per title, one line per label: the mean over seeds, in a band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    wide = min(4, len(panels))
    high = -(-len(panels) // wide)
    figure, axes = plt.subplots(high, wide, figsize=(4.6 * wide, 3.8 * high), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for label, (x, runs) in lines.items():
            columns = list(zip(*runs, strict=True))
            color = f"C{labels.index(label)}"
            axis.plot(x, [mean(column) for column in columns], color=color, label=label)
            if len(runs) > 1:
                axis.fill_between(x, [*map(min, columns)], [*map(max, columns)], color=color, alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel=xlabel)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
