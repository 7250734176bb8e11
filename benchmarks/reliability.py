"""Random networks, injected errors, resuming, long runs: wrong answers, lost state, growth of memory and time."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.reliability_page import NOT_RUN, page, show
from benchmarks.reliability_tasks import (
    WORLDS,
    Figures,
    audit,
    faults,
    in_time,
    interrupts,
    networks,
    operations,
    quiet,
    resume,
    shapes,
    soak,
)
from benchmarks.report import COMMITTED, SCRATCH, write_json

PAGE = Path("docs/reliability.md")
CHUNK = 20
"""Networks of one task."""
PARTS = ("networks", "operations", "faults", "interrupts", "soak", "shapes", "audit", "resume")

Task = Callable[[], Figures]


@dataclass(frozen=True)
class Settings:
    """Size of each part.

    Attributes:
        calls: of each step, how many calls are tried with an error.
        interrupts: of each step.
        steps: of the long run.
        shapes: numbers of examples that are tried.
        audited: steps over which the audit's cost is measured.
    """

    networks: int
    calls: int
    interrupts: int
    steps: int
    shapes: int
    audited: int


FULL = Settings(networks=5000, calls=60, interrupts=40, steps=100_000, shapes=1000, audited=1000)
QUICK = Settings(networks=40, calls=3, interrupts=3, steps=2000, shapes=60, audited=100)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", type=int, metavar="N", help=f"random networks (default: {FULL.networks})")
    parser.add_argument("--first-seed", type=int, default=0, metavar="S", help="seed of the first network (default: 0)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--workers", type=int, default=2, metavar="K", help="processes (default: 2)")
    parser.add_argument("--fresh", action="store_true", help="repeat the tasks that an earlier call has finished")


STARTS_PROCESSES = ("resume",)
"""Tasks that start a process of their own."""


def tasks_of(args: argparse.Namespace, settings: Settings, parts: Iterable[str]) -> dict[str, Task]:
    """Tasks by name. The name says all that the result depends on."""
    found: dict[str, Task] = {}
    if "networks" in parts:
        wanted = args.networks if args.networks is not None else settings.networks
        for first in range(args.first_seed, args.first_seed + wanted, CHUNK):
            count = min(CHUNK, args.first_seed + wanted - first)
            found[f"networks {first} {count}"] = partial(networks, first, count)
    if "operations" in parts and not args.quick:
        families = importlib.import_module("tests.fuzzing.networks").OPERATIONS
        found |= {f"operations {family}": partial(operations, family) for family in families}
    if "faults" in parts:
        for world in WORLDS:
            for kind in ("function", "operation"):
                for where in ("closure", "engine", "update"):
                    name = f"faults {world}, {kind}, {where}, {settings.calls}"
                    found[name] = partial(faults, world, kind, where, settings.calls)
    if "interrupts" in parts:
        for world in WORLDS:
            found[f"interrupts {world} {settings.interrupts}"] = partial(interrupts, world, settings.interrupts)
    alone: dict[str, tuple[Callable[..., Figures], tuple[Any, ...]]] = {
        "soak": (soak, (settings.steps,)),
        "shapes": (shapes, (settings.shapes,)),
        "audit": (audit, (settings.audited,)),
        "resume": (resume, ()),
    }
    for name, (function, arguments) in alone.items():
        if name in parts:
            found[" ".join([name, *map(str, arguments)])] = partial(function, *arguments)
    return found


def _work(job: tuple[str, Task]) -> tuple[str, Figures]:
    quiet()
    name, task = job
    try:
        return name, task()
    except Exception as error:
        return name, {"error": f"{type(error).__name__}: {error}"}


def results_of(tasks: Mapping[str, Task], path: Path, workers: int, fresh: bool) -> dict[str, Figures]:
    """Result by task. Workers make them, each replaced after 20 tasks; ``path`` is written after every result. A task
    that starts a process itself cannot run in a worker, and runs here."""
    done: dict[str, Figures] = json.loads(path.read_text()) if path.is_file() and not fresh else {}
    missing = [(name, task) for name, task in tasks.items() if name not in done]
    if len(missing) < len(tasks):
        print(f"{len(tasks) - len(missing)} finished tasks taken from {path} (--fresh tries them again)")
    path.parent.mkdir(parents=True, exist_ok=True)
    if missing:
        here = [job for job in missing if job[0] in STARTS_PROCESSES]
        there = [job for job in missing if job[0] not in STARTS_PROCESSES]
        with get_context("spawn").Pool(min(workers, len(missing)), maxtasksperchild=20) as pool:
            results = itertools.chain(pool.imap_unordered(_work, there), map(_work, here))
            for name, result in tqdm(results, total=len(missing), unit="task", disable=None):
                done[name] = result
                if "error" not in result:
                    kept = {name: result for name, result in done.items() if "error" not in result}
                    path.with_suffix(".part").write_text(json.dumps(kept))
                    path.with_suffix(".part").replace(path)
    return {name: done[name] for name in tasks}


def figures_of(results: Mapping[str, Figures]) -> Figures:
    """The results of all tasks, added up by part."""
    found: Figures = {part: NOT_RUN for part in PARTS}
    by_part: dict[str, dict[str, Figures]] = {}
    errors = {name: result["error"] for name, result in results.items() if "error" in result}
    for name, result in results.items():
        part, _, rest = name.partition(" ")
        if "error" not in result:
            by_part.setdefault(part, {})[rest] = result
    for part, own in by_part.items():
        if part in ("networks", "operations"):
            found[part] = _networks(own.values())
        elif part in ("faults", "interrupts"):
            found[part] = {
                "tried": sum(result["tried"] for result in own.values()),
                "lost": sum(result["lost"] for result in own.values()),
                "places": {place: result for place, result in own.items() if result["lost"]},
            }
        else:
            (found[part],) = own.values()
    return {**found, "errors": errors}


def _networks(results: Iterable[Figures]) -> Figures:
    counts: Counter[str] = Counter()
    kinds: dict[str, Figures] = {}
    cases = 0
    for result in results:
        cases += result["cases"]
        counts.update(result["counts"])
        for key, own in result["kinds"].items():
            if own["kind"] == "skipped":
                continue
            known = kinds.get(key)
            if known is None or len(own["network"]) < len(known["network"]):
                kinds[key] = {**own, "count": own["count"] + (known["count"] if known else 0)}
            else:
                known["count"] += own["count"]
    listed = sorted(kinds.values(), key=lambda own: (own["kind"], -own["count"]))
    return {"cases": cases, "checks": sum(counts.values()), "counts": dict(counts), "kinds": listed}


def shorten(kind: Figures, seconds: float = 20.0) -> Figures:
    """The finding on the simplest network that still shows it."""
    oracles = importlib.import_module("tests.fuzzing.oracles")
    made = importlib.import_module("tests.fuzzing.networks")
    names = {name: getattr(made, name) for name in ("Network", "Op")}
    network, until = eval(kind["network"], names), time.monotonic() + seconds
    sought = oracles.Finding(kind["oracle"], kind["kind"], kind["message"], kind["where"]).key

    def fails(other: Any) -> bool:
        if time.monotonic() > until:
            return False
        return any(found.key == sought for found in in_time(oracles, kind["oracle"], other))

    return {**kind, "network": repr(made.minimise(network, fails))}


def run(args: argparse.Namespace) -> None:
    settings, parts = QUICK if args.quick else FULL, args.parts or PARTS
    out = args.out or (SCRATCH if args.quick else COMMITTED)
    if importlib.util.find_spec("hypothesis") is None or importlib.util.find_spec("tests") is None:
        raise SystemExit("reliability: needs hypothesis and the folder tests; run it from the project's root")
    quiet()
    tasks = tasks_of(args, settings, parts)
    results = results_of(tasks, (args.out or SCRATCH) / "reliability_progress.json", args.workers, args.fresh)
    figures = figures_of(results)
    for part in ("networks", "operations"):
        kinds = figures[part]["kinds"] if figures[part] != NOT_RUN else []
        bad = [kind for kind in kinds if kind["kind"] in ("wrong", "obscure")]
        for kind in tqdm(bad, desc="making shorter", leave=False, disable=None):
            kind |= shorten(kind)
    show(figures)
    wanted = args.networks if args.networks is not None else settings.networks
    described = {"quick": args.quick, "parts": list(parts), "networks": wanted, "first_seed": args.first_seed}
    write_json(out / "reliability.json", args, seeds=[args.first_seed], settings=described, figures=figures)
    whole = not args.quick and not args.out and set(parts) == set(PARTS)
    target = PAGE if whole else out / PAGE.name
    target.write_text(page(json.loads((out / "reliability.json").read_text())))
    print(f"Written: {out / 'reliability.json'} and {target}")
