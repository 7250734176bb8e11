"""Writes docs/results.md from the committed results, and the tables of figures in the README and docs/finetuning.md."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import summary
from benchmarks.report import COMMITTED, Table

PAGE = Path("docs/results.md")
COMMAND = "python -m benchmarks results_page"
TABLES: dict[str, Callable[[summary.Tables], list[str]]] = {
    "README.md": summary.for_readme,
    "docs/finetuning.md": summary.for_finetuning,
}
"""Pages written by hand, and the table of figures in each, between two comments."""
BETWEEN = re.compile(rf"(?<=<!-- figures: {COMMAND} -->\n).*?(?=<!-- end of figures -->)", re.DOTALL)


def run(args: argparse.Namespace) -> None:
    from benchmarks.__main__ import experiments  # which imports every module here

    path = (args.out or PAGE.parent) / PAGE.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(COMMITTED, experiments()))
    print(f"Written: {path}")
    tables = tables_in(COMMITTED, experiments())
    for name in () if args.out else TABLES:
        Path(name).write_text(with_figures(name, Path(name).read_text(), tables))
        print(f"Written: the figures in {name}")


def page(results: Path, experiments: Mapping[str, ModuleType]) -> str:
    """The page for the JSON files of a folder; those of no experiment with tables are left out. The summary needs all
    files that it quotes."""
    tables = tables_in(results, experiments)
    lines = ["# Results", "", f"Made from the files in `{COMMITTED}` by `{COMMAND}`; do not edit.", ""]
    if tables.keys() >= summary.NEEDED:
        lines += summary.overview(tables)
    sections = (section(results / f"{name}.json", experiment_of(name, experiments), tables[name]) for name in tables)
    return "\n".join(["\n".join(lines), *sections])


def tables_in(results: Path, experiments: Mapping[str, ModuleType]) -> dict[str, list[Table]]:
    """By the name of a JSON file, its tables, for each file of an experiment with tables."""
    found = {}
    for path in sorted(results.glob("*.json")):
        if hasattr(experiment := experiment_of(path.stem, experiments), "tables_of"):
            found[path.stem] = list(experiment.tables_of(json.loads(path.read_text())))
    return found


def experiment_of(name: str, experiments: Mapping[str, ModuleType]) -> Any:
    """The module that wrote a file. A module of several files names each after itself and an underscore."""
    return experiments.get(name, experiments.get(name.partition("_")[0]))


def with_figures(name: str, text: str, tables: summary.Tables) -> str:
    """The text of a page with its table of figures made anew.

    Raises:
        ValueError: the page has no place for them.
    """
    lines = "\n".join(TABLES[name](tables))
    text, count = BETWEEN.subn(lambda _: f"\n{lines}\n\n", text)
    if count != 1:
        raise ValueError(f"{name}: expected the comments '<!-- figures: {COMMAND} -->' and '<!-- end of figures -->'")
    return text


def section(path: Path, experiment: ModuleType, tables: list[Table]) -> str:
    name, doc = path.stem, (experiment.__doc__ or "").split("\n\n")[0]
    lines = [f"## {name}", "", " ".join(doc.split()), "", *circumstances(json.loads(path.read_text()))]
    for table in tables:
        lines += ["", *table.markdown()]
    pictures = sorted(path.parent.glob(f"{name}*.png"))
    lines += [f"\n![{picture.stem}](../{COMMITTED}/{picture.name})" for picture in pictures]
    return "\n".join(lines) + "\n"


def circumstances(content: dict[str, Any]) -> list[str]:
    """Commands, seeds, settings and machine, as a list. Parts of an experiment with settings of their own have a line
    each."""
    figures, settings, machine = content["figures"], content["settings"], content["environment"]
    parts = {key: value for key, value in settings.items() if isinstance(value, dict) and key in figures}
    own = {key: figures[key]["command"] for key in parts if "command" in figures[key]}
    lines = [] if own else [f"- Command: `{content['command']}`"]
    lines.append(f"- Seeds: {', '.join(map(str, content['seeds']))}")
    lines += [f"- Settings: {plain}"] if (plain := scalars(settings)) else []
    for key, value in parts.items():
        lines.append(f"- {key}: " + (f"`{own[key]}`; " if key in own else "") + scalars(value))
    return [*lines, f"- Machine: {scalars(machine)}"]


def scalars(found: Mapping[str, Any]) -> str:
    """``key value`` of each entry that is no collection; the tables show the others."""
    plain = {key: value for key, value in found.items() if not isinstance(value, (dict, list))}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in plain.items())
