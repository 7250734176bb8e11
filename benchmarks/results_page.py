"""Writes docs/results.md: every committed result as a section of tables, ours beside the papers'."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.report import COMMITTED, Table

PAGE = Path("docs/results.md")


def run(args: argparse.Namespace) -> None:
    from benchmarks.__main__ import experiments  # which imports every module here

    path = (args.out or PAGE.parent) / PAGE.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(COMMITTED, experiments()))
    print(f"Written: {path}")


def page(results: Path, experiments: Mapping[str, ModuleType]) -> str:
    """The page for the JSON files of a folder; those of no experiment with tables are left out. An experiment
    of several files names each after itself and an underscore."""
    known = {path.stem: path for path in sorted(results.glob("*.json"))}
    of = {name: experiments.get(name, experiments.get(name.partition("_")[0])) for name in known}
    sections = [section(name, known[name], e) for name, e in of.items() if e is not None and hasattr(e, "tables_of")]
    top = f"# Results\n\nMade from the files in `{COMMITTED}` by `python -m benchmarks results_page`; do not edit.\n"
    return "\n".join([top, *sections])


def section(name: str, path: Path, experiment: ModuleType) -> str:
    content = json.loads(path.read_text())
    summary = " ".join((experiment.__doc__ or "").split("\n\n")[0].split())
    lines = [f"## {name}", "", summary, "", *circumstances(content)]
    for table in experiment.tables_of(content):
        lines += ["", *markdown(table)]
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
    lines += [f"- Settings: {said}"] if (said := scalars(settings)) else []
    for key, value in parts.items():
        lines.append(f"- {key}: " + (f"`{own[key]}`; " if key in own else "") + scalars(value))
    return [*lines, f"- Machine: {scalars(machine)}"]


def scalars(found: Mapping[str, Any]) -> str:
    """``key value`` of what is no collection; the tables show the rest."""
    plain = {key: value for key, value in found.items() if not isinstance(value, (dict, list))}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in plain.items())


def markdown(table: Table) -> list[str]:
    def row(cells: Any) -> str:
        return "| " + " | ".join(str(cell).replace("\n", " ").replace("|", "\\|") for cell in cells) + " |"

    rule = "| --- |" + " ---: |" * (len(table.columns) - 1)
    lines = [f"**{table.title}**", "", row(table.columns), rule, *map(row, table.rows)]
    return [*lines, "", *table.note.splitlines()] if table.note else lines
