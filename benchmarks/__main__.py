"""The command line: one subcommand per module of this package that has a `run(args)` function."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

import torch

import benchmarks
from benchmarks.machine import refused
from benchmarks.report import printable_command


def experiments() -> dict[str, ModuleType]:
    """Every module here with a `run` function, by name; its docstring's first line is its help text."""
    names = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name != "__main__")
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "run")}


def common_options() -> argparse.ArgumentParser:
    """Options that every experiment takes."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--quick", action="store_true", help="a short version, to try the command")
    parser.add_argument("--seeds", type=int, metavar="K", help="number of seeds: 0 .. K-1 (default: the experiment's)")
    parser.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        default=os.environ.get("GUESSOPT_DATA"),
        help="folder with data files; the variable GUESSOPT_DATA does the same",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the JSON and PNG files go")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    subparsers = parser.add_subparsers(metavar="NAME", required=True)
    common = common_options()
    for name, module in experiments().items():
        summary = (module.__doc__ or "").splitlines()[0]
        subparser = subparsers.add_parser(name, help=summary, description=summary, parents=[common])
        if hasattr(module, "add_options"):
            module.add_options(subparser)
        subparser.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    args.command = printable_command(argv)
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if why := refused(lambda: torch.zeros(1, device=args.device)):
        raise SystemExit(f"--device {args.device}: torch refuses it on this machine: {why}")
    args.run(args)


if __name__ == "__main__":
    main(sys.argv[1:])
