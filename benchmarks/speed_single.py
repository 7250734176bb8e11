"""Times of single steps of small networks beside those of another version of the package, and the cost of audits."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from benchmarks import step_times
from benchmarks.report import print_table, write_json

ROOT = Path(__file__).parents[1]


def run_single(args: argparse.Namespace, out: Path) -> None:
    """Measures each small network with each of ``step_times.OPTIONS``; prints a table and writes ``steps.json``."""
    networks = list(step_times.NETWORKS)[:1] if args.quick else list(step_times.NETWORKS)
    blocks, count = (2, 2) if args.quick else (args.rounds or 12, 5)
    now, before = step_times.Side(ROOT), step_times.Side(args.against) if args.against else None
    found: dict[str, dict[str, step_times.Times]] = {}
    try:
        for network in networks:
            found[network] = {
                options: step_times.measured(network, options, now, before, blocks, count)
                for options in tqdm(step_times.OPTIONS, desc=f"{network:>14}", leave=False, disable=None)
            }
    finally:
        now.close()
        if before is not None:
            before.close()
    figures = {network: {options: asdict(t) for options, t in each.items()} for network, each in found.items()}
    write_json(out / "steps.json", args, seeds=[0], settings={"blocks": blocks, "steps": count}, figures=figures)
    print_table(
        "Milliseconds of a step (the least), and audits' share of 1,000 steps",
        ["network, method", "before", "now", "now / before", "audits"],
        [
            [f"{network}, {options}", *(shown(x) for x in (t.before, t.now)), shown(t.over), shown(t.audits, "%")]
            for network, each in found.items()
            for options, t in each.items()
        ],
    )


def shown(x: float | None, unit: str = "") -> str:
    return "-" if x is None else f"{100 * x:.1f}%" if unit else f"{x:.3f}"
