"""The Python blocks of README.md and docs/ run as they stand, one page after the other, by sybil.

All blocks of a page share one namespace. A comment that starts with ``<!-- python`` is a block that readers do not see.
``<!-- setup -->`` stands for ``SETUP``: a model, a batch and an optimizer, which several pages take for given.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.abstract.codeblock import AbstractCodeBlockParser
from sybil.parsers.abstract.lexers import BlockLexer
from sybil.parsers.markdown import PythonCodeBlockParser

from benchmarks import results_page
from benchmarks.__main__ import experiments
from guessopt import GuessGradOptimizer, WPerp

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
HIDDEN = BlockLexer(re.compile(r"^<!-- (?P<arguments>python)\n", re.MULTILINE), r"(?m)^-->$")
READER = Sybil([PythonCodeBlockParser(), AbstractCodeBlockParser([HIDDEN], "python", PythonEvaluator())])
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {page: READER.parse(page) for page in PAGES if "```python" in page.read_text()}


@pytest.fixture
def registries() -> Iterator[None]:
    """Forgets what a page registers: the containers of the package's modules are as before, afterwards."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "guessopt"]
    found = [v for module in modules for k, v in vars(module).items() if k[:2] != "__" and isinstance(v, (dict, set))]
    before = [container.copy() for container in found]
    yield
    for container, entries in zip(found, before, strict=True):
        container.clear()
        container.update(entries)


@pytest.mark.filterwarnings("ignore::guessopt.GuessWarning")
@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("page", BLOCKS, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where pages save files
    module = ModuleType(f"blocks_of_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look there
    document = BLOCKS[page]
    document.namespace.update(vars(module))
    if "<!-- setup -->" in document.text:
        exec(SETUP, document.namespace)
    for block in document.examples():
        block.evaluate()


def test_all_python_blocks_are_found() -> None:
    hidden = re.compile("^<!-- python$", re.MULTILINE)
    for page, document in BLOCKS.items():
        marked = page.read_text().count("```python") + len(hidden.findall(page.read_text()))
        assert len(list(document.examples())) == marked > 0, page.name
    assert {"README.md", "closures.md"} <= {page.name for page in BLOCKS}


@pytest.mark.parametrize("name", results_page.TABLES)
def test_figures_are_those_of_the_committed_results(name: str) -> None:
    text = (ROOT / name).read_text()
    tables = results_page.tables_in(ROOT / results_page.COMMITTED, experiments())
    assert text == results_page.with_figures(name, text, tables), "run: python -m benchmarks results_page"


@pytest.mark.parametrize(
    "name", ["README.md", "docs/memory.md", "docs/finetuning.md", "docs/learned_feedback.md", "docs/position_credit.md"]
)
def test_measured_figures_are_on_the_page_of_results(name: str) -> None:
    measured = r"\b\d{1,3}\.\d{3}\b|\b\d+\.\d+(?= MB|x\b)"
    known = set(re.findall(r"\d+\.\d+", (ROOT / "docs" / "results.md").read_text()))
    found = set(re.findall(measured, (ROOT / name).read_text()))
    assert len(found) > 5 and not found - known


def test_names_in_the_glossary_exist() -> None:
    glossary = (ROOT / "docs" / "architecture.md").read_text().split("## Glossary")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", glossary, re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    source = "\n".join(path.read_text() for path in (ROOT / "guessopt").rglob("*.py"))
    assert len(names) > 20
    assert not names - set(re.findall(r"^ *(?:class|def) (\w+)", source, re.MULTILINE))


def table_of_runs() -> dict[str, list[int]]:
    """By its first column (``"store"`` or ``"store"`, `audit=False``), how often the closure runs in steps 1 to 17."""
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links_of(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link
