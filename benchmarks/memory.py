"""Peak memory and time of a step: backprop, checkpointing, MeZO and guessing; training under a memory limit."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.isolated import Task, collect
from benchmarks.memory_cases import FULL, LIMITED, METHODS, QUICK, TIMED, Settings, settings_of
from benchmarks.memory_measures import between, cell, limited, long_stream, modes_race
from benchmarks.memory_tables import plot, tables
from benchmarks.report import COMMITTED, SCRATCH, Table, print_table


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", nargs="+", choices=FULL, metavar="NAME", help=", ".join(FULL))
    parser.add_argument("--fresh", action="store_true", help="repeat the measurements that the file has already")


def run(args: argparse.Namespace) -> None:
    settings, out = settings_of(args), args.out or (SCRATCH if args.quick else COMMITTED)
    cases = {name: case for name, case in (QUICK if args.quick else FULL).items() if name in (args.problems or FULL)}
    path = out / "memory.json"
    tasks: dict[str, Task] = {"stream": (long_stream, (settings,)), "between": (between, (settings,))}
    if sys.platform == "linux" and args.device == "cpu":
        tasks |= {f"limit {method}": (limited, (method, settings)) for method in LIMITED}
    for name in TIMED[args.quick]:
        tasks[f"race {name}"] = modes_race, (name, settings)
    for name in cases:
        tasks |= {f"{name} {method}": (cell, (name, method, settings)) for method in METHODS}
    figures = collect(path, args, asdict(settings), tasks)
    for table in tables(figures, cases, settings):
        print_table(*table)
    plot(figures, cases, out / "memory.png")
    print(f"Figures in {path}, picture in {out / 'memory.png'}")


def tables_of(content: Mapping[str, Any]) -> list[Table]:
    """The tables of a JSON that this experiment wrote."""
    settings, figures = Settings(**content["settings"]), content["figures"]
    cases = {name: case for name, case in FULL.items() if f"{name} backprop" in figures}
    return tables(figures, cases, settings)
