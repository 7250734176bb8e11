"""Tables 1 to 5 and Figures 1 and 2 of Wang et al. 2025 on MNIST-1D, ours beside theirs; resumes where it stopped."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import Dataset, mnist1d
from benchmarks.measure import seconds
from benchmarks.mnist1d import thinned
from benchmarks.problems import relu_mlp
from benchmarks.report import COMMITTED, SCRATCH, Table, print_table, write_json
from benchmarks.training import History, Learner, Settings, epoch_of, fit_epochs, is_due, steps_per_epoch
from benchmarks.wang_parts import LABELS, METHODS, PARTS, SLOW, Cell, Look, Part
from benchmarks.wang_tables import plot, tables
from guessopt import WPerp
from guessopt.diagnostics import bias, covariance_norm, overlap, variance


@dataclass(frozen=True)
class Plan:
    """The runs of one call: ``looks`` measurements in each run, of ``draws`` passes each."""

    parts: dict[str, Part]
    settings: Settings
    seeds: range
    looks: int
    draws: int

    def cells(self) -> dict[tuple[int, str, int], bool]:
        """Keys of the runs, by seed and then by width, and whether the run is measured. Parts share their runs."""
        found: dict[tuple[int, str, int], bool] = {}
        for part in self.parts.values():
            for width in part.widths:
                for method in part.methods:
                    for seed in self.seeds:
                        key = width, method, seed
                        found[key] = found.get(key, False) or part.measured
        return dict(sorted(found.items(), key=lambda item: (item[0][2], item[0][0])))


def add_options(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(PARTS)
    parser.add_argument("--tables", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=names)
    parser.add_argument("--widths", type=int, nargs="+", help="only these hidden widths (default: the paper's)")
    parser.add_argument("--methods", nargs="+", choices=list(LABELS), metavar="METHOD", help=", ".join(LABELS))
    parser.add_argument("--fresh", action="store_true", help="repeat the runs that the file has already")
    parser.add_argument("--estimate", action="store_true", help="print how long the missing runs will take, and stop")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    plan = make_plan(args)
    data = mnist1d(args.data_root).to(args.device)
    recorded = asdict(plan.settings) | {"looks": plan.looks, "draws": plan.draws, "device": args.device}
    out = args.out or (SCRATCH if args.quick else COMMITTED)
    path = out / "wang.json"

    cells = {} if args.fresh or args.quick else finished(path, recorded)
    if cells:
        print(f"{len(cells)} finished runs taken from {path} (--fresh runs them again)")
    missing = {k: m for k, m in plan.cells().items() if k not in cells or (m and not cells[k].looks)}
    if args.estimate:
        estimate(missing, data, plan)
        return
    for number, (key, measured) in enumerate(missing.items(), 1):
        print(f"run {number} of {len(missing)}: width {key[0]}, {LABELS[key[1]]}, seed {key[2]}")
        cells[key] = train(*key, data, plan, measured)
        figures = [asdict(cells[k]) for k in sorted(cells)]
        write_json(path, args, seeds=sorted({k[2] for k in cells}), settings=recorded, figures=figures)
    chosen = [cells[key] for key in plan.cells() if key in cells]
    for table in tables(chosen, plan.parts):
        print_table(*table)
    print(f"{plan.settings.epochs} epochs (paper: 300), seeds {', '.join(map(str, plan.seeds))}.")
    plot(chosen, plan.parts, out / "wang.png")
    print(f"Figures in {path}, curves in {out / 'wang.png'}")


def make_plan(args: argparse.Namespace) -> Plan:
    parts = {}
    for name in args.tables:
        part = PARTS[name]
        widths = (32,) if args.quick and not args.widths else part.widths
        if args.widths:
            widths = tuple(args.widths) if args.quick else tuple(w for w in widths if w in args.widths)
        methods = tuple(m for m in part.methods if (m in args.methods if args.methods else m not in SLOW))
        if widths and methods:
            parts[name] = Part(part.title, widths, methods, part.measured)
    if not parts:
        raise SystemExit("nothing to run: none of the chosen tables has these widths and methods")
    seeds = range(args.seeds or (1 if args.quick else 3))
    if args.quick:
        return Plan(parts, Settings(epochs=3), seeds, looks=1, draws=2)
    return Plan(parts, Settings(), seeds, looks=10, draws=20)


def finished(path: Path, settings: dict[str, Any]) -> dict[tuple[int, str, int], Cell]:
    """The runs in the file, if it was written with the same settings."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    return cells_of(content) if content["settings"] == settings else {}


def cells_of(content: dict[str, Any]) -> dict[tuple[int, str, int], Cell]:
    found = {}
    for figures in content["figures"]:
        looks = [Look(**look) for look in figures["looks"]]
        cell = Cell(**{**figures, "history": History(**figures["history"]), "looks": looks})
        found[cell.key] = cell
    return found


def make_learner(method: str, width: int, settings: Settings, device: torch.device) -> Learner:
    options = {"estimator": WPerp(k=width)} if method == "w_perp_rank" else {}
    return METHODS[method].learner(relu_mlp(width).to(device), settings.lr, **options)


def train(width: int, method: str, seed: int, data: Dataset, plan: Plan, measured: bool) -> Cell:
    """One run. The measurements are not in its ``seconds``. They draw from the stream of guesses, and change nothing
    else of the training."""
    torch.manual_seed(seed)
    learner = make_learner(method, width, plan.settings, data.x.device)
    looks: list[Look] = []

    def each(epoch: int) -> None:
        if measured and is_due(epoch, plan.settings.epochs, plan.looks):
            looks.append(look(learner, data, plan, epoch))

    label = f"{LABELS[method]} {width}"
    history, outcome = fit_epochs(learner, data, plan.settings, seed=seed, label=label, each=each)
    return Cell(width, method, seed, thinned(history), outcome.seconds, looks)


def look(learner: Learner, data: Dataset, plan: Plan, epoch: int) -> Look:
    """All metrics of Wang 4.1 on one fixed batch."""
    x, y = next(epoch_of(data, plan.settings.batch))

    def closure() -> torch.Tensor:
        return learner.loss(x, y)

    opt = learner.optimizer
    spread_, off = variance(opt, closure, plan.draws), bias(opt, closure)
    norm = covariance_norm(opt, closure, probes=8)
    return Look(
        epoch,
        spread_.per_site,
        spread_.of_mean,
        off.per_site,
        off.relative,
        norm.per_site,
        overlap(opt, closure, examples=16).per_site,
    )


def estimate(missing: dict[tuple[int, str, int], bool], data: Dataset, plan: Plan) -> None:
    """Prints how long the missing runs will take, from the times of two steps and one look."""
    rows, total, costs = [], 0.0, dict[tuple[int, str, bool], float]()
    size, device = plan.settings.batch, data.x.device
    for (width, method, _), measured in missing.items():
        if (width, method, measured) not in costs:
            learner = make_learner(method, width, plan.settings, device)
            step = partial(learner.step, data.x[:size], data.y[:size])
            seconds(step, 3, device.type)  # tracing, and the bases of the first step
            each, of_look = seconds(step, 2, device.type) / 2, 0.0
            if measured:
                few = partial(look, learner, data, replace(plan, draws=2), 1)
                of_look = seconds(few, 1, device.type) + (plan.draws - 2) * each
            steps = plan.settings.epochs * steps_per_epoch(data, size)
            costs[width, method, measured] = steps * each + plan.looks * of_look
            minutes = costs[width, method, measured] / 60
            rows.append([f"{width} {LABELS[method]}", f"{1e3 * each:.1f}", f"{of_look:.1f}", f"{minutes:.1f}"])
        total += costs[width, method, measured]
    print_table("Estimated time", ["run", "ms/step", "s/look", "min/run"], rows)
    print(f"{len(missing)} runs, {total / 3600:.2f} h in all, one after another")


def tables_of(content: dict[str, Any]) -> list[Table]:
    """The tables for the content of this experiment's JSON, without those that have no runs."""
    found = tables([*cells_of(content).values()], PARTS)
    return [table for table in found if table.rows]
