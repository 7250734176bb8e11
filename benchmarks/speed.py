"""Step time over a backprop step and over a checkpointed one, and where a W-perp step's time goes.

Three options measure something else instead:

| option | measures |
|---|---|
| ``--guesses K`` | the cost of K guesses in one pass, in units of one guess |
| ``--single`` | single steps of small networks, and the audits' share of a thousand steps |
| ``--against DIR`` | the same beside another version of the package, whose checkout is in DIR |
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measure import Ratio, interleaved, ratio, seconds
from benchmarks.methods import labels
from benchmarks.report import COMMITTED, SCRATCH, Table, print_table, write_json
from benchmarks.speed_guesses import run_guesses
from benchmarks.speed_phases import PHASES, LongRun, long_run
from benchmarks.speed_single import run_single
from benchmarks.speed_steps import DEFAULT_ENGINE, ENGINES, PROBLEMS, Bench
from guessopt import GuessWarning

NAMES = ("w_perp", "w_transpose", "activation_perturbation", "directional_descent", "learned_feedback")
LABELS = labels(("backprop", "checkpointed", *NAMES))


@dataclass(frozen=True)
class Settings:
    """Settings of the experiment.

    Attributes:
        methods: estimator and engine, by the name that the JSON gives the pair.
        engine: of the ``steps`` consecutive steps whose phases are timed.
    """

    quick: bool
    device: str
    rounds: int
    steps: int
    engine: str
    methods: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Row:
    """Figures of one problem. ``seconds``: of a median step; they depend on the machine, so quote only ratios."""

    parameters: int
    batch: int
    over_backprop: dict[str, Ratio]
    over_checkpointed: dict[str, Ratio]
    seconds: dict[str, float]
    long_run: LongRun
    notes: list[str]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--rounds", type=int, help="rounds of timed steps (default: 15)")
    parser.add_argument(
        "--steps", type=int, help="consecutive steps, in which every basis is made twice (default: 100)"
    )
    parser.add_argument(
        "--engine", default=DEFAULT_ENGINE, help="engine of the consecutive steps (default: the optimizer's)"
    )
    parser.add_argument("--reference", action="store_true", help="measure the engine func (torch.func.jvp) too")
    parser.add_argument("--guesses", type=int, metavar="K", help="measure only the cost of K guesses in one pass (CPU)")
    parser.add_argument(
        "--single", action="store_true", help="measure only single steps of small networks, and audits (CPU)"
    )
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="like --single, beside the version whose checkout is in DIR"
    )


def run(args: argparse.Namespace) -> None:
    out = args.out or (SCRATCH if args.quick else COMMITTED)
    if args.single or args.against:
        run_single(args, out)
        return
    if args.guesses:
        before = torch.get_num_threads()
        torch.set_num_threads(args.threads)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", GuessWarning)
                run_guesses(args, out)
        finally:
            torch.set_num_threads(before)
        return
    chosen = [name for name in ENGINES if name != "func" or args.reference]
    settings = Settings(
        quick=args.quick,
        device=args.device,
        rounds=args.rounds or (3 if args.quick else 15),
        steps=args.steps or (6 if args.quick else 100),
        engine=args.engine,
        methods={f"{method}, {engine}": (method, engine) for engine in chosen for method in NAMES},
    )
    path, before = out / "speed.json", torch.get_num_threads()
    rows: dict[str, Row] = {}
    torch.set_num_threads(args.threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GuessWarning)  # the guess of a site does not matter for speed
            for name in args.problems:
                rows[name] = measure(name, settings)
                figures = {key: asdict(row) for key, row in rows.items()}
                write_json(path, args, seeds=[0], settings=asdict(settings), figures=figures)
    finally:
        torch.set_num_threads(before)
    for table in tables(rows, settings):
        print_table(*table)
    plot(rows, out / "speed.png")
    print(f"Figures in {path}, shares in {out / 'speed.png'}")


def measure(name: str, settings: Settings) -> Row:
    entry = PROBLEMS[name]
    batch, device = entry.quick if settings.quick else entry.batch, settings.device
    torch.manual_seed(0)
    made = entry.make(batch)
    bench = Bench(made.to(device))
    kinds = {name: bench.step(name) for name in ("backprop", "checkpointed")}
    kinds |= {key: bench.step(method, engine=engine) for key, (method, engine) in settings.methods.items()}
    block = max(1, ceil(0.02 / seconds(kinds["backprop"], 1, device)))  # long enough for the clock
    times: dict[str, list[float]] = {key: [] for key in kinds}
    for _ in tqdm(
        range(settings.rounds), desc=f"{entry.title:>12}, interleaved", unit="round", leave=False, disable=None
    ):
        for key, values in interleaved(kinds, rounds=1, block=block, device=device).items():
            times[key] += values
    return Row(
        parameters=sum(p.numel() for p in made.model.parameters()),
        batch=batch,
        over_backprop={key: ratio(values, times["backprop"]) for key, values in times.items()},
        over_checkpointed={key: ratio(values, times["checkpointed"]) for key, values in times.items()},
        seconds={key: median(values) / block for key, values in times.items()},
        long_run=long_run(bench, engine=settings.engine, steps=settings.steps, device=device, label=entry.title),
        notes=bench.notes,
    )


def tables_of(content: dict[str, Any]) -> list[Table]:
    """The tables for the content of this experiment's JSON."""

    def ratios(found: dict[str, Any]) -> dict[str, Ratio]:
        return {key: Ratio(**value) for key, value in found.items()}

    rows = {}
    for name, row in content["figures"].items():
        over = {key: ratios(row[key]) for key in ("over_backprop", "over_checkpointed")}
        rows[name] = Row(**{**row, **over, "long_run": LongRun(**row["long_run"])})
    return tables(rows, Settings(**content["settings"]))


def tables(rows: dict[str, Row], settings: Settings) -> list[Table]:
    engines = {engine for _, engine in settings.methods.values()}

    def label(key: str) -> str:
        method, _, engine = key.partition(", ")
        return LABELS[method] + (f", {engine}" if engine and len(engines) > 1 else "")

    over = Table(
        "Step time, ratios of medians (quartiles)",
        ["problem, method", "over backprop", "over checkpointed"],
        [
            [f"{PROBLEMS[name].title}, {label(key)}", str(row.over_backprop[key]), str(row.over_checkpointed[key])]
            for name, row in rows.items()
            for key in ("checkpointed", *settings.methods)
        ],
    )
    titles = [PROBLEMS[name].title.replace(" ", "\n", 1) for name in rows]
    runs = [row.long_run for row in rows.values()]
    consecutive = Table(
        f"{settings.steps} consecutive steps with two refreshes of every basis",
        ["", *titles],
        [
            ["mean W-perp / W^T", *(f"{run.perp_over_transpose:.2f}" for run in runs)],
            ["mean W-perp / backprop", *(f"{run.perp_over_backprop:.2f}" for run in runs)],
            ["slowest / median, W-perp", *(f"{run.slowest['w_perp']:.2f}" for run in runs)],
            ["  because of", *(run.because.removeprefix("guesses: ") for run in runs)],
            ["slowest / median, W^T", *(f"{run.slowest['w_transpose']:.2f}" for run in runs)],
            ["slowest / median, backprop", *(f"{run.slowest['backprop']:.2f}" for run in runs)],
        ],
    )
    shares = Table(
        "Shares of a W-perp step (k=10)",
        ["phase", *titles],
        [[phase, *(f"{100 * run.breakdown[phase]:.1f}%" for run in runs)] for phase in PHASES],
        "forward: the closure alone. interception: a pass without guesses, less the forward. tangents: a pass with\n"
        "guesses, less the making of the guesses and the pass without. bookkeeping: the rest of the step."
        + "".join(f"\n{PROBLEMS[name].title}: {note}." for name, row in rows.items() for note in row.notes),
    )
    return [over, consecutive, shares]


def plot(rows: dict[str, Row], path: Path) -> None:
    """One bar for each problem: the phases of a W-perp step, in units of a backprop step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8.5, 0.7 * len(rows) + 2.2), layout="constrained")
    titles, starts = [PROBLEMS[name].title for name in rows], [0.0] * len(rows)
    for number, phase in enumerate(PHASES):
        widths = [row.long_run.breakdown[phase] * row.long_run.perp_over_backprop for row in rows.values()]
        axis.barh(titles, widths, left=starts, color=f"C{number}" if number < 10 else "0.6", label=phase)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axis.axvline(1, color="black", linewidth=1)
    axis.set(xlabel="W-perp step, in backprop steps")
    axis.invert_yaxis()
    figure.legend(loc="outside right center", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
