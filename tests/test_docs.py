"""The Python blocks of README.md and docs/ run as they stand: all blocks of a page one after the other, in one module.

What a page takes for given (a model, an optimizer) is in a comment of the page that starts with ``<!-- python``, which
readers do not see. ``<!-- setup -->`` stands for ``SETUP``, which several pages share.
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from guessopt import GuessGradOptimizer, WPerp
from guessopt.estimator import _ESTIMATORS
from guessopt.ops.base import OPS

ROOT = Path(__file__).parents[1]
SETUP = """import torch
import torch.nn.functional as F
from torch.optim import AdamW

import guessopt
from guessopt import GuessGradOptimizer, LearnedFeedback

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
x, y = torch.randn(32, 8), torch.randint(2, (32,))
batches = [(x, y)]
opt = GuessGradOptimizer(model.parameters(), lr=1e-3)


def closure():
    return F.cross_entropy(model(x), y)
"""
BLOCK = re.compile(r"^(?:```python|<!-- python)\n(.*?)^(?:```|-->)$", re.DOTALL | re.MULTILINE)
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if BLOCK.search(page.read_text())]


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where pages save files
    module = ModuleType(f"blocks_of_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look there
    text = page.read_text()
    if "<!-- setup -->" in text:
        exec(compile(SETUP, "setup", "exec"), vars(module))
    before = [(registry, dict(registry)) for registry in (_ESTIMATORS, OPS)]
    try:
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start(1))
            exec(compile("\n" * line + block[1], str(page), "exec"), vars(module))
    finally:
        for registry, entries in before:  # pages register estimators and operations
            registry.clear()
            registry.update(entries)  # type: ignore[arg-type]


def test_all_python_blocks_are_found() -> None:
    text = "".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    assert text.count("```python") == len(re.findall(r"^```python\n.*?^```$", text, re.DOTALL | re.MULTILINE))
    assert ROOT / "docs" / "closures.md" in PAGES


def table_of_runs() -> dict[str, list[int]]:
    """How often the closure runs in steps 1 to 17, by the table's first column."""
    steps = (1, 2, 3, 4, 5, 6, 7, 8, 9, *range(10, 16), 16, 17)
    columns = [0, 1, 2, 3, 4, 5, 5, 6, 7, *[8] * 6, 9, 10]
    rows = re.findall(
        r"^\| `(\"\w+\".*?)` \|((?: \d+ \|)+)$", (ROOT / "docs" / "closures.md").read_text(), re.MULTILINE
    )
    found = {name: [int(cell) for cell in cells.split("|")[:-1]] for name, cells in rows}
    assert len(steps) == len(columns)
    return {name: [cells[k] for k in columns] for name, cells in found.items()}


@pytest.mark.parametrize("row", ["store", "replay", "stream"])
@pytest.mark.parametrize("audit", [True, False], ids=["audit", "no audit"])
def test_runs_of_the_closure_are_as_in_the_table(row: str, audit: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)
    ).double()  # where an audit is sure at once
    x, y = torch.randn(32, 8).double(), torch.randint(2, (32,))
    opt = GuessGradOptimizer(model.parameters(), torch.optim.AdamW, WPerp(k=2), lr=1e-3, memory=row, audit=audit)
    runs, counts = itertools.count(), []

    def closure() -> torch.Tensor:
        next(runs)
        return F.cross_entropy(model(x), y)

    for _ in range(17):
        before = next(runs)
        opt.step(closure)
        counts.append(next(runs) - before - 1)
    assert counts == table_of_runs()[f'"{row}"' + ("" if audit else "`, `audit=False")]


def test_the_table_of_layers_is_the_contract() -> None:
    contract = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert contract is not None
    layers = [set(re.findall(r"\w+", line)) for line in re.findall(r'"(.*)"', contract[1])]
    table = (ROOT / "docs" / "architecture.md").read_text().split("| layer | modules |")[1].split("\n\n")[0]
    rows = [line.split("|")[2] for line in table.splitlines()[2:]]
    assert [set(re.findall(r"`(\w+)`", row)) for row in rows] == layers


def links_of(page: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links_of(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link
