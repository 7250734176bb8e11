"""The short tables: how close to backprop, at what memory, at what time. Each cell comes from an experiment's table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.methods import METHODS
from benchmarks.report import Table

Tables = Mapping[str, Sequence[Table]]
"""The tables of each committed result, by the name of its file."""

PERTURBATION, IN_BACKWARD = (METHODS[name].label for name in ("activation_perturbation", "in_backward"))
"""Labels of methods in the experiments' tables."""
CLOSENESS = ("backprop", "learned feedback", "W-perp", PERTURBATION)
NETWORKS = ("MLP 24x1024", "ViT depth 12")
MODES = (
    "backprop", "checkpointed backprop", IN_BACKWARD, "MeZO",
    *(f"{method}, {mode}" for method in ("W-perp", "learned feedback") for mode in ("store", "replay", "stream")),
)  # fmt: skip
TASKS = {
    "finetune_prompts": "prompts on a small ViT",
    "finetune_lora": "LoRA, Llama to Shakespeare",
    "finetune_corrupted": "ResNet-20, corrupted images",
    "finetune_sentences": "sentences, Llama with LoRA",
}
TIMED = {
    "W-perp, store": {"W-perp, store", "W-perp", "w_perp", "W-perp (k=10), fast", "W-perp, fast"},
    "W-perp, stream": {"W-perp, stream"},
    "learned feedback, store": {"learned feedback, store", "learned feedback", "learned_feedback"},
    "learned feedback, stream": {"learned feedback, stream"},
    "checkpointed backprop": {"checkpointed backprop"},
}
"""Methods whose step times are summed up, with the names that the experiments' tables have for each."""
NEEDED = {"coverage", "estimators", "feedback", "memory", "scaling", "speed", *TASKS}
"""The results that the summary quotes."""
PASSES, PEAK, STEP = "equal\npasses", "peak\nMB", "step\ntime"
"""Columns of the experiments' tables."""


def overview(tables: Tables) -> list[str]:
    """The first screen of the page of results, as Markdown."""
    lines = ["## In one screen", ""]
    for table in (accuracy(tables), memory(tables), times(tables)):
        lines += [*table.markdown(), ""]
    return [*lines, "**Where backprop still wins**", "", *backprop_wins(tables), ""]


def accuracy(tables: Tables) -> Table:
    def both(table: Table, method: str) -> str:
        train = table.number(method, "train") if "train" in table.columns else "-"
        return f"{train} / {table.number(method, 'test')}"

    rows = [[table.title, *(both(table, method) for method in CLOSENESS)] for table in tables["feedback"]]
    note = (
        "Train / test accuracy after the last step. Each method has its best learning rate of a grid: of four on\n"
        "MNIST-1D, of three elsewhere. The rate was chosen on seed 0, which is among the seeds shown: by train\n"
        "accuracy on MNIST-1D, by test accuracy on CIFAR-10, by test loss on the language model. Learned feedback:\n"
        '`LearnedFeedback(gamma=0, every="auto")`. From `python -m benchmarks feedback`; seeds and spreads are below.'
    )
    return Table("How close to backprop", ["network", *CLOSENESS], rows, note)


def memory(tables: Tables) -> Table:
    found = [table_of(tables["memory"], network) for network in NETWORKS]
    rows = [[mode, *(t.number(mode, column) for t in found for column in ("- state", "time"))] for mode in MODES]
    columns = ["", *(f"{network}, {unit}" for network in NETWORKS for unit in ("MB", "time"))]
    note = (
        "MB: the peak of a step, above parameters and AdamW's state. time: over a backprop step. Learned feedback is\n"
        "`LearnedFeedback(gamma=0, every=4, ahead=0)`. From `python -m benchmarks memory`."
    )
    return Table("At what memory", columns, rows, note)


def times(tables: Tables) -> Table:
    rows = []
    for method, names in TIMED.items():
        found = sorted((float(ratio), place) for name, ratio, place in ratios(tables) if name in names)
        rows.append([method, *(f"{ratio:.2f} ({place})" for ratio, place in (found[0], found[-1]))])
    note = (
        "A step over a backprop step: the smallest and the largest ratio of all tables below. The networks of\n"
        "`coverage` and the smallest ones of `scaling` are so small that Python takes most of the time."
    )
    return Table("At what time", ["", "least", "most"], rows, note)


def ratios(tables: Tables) -> Iterator[tuple[str, str, str]]:
    """Every measured method, time of a step over a backprop step, and place."""
    for row in tables["coverage"][0].rows:
        yield "W-perp, store", row[-1], f"coverage, {row[0]}"
    for row in tables["speed"][0].rows:
        network, _, method = row[0].partition(", ")
        yield method, row[1].split()[0], f"speed, {network}"
    for experiment, column in (("feedback", STEP), ("estimators", "time"), ("memory", "time")):
        for table in (table for table in tables[experiment] if column in table.columns):
            network = ", ".join(table.title.split(", ")[: 1 if experiment == "memory" else -1])
            yield from ((row[0], table.number(row[0], column), f"{experiment}, {network}") for row in table.rows)
    for table in tables["scaling"]:
        axis, _, figure = table.title.partition(",")
        for row in table.rows if figure.endswith("time over backprop") else ():
            yield from ((row[0], row[k], f"scaling, {axis} {table.columns[k]}") for k in range(1, len(row)))


def backprop_wins(tables: Tables) -> list[str]:
    """Where backprop still wins, as a list in Markdown."""
    slower = {row[0]: "{} to {}".format(*(cell.split()[0] for cell in row[1:])) for row in times(tables).rows}
    cifar = [table for table in tables["feedback"] if table.title.startswith("CIFAR-10")]
    test = {m: [table.number(m, "test") for table in cifar] for m in ("backprop", "learned feedback", "W-perp")}
    mlp = {method: cifar[0].number(method, "train") for method in test}
    vit = {row[0]: "{} MB at {} times".format(*row[3:]) for row in memory(tables).rows}
    tuned = [tables[task][0] for task in TASKS]
    exact = [table.number("checkpointed backprop", PASSES) for table in tuned]
    ours = [max(table.number(m, PASSES) for m in ("learned feedback", "W-perp")) for table in tuned]
    return [
        f"- **Time.** A W-perp step takes {slower['W-perp, store']} times as long as a backprop step, and a step of",
        f"  learned feedback {slower['learned feedback, store']} times. Their `stream` steps take longer still.",
        f"- **Accuracy.** Test accuracy on CIFAR-10 (MLP, CNN, ResNet, ViT): backprop {', '.join(test['backprop'])};",
        f"  learned feedback {', '.join(test['learned feedback'])}; W-perp {', '.join(test['W-perp'])}.",
        f"  The MLP's train accuracy: backprop {mlp['backprop']}, learned feedback {mlp['learned feedback']}.",
        f"- **Residual networks.** On the ViT, checkpointed backprop takes {vit['checkpointed backprop']} backprop's",
        f"  time; W-perp with `replay` {vit['W-perp, replay']}; learned feedback {vit['learned feedback, replay']}.",
        f"- **Fine-tuning.** Test accuracy on the four tasks: checkpointed backprop {', '.join(exact)};",
        f"  the better one of W-perp and learned feedback {', '.join(ours)}.",
    ]


def for_readme(tables: Tables) -> list[str]:
    """The README's table: which estimator to take for what."""
    rows = {
        "to come close to backprop": ('`LearnedFeedback(gamma=0, every="auto")`', "learned feedback"),
        "the papers' method; the default": ("`WPerp(k=10)`", "W-perp"),
        "estimates without bias": ("`ActivationPerturbation()`", PERTURBATION),
        "exact gradients": ("backprop, for comparison", "backprop"),
    }
    networks = {
        "MNIST-1D, MLP 3x512": "MLP, MNIST-1D",
        "CIFAR-10 (10,000), CNN": "CNN, CIFAR-10",
        "CIFAR-10 (10,000), ViT": "ViT, CIFAR-10",
    }
    found = [table_of(tables["feedback"], title) for title in networks]

    def cell(table: Table, method: str) -> str:
        train, test, slower = (table.number(method, column) for column in ("train", "test", STEP))
        return f"{train} / {test}, {slower}x"

    cells = [[want, name, *(cell(t, method) for t in found)] for want, (name, method) in rows.items()]
    seeds = {method: ", ".join(t.number(method, "seeds") for t in found) for method in ("backprop", "W-perp")}
    peak = {row[0]: f"{row[1]} MB" for row in memory(tables).rows}
    note = (
        "Each cell: train / test accuracy after training, and the time of a step over a backprop step. The learning\n"
        "rate was chosen on seed 0: by train accuracy on MNIST-1D, by test accuracy on CIFAR-10. Seeds of the\n"
        f"three networks: {seeds['backprop']} for backprop and learned feedback; {seeds['W-perp']} for the others.\n"
        'From `python -m benchmarks feedback`. For the least memory, add `memory="stream"`: on an MLP of 24 layers of\n'
        f"width 1024, a W-perp step then takes {peak['W-perp, stream']} above parameters and AdamW's state, and\n"
        f"{peak['W-perp, store']} without. Backprop takes {peak['backprop']}; checkpointed, and with updates within\n"
        f"its backward pass, {peak[IN_BACKWARD]}. From `python -m benchmarks memory`."
    )
    return Table("", ["you want", "take", *networks.values()], cells, note).markdown()


def for_finetuning(tables: Tables) -> list[str]:
    """The table of docs/finetuning.md: test accuracy after equal passes, and peak memory."""
    found = [tables[task][0] for task in TASKS]
    methods = list(dict.fromkeys(row[0] for table in found for row in table.rows))

    def cell(table: Table, method: str) -> str:
        if method not in {row[0] for row in table.rows}:
            return "-"
        return f"{table.number(method, PASSES)}, {table.number(method, PEAK)} MB"

    rows = [[method, *(cell(table, method) for table in found)] for method in methods]
    return Table("", ["", *TASKS.values()], rows).markdown()


def table_of(tables: Sequence[Table], title: str) -> Table:
    """The first table whose title begins so."""
    return next(table for table in tables if table.title.startswith(title))
