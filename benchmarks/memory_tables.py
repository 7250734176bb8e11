"""The tables and the picture of the memory experiment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import Ratio
from benchmarks.memory_cases import FULL, LIMITED, METHODS, QUICK, TIMED, WITH_JVP, Case, Settings
from benchmarks.report import Table


def mb(n: float) -> str:
    return f"{n / 1e6:.1f}"


def above(peaks: Mapping[str, int], *, gradients: bool = False) -> int:
    """The peak above parameters and optimizer state (and ``.grad``)."""
    return peaks["peak"] - peaks["state"] - (peaks["gradients"] if gradients else 0)


def prepared(peaks: Mapping[str, int]) -> int:
    """What a method keeps between steps beside the optimizer's state and ``.grad``: W-perp's bases."""
    return peaks["kept"] - peaks["state"] - peaks["gradients"]


def tables(figures: Any, cases: Mapping[str, Case], settings: Settings) -> list[Table]:
    found = [
        peaks_table(case, {m: figures[f"{name} {m}"] for m in METHODS if f"{name} {m}" in figures})
        for name, case in cases.items()
    ]
    notes = [flat(figures, [name for name in cases if name.startswith(family)], cases) for family in ("mlp", "vit")]
    long = figures["stream"]["peaks"]
    rivals = [m for m in ("backprop", "in_backward") if f"mlp24 {m}" in figures]
    notes.append(
        f"Stream, {(QUICK if settings.quick else FULL)['mlp24'].title}, steps 1 to {settings.long}: "
        f"{mb(above(long))} MB above parameters and state ({mb(prepared(long))} of them kept). "
        + "; ".join(f"{METHODS[m].label}: {mb(above(figures[f'mlp24 {m}']['peaks']))} MB" for m in rivals)
    )
    alive = figures["between"]
    rest = alive["live"] - alive["loss"] - alive["derivatives"] - alive["random"]
    notes.append(
        f"Alive between replay's passes: {alive['live']} bytes: the loss {alive['loss']}, D_n {alive['derivatives']}, "
        f"random states {alive['random']}, other {rest}."
    )
    races = {name: figures[f"race {name}"] for name in TIMED[settings.quick]}
    over = [each["over_checkpointed"] for each in races.values()]
    names = list(dict.fromkeys(m for each in over for m in each))
    found.append(
        Table(
            "Time over a checkpointed backprop step (quartiles), interleaved",
            ["", *(TIMED[settings.quick][name].title for name in races)],
            [[racer(m), *(str(Ratio(**own[m])) if m in own else "" for own in over)] for m in names],
            "\n".join(note for note in notes if note),
        )
    )
    ends = {m: figures[f"limit {m}"] for m in LIMITED if f"limit {m}" in figures}
    if ends:
        found.append(
            Table(
                f"MLP {settings.depth}x{settings.width}, batch {settings.batch}: {settings.budget / 2**20:.0f} MiB "
                "beyond parameters and state",
                ["", "steps", "losses", "ended by"],
                [
                    [
                        METHODS[m].label,
                        str(e["steps"]),
                        " ".join(f"{v:.4f}" for v in e["losses"]),
                        e["error"].partition("DefaultCPUAllocator: ")[2][:21] or e["error"] or "-",
                    ]
                    for m, e in ends.items()
                ],
            )
        )
    return found


def racer(name: str) -> str:
    method = name.removesuffix(WITH_JVP)
    return METHODS[method].label + name[len(method) :]


def peaks_table(case: Case, cells: Mapping[str, Any]) -> Table:
    return Table(
        f"{case.title}, {mb(cells['backprop']['parameters'])} MB of parameters: peak in MB above these",
        ["", "peak", "- state", "- .grad", "kept", "time"],
        [
            [
                METHODS[method].label,
                mb(each["peaks"]["peak"]),
                mb(above(each["peaks"])),
                mb(above(each["peaks"], gradients=True)),
                mb(prepared(each["peaks"])),
                f"{each['time']['ratio']:.2f}",
            ]
            for method, each in cells.items()
        ],
        "- state: less the optimizer's state (AdamW). - .grad: less the gradients as well. kept: from step to step,\n"
        "beside state and .grad (W-perp: its bases). time: a step over a backprop step.",
    )


def flat(figures: Any, names: list[str], cases: Mapping[str, Case]) -> str:
    """Replay's peak by depth."""
    found = [figures[f"{name} w_perp_replay"]["peaks"] for name in names]
    if len(found) < 2:
        return ""
    whole = [above(each, gradients=True) for each in found]
    passing = [above(each, gradients=True) - prepared(each) for each in found]
    said = ", ".join(f"{cases[n].title} {mb(v)} MB" for n, v in zip(names, whole, strict=True))
    return (
        f"Replay above parameters, .grad and state: {said} (largest / smallest {max(whole) / min(whole):.2f}; without "
        f"the bases kept {', '.join(map(mb, passing))}: {max(passing) / min(passing):.2f})."
    )


def plot(figures: Any, cases: Mapping[str, Case], path: Path) -> None:
    """A group of bars for each problem: the peak above parameters and optimizer state."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(1.9 * len(cases) + 3.5, 4), layout="constrained")
    width = 0.85 / len(METHODS)
    for number, (method, own) in enumerate(METHODS.items()):
        heights = [above(figures[f"{name} {method}"]["peaks"]) / 1e6 for name in cases]
        axis.bar([k + number * width for k in range(len(cases))], heights, width, label=own.label, color=f"C{number}")
    axis.set(yscale="log", ylabel="MB above parameters and optimizer state")
    axis.set_xticks([k + 0.4 for k in range(len(cases))], [case.title for case in cases.values()])
    figure.legend(loc="outside right center", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
