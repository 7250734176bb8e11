"""The tasks of the experiment ``reliability``; each runs in a worker process."""

from __future__ import annotations

import gc
import importlib
import os
import random
import resource
import signal
import time
import tracemalloc
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import reliability_resume
from guessopt import GuessGradOptimizer

SECONDS = 120
"""A check that takes longer is given up. It counts as an error without a remedy."""
EXAMPLES = 3
"""How many examples of each kind of finding a task keeps."""

Figures = dict[str, Any]


def quiet() -> None:
    """One thread, and no warnings."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def networks(first: int, count: int) -> Figures:
    """Every oracle on each network of a range of seeds."""
    made = importlib.import_module("tests.fuzzing.networks")
    return _checked({seed: made.from_seed(seed) for seed in range(first, first + count)})


def operations(family: str) -> Figures:
    """Every oracle on a network for each variant of one operation."""
    made = importlib.import_module("tests.fuzzing.networks")
    variants = made.OPERATIONS[family].variants
    return _checked({place: made.alone(family, variant) for place, variant in enumerate(variants)})


def _checked(chosen: Mapping[int, Any]) -> Figures:
    oracles = importlib.import_module("tests.fuzzing.oracles")
    counts: Counter[str] = Counter()
    kinds: dict[str, Figures] = {}
    for seed, network in chosen.items():
        for name in oracles.ORACLES:
            for found in in_time(oracles, name, network) or [oracles.Finding(name, "right", "")]:
                counts[found.kind] += 1
                if found.kind != "right":
                    _keep(kinds, found, seed, network)
    return {"cases": len(chosen), "counts": dict(counts), "kinds": kinds}


def _keep(kinds: dict[str, Figures], found: Any, seed: int, network: Any) -> None:
    own = kinds.setdefault(found.key, {**found._asdict(), "count": 0, "seed": seed, "network": repr(network)})
    own["count"] += 1
    if len(repr(network)) < len(own["network"]):
        own |= {**found._asdict(), "seed": seed, "network": repr(network)}


def in_time(oracles: Any, name: str, network: Any) -> list[Any]:
    """What an oracle finds on a network; ``TimeoutError`` after ``SECONDS``."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        found: list[Any] = oracles.ORACLES[name](network)
        return found
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


WORLDS: dict[str, Figures] = {
    "store": {"memory": "store"},
    "replay": {"memory": "replay"},
    "stream": {"memory": "stream"},
    "directional descent": {"estimator": "directional_descent"},
    "learned feedback": {"estimator": "learned_feedback"},
    "two guesses": {"guesses": 2},
}
STEPS = 6


def faults(world: str, kind: str, where: str, calls: int) -> Figures:
    """An error at every k-th call of the first steps, in one place."""
    module = importlib.import_module("tests.fuzzing.faults")
    make = partial(module.World, **WORLDS[world])
    calm = module.reference(make, STEPS, kind, where)
    found = module.walk(make, calm, module.every(kind, where, calm.calls, calls))
    return _lost(found)


def interrupts(world: str, count: int) -> Figures:
    """KeyboardInterrupt at random times of the first steps."""
    module = importlib.import_module("tests.fuzzing.faults")
    make = partial(module.World, **WORLDS[world])
    calm, pick = module.reference(make, 3), random.Random(0)
    lasts = []
    for step in range(3):
        ready = module.ready(make, step)
        start = time.perf_counter()
        ready.step(step)
        lasts.append(time.perf_counter() - start)

    def at_random(step: int) -> Iterable[tuple[str, Any]]:
        for _ in range(count):
            delay = pick.random() * lasts[step]
            yield f"an interrupt after {1e3 * delay:.2f} ms", module.interrupt_after(delay)

    return _lost(module.walk(make, calm, at_random, KeyboardInterrupt))


def _lost(found: Any) -> Figures:
    examples = [f"{place}: {', '.join(lost[:3])}" for place, lost in list(found.lost.items())[:EXAMPLES]]
    return {"tried": found.tried, "lost": len(found.lost), "examples": examples}


def tiny() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(16, 4), torch.arange(16) % 3


def resident() -> int:
    """Bytes of memory that this process holds; on systems that do not tell, the most that it has held so far."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def tensors_alive() -> int:
    gc.collect()
    return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


def soak(steps: int) -> Figures:
    """Growth of memory and step time over many steps of a small network. The first tenth of them does not count."""
    model, x, y = tiny()
    opt = GuessGradOptimizer(model.parameters(), torch.optim.SGD, "w_perp", lr=1e-3, seed=0)
    times = array("d", bytes(8 * steps))  # allocated at once, so that it does not grow
    warm = steps // 10

    def train(first: int, last: int) -> None:
        for place in range(first, last):
            start = time.perf_counter()
            opt.step(partial(_loss, model, x, y))
            times[place] = time.perf_counter() - start

    train(0, warm)
    alive, held = tensors_alive(), resident()
    train(warm, steps - warm)
    grown, more = resident() - held, tensors_alive() - alive
    traced = _traced_growth(lambda: train(steps - warm, steps - warm // 2), lambda: train(steps - warm // 2, steps))
    return {
        "steps": steps, "resident_bytes": grown, "python_bytes": traced, "python_steps": warm // 2, "tensors": more,
        "first_seconds": median(times[warm // 2 : warm]),
        "last_seconds": median(times[steps - 2 * warm : steps - warm]),
    }  # fmt: skip


def _traced_growth(warm: Callable[[], None], work: Callable[[], None]) -> int:
    """Bytes of Python objects that ``work`` leaves behind."""
    tracemalloc.start()
    try:
        warm()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        work()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def shapes(count: int) -> Figures:
    """Step time and memory while each step has another number of examples."""
    model, *_ = tiny()
    x, y = torch.randn(count + 4, 4), torch.arange(count + 4) % 3
    opt = GuessGradOptimizer(model.parameters(), torch.optim.SGD, "w_perp", lr=1e-3, seed=0)
    times, held = [], []
    order = random.Random(0).sample(range(4, count + 4), count)
    for n in order:
        start = time.perf_counter()
        opt.step(partial(_loss, model, x[:n], y[:n]))
        times.append(time.perf_counter() - start)
        held.append(resident())
    tenth = max(count // 10, 1)
    return {
        "shapes": count,
        "first_seconds": median(times[tenth : 2 * tenth]),
        "last_seconds": median(times[-tenth:]),
        "resident_bytes": held[-1] - held[2 * tenth],
    }


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def audit(steps: int) -> Figures:
    """Time of the same steps with the audit over without it, measured in turns."""
    spent: dict[bool, float] = {}
    for on in (False, True, False, True):
        model, x, y = tiny()
        opt = GuessGradOptimizer(model.parameters(), torch.optim.SGD, "w_perp", lr=1e-3, seed=0, audit=on)
        start = time.process_time()
        for _ in range(steps):
            opt.step(partial(_loss, model, x, y))
        spent[on] = min(time.process_time() - start, spent.get(on, float("inf")))
    return {"steps": steps, "ratio": spent[True] / spent[False]}


def resume() -> Figures:
    """Runs that do not resume bit for bit (``reliability_resume``)."""
    found = reliability_resume.resume_mismatches()
    return {"mismatches": len(found), "examples": found[:EXAMPLES]}
