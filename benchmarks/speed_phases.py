"""Where the time of a W-perp step goes: its phases, over many consecutive steps."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, median

from tqdm import tqdm

from benchmarks import internals
from benchmarks.internals import PROBE, REFRESH
from benchmarks.measure import Stopwatch
from benchmarks.speed_steps import Bench
from guessopt import WPerp

REST = "bookkeeping"
PHASES = ("forward", "interception", "tangents", *internals.PHASES, REST)


@dataclass(frozen=True)
class LongRun:
    """Consecutive steps of several methods, in turns. Every basis of W-perp is made twice.

    Attributes:
        breakdown: shares of a W-perp step by phase.
        slowest: time of the slowest step over that of the median step, by method.
        because: the phase in which the slowest W-perp step exceeds the median one most.
        seconds: of the median step, by method.
    """

    perp_over_transpose: float
    perp_over_backprop: float
    slowest: dict[str, float]
    because: str
    breakdown: dict[str, float]
    seconds: dict[str, float]


def long_run(bench: Bench, *, engine: str, steps: int, device: str, label: str) -> LongRun:
    watch = Stopwatch(device, whole=(PROBE,))
    kinds = {
        "backprop": bench.step("backprop"),
        "forward": bench.forward(),
        "empty pass": bench.empty_pass(engine),
        "w_transpose": bench.step("w_transpose", engine=engine),
        "w_perp": bench.step("w_perp", engine=engine, estimator=WPerp(k=10, refresh=max(steps // 2, 1))),
    }
    laps: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    with internals.observed(watch.phase):
        for _ in tqdm(range(steps), desc=f"{label:>12}, consecutive", unit="step", leave=False, disable=None):
            for name, step in kinds.items():
                with watch.phase(REST):
                    step()
                laps[name].append(watch.lap())
    totals = {name: [sum(lap.values()) for lap in each] for name, each in laps.items()}
    mine, slowest = totals["w_perp"], totals["w_perp"].index(max(totals["w_perp"]))
    excess = {phase: laps["w_perp"][slowest].get(phase, 0) - typical(laps["w_perp"], phase) for phase in PHASES}
    spent = {phase: typical(laps["w_perp"], phase) for phase in PHASES}
    spent["forward"] = median(totals["forward"])
    spent["interception"] = typical(laps["empty pass"], internals.PASS) - spent["forward"]
    spent["tangents"] = typical(laps["w_perp"], internals.PASS) - typical(laps["empty pass"], internals.PASS)
    whole = sum(spent.values())
    return LongRun(
        perp_over_transpose=mean(mine) / mean(totals["w_transpose"]),
        perp_over_backprop=mean(mine) / mean(totals["backprop"]),
        slowest={name: max(totals[name]) / median(totals[name]) for name in ("w_perp", "w_transpose", "backprop")},
        because=max(excess, key=lambda phase: excess[phase]),
        breakdown={phase: spent[phase] / whole for phase in PHASES},
        seconds={name: median(each) for name, each in totals.items()},
    )


def typical(laps: list[dict[str, float]], phase: str) -> float:
    """A step's time in a phase: the median; for a phase that few steps have, the mean."""
    average = mean if phase in (REFRESH, PROBE) else median
    return average([lap.get(phase, 0.0) for lap in laps])
