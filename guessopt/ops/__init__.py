"""One file per operation family; each declares its ``Op`` records, complete. ``ops.base`` lists a record's parts.

Importing this package imports all of its files, and so registers all records.
"""

from importlib import import_module
from pkgutil import iter_modules

from guessopt.ops.base import Entries, NamedRule, Op, Rule, op_of, register, register_rule
from guessopt.ops.cached import CachedCall, result_only
from guessopt.ops.matrix import MatrixRule

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

__all__ = [
    "CachedCall",
    "Entries",
    "MatrixRule",
    "NamedRule",
    "Op",
    "Rule",
    "op_of",
    "register",
    "register_rule",
    "result_only",
]
