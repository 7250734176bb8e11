"""Fine-tuning without backpropagation: prompts, LoRA, corrupted images, sentences; accuracy, memory, time; resumes."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.finetune.problem import METHODS
from benchmarks.finetune.report import open_file, plot, shown, table
from benchmarks.finetune.runs import Results, Session
from benchmarks.report import COMMITTED, SCRATCH, Table, print_table

TASKS = ("corrupted", "sentences", "lora", "prompts")
"""Modules of this folder. Each has ``TITLE``, ``SETTINGS``, ``QUICK`` and ``problem(args, settings)``."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help=", ".join(METHODS)
    )
    parser.add_argument("--model", metavar="NAME", help="lora, sentences: a causal language model of the hub instead")
    parser.add_argument("--data", choices=["trec", "sst2"], default="trec", help="sentences: the data set")
    parser.add_argument("--vit", choices=["small", "vit_b_16"], default="small", help="prompts: vit_b_16 is downloaded")
    parser.add_argument("--fresh", action="store_true", help="repeat the runs that the file has already")
    parser.add_argument("--estimate", action="store_true", help="print how long the missing runs will take, and stop")


def run(args: argparse.Namespace) -> None:
    if args.data_root is None:
        raise SystemExit("finetune: name the folder with models and data by --data-root or GUESSOPT_DATA")
    torch.set_num_threads(1)
    args.data_root = Path(args.data_root)
    out = args.out or (SCRATCH if args.quick else COMMITTED)
    for name in args.tasks:
        task = importlib.import_module(f"benchmarks.finetune.{name}")
        settings = task.QUICK if args.quick else task.SETTINGS
        problem = task.problem(args, settings).to(args.device)
        path = out / f"finetune_{name}.json"
        results, save = open_file(path, args, settings, Results(task.TITLE, problem.note, problem.tuned))
        session = Session(problem, settings, results, save, rounds=2 if args.quick else 5)
        seeds = args.seeds or (1 if args.quick else 3)
        methods = [m for m in args.methods if m != "head" or problem.head]
        if args.estimate:
            seconds = session.seconds(methods, seeds)
            parts = ", ".join(f"{METHODS[m].label} {s / 60:.1f}" for m, s in seconds.items())
            print(f"{name}: about {sum(seconds.values()) / 60:.0f} min ({parts})")
            continue
        session.compare(methods, seeds)
        if shown(results):
            print_table(*table(results, vars(settings)))
            plot(results, path.with_suffix(".png"))
            print(f"Figures in {path}, curves in {path.with_suffix('.png')}")


def tables_of(content: Mapping[str, Any]) -> list[Table]:
    """For the page of results."""
    results = Results.of(content["figures"])
    return [table(results, content["settings"])] if shown(results) else []
