"""Learned feedback against backprop and feedback alignment on eleven networks; resumes where it stopped."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.feedback_bench import Bench
from benchmarks.feedback_runs import DEFAULT, LABELS, LRS, METHODS, PROBLEMS, QUICK, Cells, Pace, Runs, cells_of
from benchmarks.feedback_tables import plot, tables
from benchmarks.report import COMMITTED, SCRATCH, Table, print_table, write_json


def add_options(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(PROBLEMS)
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), metavar="P", help=names)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--fresh", action="store_true", help="repeat the runs that the file has already")
    parser.add_argument("--estimate", action="store_true", help="print how long the missing runs will take, and stop")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    problems = args.problems or (QUICK if args.quick else list(PROBLEMS))
    wanted = {name: tuple(args.methods or (*DEFAULT, *PROBLEMS[name].extra)) for name in problems}
    methods = tuple(dict.fromkeys(method for each in wanted.values() for method in each))
    seeds = {name: args.seeds or (1 if args.quick else PROBLEMS[name].seeds) for name in problems}
    lrs = (1e-3,) if args.quick else LRS
    out = args.out or (SCRATCH if args.quick else COMMITTED)
    path = out / "feedback.json"
    bench = Bench(args, lrs, *(({}, {}) if args.fresh or args.quick else finished(path)))
    if bench.cells:
        print(f"{len(bench.cells)} finished runs taken from {path} (--fresh runs them again)")
    if args.estimate:
        bench.estimate(problems, methods, seeds)
        return

    def keep() -> None:
        recorded = {"lrs": list(lrs), "device": args.device, "unigram_loss": bench.unigram, "pace": bench.pace}
        figures = [asdict(bench.cells[key]) for key in sorted(bench.cells)]
        write_json(path, args, seeds=sorted({key[3] for key in bench.cells}), settings=recorded, figures=figures)

    for problem in problems:
        for key in bench.missing(problem, wanted[problem], seeds[problem]):
            print(f"{problem}, {LABELS[key[1]]}, lr {key[2]:g}, seed {key[3]}")
            bench.cells[key] = bench.train(key)
            keep()
        bench.measure(problem, wanted[problem])
    keep()
    for table in tables(bench, problems, methods):
        print_table(*table)
    plot(bench, problems, methods, out / "feedback.png")
    print(f"Figures in {path}, curves in {out / 'feedback.png'}")


def finished(path: Path) -> tuple[Cells, Pace]:
    """The runs in the file that have today's settings, and the paces in it."""
    if not path.is_file():
        return {}, {}
    content = json.loads(path.read_text())
    cells = {
        key: cell
        for key, cell in cells_of(content).items()
        if cell.problem in PROBLEMS and cell.settings == PROBLEMS[cell.problem].settings(quick=False)
    }
    return cells, content["settings"].get("pace", {})


def tables_of(content: dict[str, Any]) -> list[Table]:
    """The tables for the content of this experiment's JSON, without those that have no runs."""
    settings = content["settings"]
    runs = Runs(tuple(settings["lrs"]), cells_of(content), settings["unigram_loss"], settings["pace"])
    return [table for table in tables(runs, list(PROBLEMS), tuple(LABELS)) if table.rows]
