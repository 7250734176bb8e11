"""The tables and the page of the experiment ``reliability``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from benchmarks.reliability_tasks import Figures
from benchmarks.report import print_table

NOT_RUN = "not run"


def snippet(kind: Figures) -> str:
    """Code that shows the finding. It runs from the project's root."""
    return (
        "from tests.fuzzing.networks import Network, Op\n"
        "from tests.fuzzing.oracles import check\n"
        f"print(check({kind['network']}, {kind['oracle']!r}))"
    )


def summary(figures: Figures) -> list[tuple[str, str]]:
    """Question and answer, one pair for each line of the table."""
    rows: list[tuple[str, str]] = []
    for part, label in (("networks", "random networks"), ("operations", "operations, each in a network of its own")):
        own = figures[part]
        if own == NOT_RUN:
            rows.append((label, NOT_RUN))
            continue
        counts = own["counts"]
        rows += [
            (label, f"{own['cases']:,}"),
            ("checks on them", f"{own['checks']:,}"),
            ("wrong answers", f"{counts.get('wrong', 0):,}"),
            ("errors without a remedy", f"{counts.get('obscure', 0):,}"),
            ("refusals that name a remedy", f"{counts.get('refused', 0):,}"),
        ]
    for part, label in (("faults", "errors put in"), ("interrupts", "interrupts at random times")):
        own = figures[part]
        rows.append((label, NOT_RUN if own == NOT_RUN else f"{own['tried']:,}"))
        rows.append(("... after which state was lost", NOT_RUN if own == NOT_RUN else f"{own['lost']:,}"))
    own = figures["resume"]
    rows.append(("mismatches after resuming", str(own if own == NOT_RUN else own["mismatches"])))
    own = figures["soak"]
    if own == NOT_RUN:
        rows.append(("growth over many steps", NOT_RUN))
    else:
        rows += [
            (f"resident memory over {own['steps']:,} steps", _bytes(own["resident_bytes"])),
            (f"Python objects over {own['python_steps']:,} steps", _bytes(own["python_bytes"])),
            ("tensors more", f"{own['tensors']:+,}"),
            ("step time, last over first", f"{own['last_seconds'] / own['first_seconds']:.2f}"),
        ]
    own = figures["shapes"]
    if own == NOT_RUN:
        rows.append(("many shapes", NOT_RUN))
    else:
        rows += [
            (f"resident memory over {own['shapes']:,} shapes", _bytes(own["resident_bytes"])),
            ("step time over shapes, last over first", f"{own['last_seconds'] / own['first_seconds']:.2f}"),
        ]
    own = figures["audit"]
    ratio = NOT_RUN if own == NOT_RUN else own["ratio"]
    rows.append(("step time with the audit over without", ratio if ratio == NOT_RUN else f"{ratio:.3f}"))
    return rows


def _bytes(count: int) -> str:
    return f"{count:+,} bytes"


def kinds_of(figures: Figures) -> list[Figures]:
    """The kinds of findings on networks."""
    return [kind for part in ("networks", "operations") if figures[part] != NOT_RUN for kind in figures[part]["kinds"]]


def show(figures: Figures) -> None:
    print_table("Reliability", ("", ""), summary(figures))
    for kind in kinds_of(figures):
        print(f"\n{kind['count']} x {kind['oracle']}: {kind['kind']}: {kind['message'][:300]}")
        if kind["where"]:
            print(f"  at {kind['where']}")
        if kind["kind"] != "refused":
            print(snippet(kind))
    for part in ("faults", "interrupts"):
        for place, own in figures[part]["places"].items() if figures[part] != NOT_RUN else ():
            print(f"\n{part}, {place}: state lost in {own['lost']} of {own['tried']}", *own["examples"], sep="\n  ")
    for name, error in figures["errors"].items():
        print(f"\n{name} failed: {error}")


INTRODUCTION = """\
# Reliability

Made by `python -m benchmarks reliability`; do not edit.

The package takes the place of `loss.backward()`. A wrong gradient often looks like a right one: training goes on, and
is worse. So each step must be right, or it must raise an error that says what is not supported and what to do. After
an error everything must be as it was before the step. This page says how that was tested and what was found.

## What was found
"""

METHODS = """\
## What was tried

**Random networks.** Each network has one to five operations of about 45 families, one or two losses, and a random
layout: examples in the first or the second dimension, examples and positions merged, one example, sizes that are equal
by chance. Each one is checked in eight ways:

| check | what must hold |
|---|---|
| exact | the sum of the estimates over all one-hot guesses is autograd's gradient (relative error below 1e-8) |
| engines | the engines `fast`, `dual` and `func` give the same estimate from the same seed |
| modes | two steps with `memory="store"`, `"replay"` and `"stream"` end in the same parameters and buffers |
| stacked | K guesses in one pass give what K guesses in turn give |
| scaling | the estimate of three times a loss is three times the estimate of the loss |
| plain | after a step, loss, buffers and random states are those of one plain forward pass |
| changes | after some steps, something changes (batch size, data, dtype, a flag, the layer in use, a frozen \
parameter, a mixing weight, `eval()`), and the same optimizer is exact from the next step on |
| past | after such a change, the optimizer gives the same estimate as a new one that has loaded its state |

Every variant of every operation also gets a network of its own, with a layer before and a layer after it.

An error counts as a refusal if the package raises it and its message names a remedy. Other errors count as errors
without a remedy.

**Errors put in.** A small network with batch norm, dropout, numpy's and Python's random numbers and a counter makes
six steps. An error is raised at every k-th torch call, in the closure, elsewhere in the step, and in the base
optimizer's update. Then parameters, buffers, `.grad`, random states, the optimizer's state and torch's modes are
compared with those before the step. The step is then made again, and must give bit for bit what it gives without the
error. Interrupts (Ctrl-C) come at random times.

**Resuming.** A run that is saved and loaded in a new process goes on bit for bit as the run that was not interrupted.

**Long runs.** A small network makes many steps; then every step has another number of examples. Memory and step time
must not grow.
"""


def page(content: Mapping[str, Any]) -> str:
    """The page for the content of the JSON."""
    figures, found = content["figures"], content["environment"]
    lines = [INTRODUCTION, "| | |", "|---|--:|"]
    lines += [f"| {label} | {value} |" for label, value in summary(figures)]
    kinds = kinds_of(figures)
    bad = [kind for kind in kinds if kind["kind"] in ("wrong", "obscure")]
    refused = [kind for kind in kinds if kind["kind"] == "refused"]
    if bad:
        lines += ["", "## Kinds of wrong answers and of errors without a remedy", ""]
        for kind in bad:
            message = " ".join(kind["message"].split())[:200]
            lines += [f"{kind['count']} of `{kind['oracle']}`: {message}", "", "```", snippet(kind), "```", ""]
    if refused:
        lines += ["", "## Refusals", "", "| times | message |", "|--:|---|"]
        messages: Counter[str] = Counter()
        for kind in refused:
            messages[" ".join(kind["message"].split())[:200].replace("|", "\\|")] += kind["count"]
        lines += [f"| {count} | {message} |" for message, count in messages.most_common()]
    lost = [
        f"- {part}, {place}: {own['lost']} of {own['tried']}, for example {own['examples'][0]}"
        for part in ("faults", "interrupts")
        if figures[part] != NOT_RUN
        for place, own in figures[part]["places"].items()
    ]
    if lost:
        lines += ["", "## State lost", "", *lost]
    circumstances = ", ".join(f"{name} {value}" for name, value in found.items())
    lines += ["", METHODS, "## How to repeat it", "", "```", content["command"], "```", "", f"With {circumstances}."]
    lines += ["`--networks N --first-seed S` picks other networks. A run that was stopped goes on where it stopped."]
    return "\n".join(lines) + "\n"
