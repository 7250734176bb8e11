"""Plots of results. Only this module of the package imports matplotlib, and only when a plot is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def axes(ax: Any) -> Any:
    """The given axes, or new axes."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def bars(values: Mapping[str, float], ax: Any, title: str, *, log: bool = False) -> Any:
    """One horizontal bar per name, the first on top."""
    ax = axes(ax)
    ax.barh(list(values), list(values.values()))
    ax.invert_yaxis()
    ax.set_title(title)
    if log:
        ax.set_xscale("log")
    return ax


def curve(
    x: Sequence[float] | None,
    lines: Mapping[str, Sequence[float]],
    ax: Any,
    xlabel: str,
    ylabel: str,
    styles: Mapping[str, str] | None = None,
) -> Any:
    """One line per label over ``x`` (None: 1, 2, ...)."""
    ax = axes(ax)
    for label, y in lines.items():
        at = range(1, len(y) + 1) if x is None else x
        ax.plot(at, y, (styles or {}).get(label, "-"), label=label or None)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    if any(lines):
        ax.legend(fontsize="small")
    return ax
