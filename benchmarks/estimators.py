"""Every registered estimator on MNIST-1D: cosine, bias, variance, step time over backprop's, peak memory."""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.data import Dataset, mnist1d
from benchmarks.measure import Ratio, peak_memory, time_ratios
from benchmarks.methods import METHODS, guessing
from benchmarks.problems import relu_mlp
from benchmarks.report import COMMITTED, SCRATCH, Table, print_table, write_json
from benchmarks.training import Learner, Settings, fit_epochs
from guessopt.diagnostics import bias, cosine, variance
from guessopt.estimators import estimator_names, make_estimator

WIDTH = 128
SITE = "0.weight"
"""Layer 1, which the paper's tables are about."""


@dataclass(frozen=True)
class Row:
    """One estimator on one batch, on a network that backprop has trained for some epochs.

    Attributes:
        cosine: mean over draws; ``error``: its standard error.
        bias: over the norm of the gradient of all parameters.
        variance: over the square of that norm.
        site_bias, site_variance: of layer 1 (Wang eqs. 17 and 18). None for an estimator that guesses parameters.
    """

    cosine: float
    error: float
    bias: float
    variance: float
    site_bias: float | None
    site_variance: float | None
    time: Ratio
    peak_bytes: int


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    quick = args.quick
    settings = Settings(epochs=2 if quick else 30)
    draws, rounds, block = (5, 3, 5) if quick else (200, 7, 50)
    data = mnist1d(args.data_root).to(args.device)
    model = trained(data, settings)
    x, y = data.x[: settings.batch], data.y[: settings.batch]

    names = ready_names()
    methods = {"backprop": METHODS["backprop"], **{name: guessing(name, name) for name in names}}
    makers = {name: partial(own.learner, copy.deepcopy(model), settings.lr) for name, own in methods.items()}
    peaks = {name: peak_memory(make, x, y) for name, make in makers.items()}
    steps = {name: partial(make().step, x, y) for name, make in makers.items()}
    times = time_ratios(steps, baseline="backprop", rounds=rounds, block=block, device=args.device)

    rows = {}
    for name in tqdm(names, desc="bias and variance", disable=None):
        learner = methods[name].learner(copy.deepcopy(model), settings.lr)
        rows[name] = judge(learner, x, y, draws, times[name], peaks[name])
    print_table(*table(rows, settings, peaks["backprop"]))

    out = args.out or (SCRATCH if quick else COMMITTED)
    recorded = asdict(settings) | {"width": WIDTH, "hidden_layers": 3, "draws": draws, "device": args.device}
    figures = {"backprop_peak_bytes": peaks["backprop"], "rows": {name: asdict(row) for name, row in rows.items()}}
    write_json(out / "estimators.json", args, seeds=[0], settings=recorded, figures=figures)
    plot(rows, out / "estimators.png")
    print(f"Figures in {out / 'estimators.json'}, picture in {out / 'estimators.png'}")


def ready_names() -> list[str]:
    """The registered estimators that need no options."""
    found = []
    for name in estimator_names():
        try:
            make_estimator(name)
        except (TypeError, ValueError):
            continue
        found.append(name)
    return found


def trained(data: Dataset, settings: Settings) -> nn.Module:
    """The network on which all estimators are judged. Backprop trains it for some epochs, so that the gradient is a
    typical one."""
    torch.manual_seed(0)
    learner = METHODS["backprop"].learner(relu_mlp(WIDTH).to(data.x.device), settings.lr)
    fit_epochs(learner, data, settings, seed=0, label="backprop")
    return learner.model


def judge(learner: Learner, x: torch.Tensor, y: torch.Tensor, draws: int, time: Ratio, peak: int) -> Row:
    opt = learner.optimizer

    def closure() -> torch.Tensor:
        return learner.loss(x, y)

    cosines = torch.tensor([cosine(opt, closure).total for _ in range(draws)])
    # Where an estimator declares no moments, the bias is estimated from draws: from many, to see past the variance.
    off = bias(opt, closure, 5 * draws)
    spread = variance(opt, closure, draws)
    return Row(
        cosine=float(cosines.mean()),
        error=float(cosines.std()) / draws**0.5,
        bias=off.total,
        variance=spread.total,
        site_bias=off.per_site.get(SITE),
        site_variance=spread.per_site.get(SITE),
        time=time,
        peak_bytes=peak,
    )


def tables_of(content: dict[str, Any]) -> list[Table]:
    """The tables for the content of this experiment's JSON."""
    recorded, figures = content["settings"], content["figures"]
    rows = {name: Row(**{**row, "time": Ratio(**row["time"])}) for name, row in figures["rows"].items()}
    settings = Settings(recorded["epochs"], recorded["batch"], recorded["lr"])
    return [table(rows, settings, figures["backprop_peak_bytes"])]


def table(rows: dict[str, Row], settings: Settings, backprop_bytes: int) -> Table:
    return Table(
        f"MNIST-1D, 3 hidden layers of {WIDTH}, batch {settings.batch}, after {settings.epochs} epochs of backprop",
        ["estimator", "cosine", "bias", "variance", "time", "peak MB"],
        [
            [
                name,
                f"{row.cosine:.3f}",
                f"{row.bias:.3f}",
                f"{row.variance:.3g}",
                f"{row.time.ratio:.2f}",
                f"{row.peak_bytes / 1e6:.2f}",
            ]
            for name, row in rows.items()
        ],
        "cosine: one guess, mean over draws. bias: ||E g^ - g|| / ||g||. variance: E ||g^ - E g^||^2 / ||g||^2.\n"
        f"time: a step over a backprop step. peak MB: of one step; backprop {backprop_bytes / 1e6:.2f}.\n"
        "Layer 1's figures (Wang eqs. 17 and 18) are in the JSON. Learned feedback has not learned yet: except before "
        "the head it is its guess alone.",
    )


def plot(rows: dict[str, Row], path: Path) -> None:
    """Variance against bias, a point for each estimator."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    for name, row in rows.items():
        axes.plot(row.bias, row.variance, "o")
        axes.annotate(name, (row.bias, row.variance), textcoords="offset points", xytext=(4, 4), fontsize="small")
    axes.set(xlabel="relative bias", ylabel="relative variance", yscale="log")
    axes.set_title("bias and variance of one guess")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
