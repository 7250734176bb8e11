"""The package stays readable: short files, no import circles, no module that reads another module's underscore names.

Each test prints its measurement (``pytest -s``) and repeats it in the error message.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import grimp  # comes with import-linter
import pytest

PACKAGE = Path(__file__).parents[1] / "guessopt"
FILES = {path.relative_to(PACKAGE.parent).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
MAX_LINES = 400

#: Underscore names of objects that torch and Python make -> why the package reads them. Names that are reached by a
#: path from ``import torch`` or ``from torch import ...`` need no entry.
FOREIGN = {
    "_version": "torch.Tensor: how often a tensor was written; torch has no public counter",
    "_cdata": "torch.UntypedStorage: the address of the storage object; tells whether two tensors share memory",
    "_backward_hooks": "torch.Tensor: the hooks of a parameter; torch has no public list",
    "_post_accumulate_grad_hooks": "torch.Tensor: the hooks of a gradient; torch has no public list",
    "_schema": "torch.ops: which arguments an operation writes",
    "_mode_key": "torch dispatch modes: whether a mode is one of torch's own",
    "_optimizer_step_pre_hooks": "torch.optim.Optimizer: the base's hooks are called with the wrapper's step",
    "_optimizer_step_post_hooks": "torch.optim.Optimizer: the base's hooks are called with the wrapper's step",
    "_optimizer_state_dict_pre_hooks": "torch.optim.Optimizer: the wrapper's own hooks around state_dict",
    "_optimizer_state_dict_post_hooks": "torch.optim.Optimizer: the wrapper's own hooks around state_dict",
    "_optimizer_load_state_dict_pre_hooks": "torch.optim.Optimizer: the wrapper's own hooks around load_state_dict",
    "_optimizer_load_state_dict_post_hooks": "torch.optim.Optimizer: the wrapper's own hooks around load_state_dict",
    "_fields": "collections.namedtuple: documented, and tells a named tuple from a plain one",
    "_getframe": "sys: documented, and the only fast way to the caller's frame",
}


def lines_by_file() -> dict[str, int]:
    return {name: len(text.splitlines()) for name, text in FILES.items()}


def test_no_file_is_too_long() -> None:
    lines = lines_by_file()
    longest = max(lines, key=lines.__getitem__)
    print(f"\nlongest file: {longest}, {lines[longest]} lines")
    too_long = sorted((f"{count:5} {name}" for name, count in lines.items() if count > MAX_LINES), reverse=True)
    assert not too_long, f"{len(too_long)} files have more than {MAX_LINES} lines:\n" + "\n".join(too_long)


def import_circles() -> list[str]:
    """One shortest circle for each set of modules; imports under ``TYPE_CHECKING`` and inside functions count."""
    graph = grimp.build_graph("guessopt", exclude_type_checking_imports=False, cache_dir=None)
    circles = {}
    for module in sorted(graph.modules):
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            if back := graph.find_shortest_chain(imported, module):
                circles.setdefault(frozenset(back), " -> ".join((module, *back)))
    return sorted(circles.values(), key=len)


def test_no_import_circles() -> None:
    circles = import_circles()
    print(f"\nimport circles: {len(circles)}")
    assert not circles, f"{len(circles)} import circles:\n" + "\n".join(circles)


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name != "_"


def defined_names(tree: ast.Module) -> set[str]:
    """Functions, classes, variables, and attributes assigned to ``self`` or ``cls``."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                names.add(name)
    return names


def torch_names(tree: ast.Module) -> set[str]:
    """The names that the module's imports from torch bind."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(a.asname or a.name).split(".")[0] for a in node.names if a.name.split(".")[0] == "torch"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names |= {a.asname or a.name for a in node.names}
    return names


def root_of(node: ast.expr) -> str | None:
    """``"torch"`` for ``torch._C._functorch``; None where the path does not begin with a name."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def private_reads(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Line, name and source of each read of an underscore name that neither the module nor torch defines."""
    own, from_torch = defined_names(tree), torch_names(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if is_private(name) and name not in own and root_of(node) not in from_torch:
                yield node.lineno, name, ast.unparse(node)
            case ast.ImportFrom(names=imported) if (node.module or "").split(".")[0] != "torch":
                yield from ((node.lineno, a.name, ast.unparse(node)) for a in imported if is_private(a.name))
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr" | "delattr"), args=[_, ast.Constant(value=name), *_]
            ) if is_private(name) and name not in own:
                yield node.lineno, str(name), ast.unparse(node)


def test_no_module_reads_private_names_of_another() -> None:
    reads = [(path, *read) for path, text in FILES.items() for read in private_reads(ast.parse(text))]
    across = [f"{path}:{line}: {source}" for path, line, name, source in reads if name not in FOREIGN]
    print(f"\nunderscore reads across modules: {len(across)}")
    assert not across, f"{len(across)} underscore reads across modules:\n" + "\n".join(across)
    unused = FOREIGN.keys() - {name for _, _, name, _ in reads}
    assert not unused, f"the package no longer reads {sorted(unused)}: remove the entries from FOREIGN"


READS = {
    "other._hidden": 1,
    "from guessopt.rng import _hidden": 1,
    "from torch.overrides import _pop_mode": 0,
    "import torch\ntorch._C._functorch": 0,
    "from torch._C import _functorch as functorch\nfunctorch._add_batch_dim": 0,
    "getattr(other, '_hidden')": 1,
    "other.__dict__": 0,
    "class A:\n    def _hidden(self): ...\na._hidden": 0,
    "class A:\n    def f(self): self._hidden = 1\na._hidden": 0,
    "class A(Base):\n    def f(self): return self._hidden": 1,
    "other._hidden = 1": 1,
    "call()._hidden": 1,
}


@pytest.mark.parametrize(("source", "count"), READS.items(), ids=READS)
def test_the_search_for_private_reads_finds_them(source: str, count: int) -> None:
    assert len(list(private_reads(ast.parse(source)))) == count
