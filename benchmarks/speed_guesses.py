"""The cost of K guesses in one pass, as a multiple of the cost of one guess."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch

from benchmarks import internals
from benchmarks.measure import Step
from benchmarks.methods import METHODS
from benchmarks.problems import Problem
from benchmarks.report import print_table, write_json
from benchmarks.speed_steps import GUESS_PROBLEMS, warm

NAMES = ("w_perp", "w_transpose", "activation_perturbation", "directional_descent")


@dataclass(frozen=True)
class GuessCost:
    """Costs of K guesses. Times are medians of CPU seconds, measured in turns.

    All guesses of a step share its plain forward pass and its parameter gradients. The rest is the part of the guesses.

    Attributes:
        ratio: the part of K guesses over the part of one guess.
        tangents: that ratio without the base's update.
        over_in_turn: a step with K guesses in one pass, over a step with one pass for each.
    """

    ratio: float
    tangents: float
    over_in_turn: float
    seconds: dict[str, float]


def guess_cost(problem: Problem, method: str, guesses: int, rounds: int) -> GuessCost:
    """See ``GuessCost``. Each round makes a step of every kind, in CPU time, which other processes do not lengthen."""
    gradients: list[float] = []

    def stepper(**options: Any) -> tuple[Any, Step]:
        own = problem.copy()
        learner = METHODS[method].learner(own.model, **options)
        return learner.optimizer, warm(partial(learner.step, own.x, own.y))

    one, one_step = stepper()
    kinds: dict[str, Step] = {
        "forward": warm(torch.no_grad()(problem.loss)),
        "one": one_step,
        "shared": stepper(guesses=guesses, stack_guesses=True)[1],
        "in turn": stepper(guesses=guesses, stack_guesses=False)[1],
        "update": one.base.step,
    }
    times: dict[str, list[float]] = {name: [] for name in (*kinds, "gradients")}
    with internals.timed_gradients(gradients.append):
        for _ in range(rounds):
            for name, step in kinds.items():
                gradients.clear()
                start = process_time()
                step()
                times[name].append(process_time() - start)
                if name == "one":
                    times["gradients"].append(sum(gradients))
    t = {name: median(each) for name, each in times.items()}
    shared = t["forward"] + t["gradients"]
    return GuessCost(
        ratio=(t["shared"] - shared) / (t["one"] - shared),
        tangents=(t["shared"] - shared - t["update"]) / (t["one"] - shared - t["update"]),
        over_in_turn=t["shared"] / t["in turn"],
        seconds=t,
    )


def run_guesses(args: argparse.Namespace, out: Path) -> None:
    """Measures each problem and estimator; prints a table and writes ``guesses.json``."""
    found: dict[str, dict[str, GuessCost]] = {}
    for name, entry in GUESS_PROBLEMS.items():
        torch.manual_seed(0)
        problem = entry.make(entry.quick if args.quick else entry.batch)
        rounds = args.rounds or (3 if args.quick else 15)
        found[name] = {method: guess_cost(problem, method, args.guesses, rounds) for method in NAMES}
    figures = {name: {method: asdict(cost) for method, cost in costs.items()} for name, costs in found.items()}
    write_json(out / "guesses.json", args, seeds=[0], settings={"guesses": args.guesses}, figures=figures)
    print_table(
        f"What {args.guesses} guesses in one pass cost, in units of one guess",
        ["problem, method", "guess part", "without update", "step over in turn"],
        [
            [
                f"{GUESS_PROBLEMS[name].title}, {METHODS[method].label}",
                f"{cost.ratio:.2f}",
                f"{cost.tangents:.2f}",
                f"{cost.over_in_turn:.2f}",
            ]
            for name, costs in found.items()
            for method, cost in costs.items()
        ],
    )
