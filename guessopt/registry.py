"""Estimators by name: registration, construction from plain data, and the choice for each parameter."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from guessopt.estimator import Estimator

#: The registered classes, by name.
ESTIMATORS: dict[str, type[Estimator]] = {}

E = TypeVar("E", bound=type[Estimator])


def register_estimator(name: str) -> Callable[[E], E]:
    """Class decorator: make an estimator known by a name, for ``GuessGradOptimizer(..., estimator=name)``.

    >>> sorted(name for name in estimator_names() if name.startswith("w_t"))
    ['w_transpose']
    """

    def decorate(cls: E) -> E:
        cls.name = name
        ESTIMATORS[name] = cls
        return cls

    return decorate


def estimator_names() -> tuple[str, ...]:
    """Every registered name."""
    return tuple(ESTIMATORS)


def make_estimator(spec: Any) -> Estimator:
    """An estimator from an instance, a class, a registered name, or ``{"name": ..., **options}``.

    Raises:
        ValueError: no estimator has this name (the nearest name is suggested), or an option is bad.
        TypeError: ``spec`` is anything else.

    >>> make_estimator({"name": "w_perp", "k": 3}).k
    3
    """
    if isinstance(spec, Estimator):
        return spec
    if isinstance(spec, type) and issubclass(spec, Estimator):
        return spec()
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, dict) or "name" not in spec:
        raise TypeError(
            "estimator: expected an Estimator, a subclass, a registered name or {'name': ..., **options}, "
            f"got {type(spec).__name__}"
        )
    options = {key: value for key, value in spec.items() if key != "name"}
    return _named(spec["name"])(**options)


def _named(name: Any) -> type[Estimator]:
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    near = difflib.get_close_matches(str(name), ESTIMATORS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"estimator: no estimator is named {name!r}; {hint}Known: {', '.join(sorted(ESTIMATORS))}")


def describe(estimator: Estimator) -> dict[str, Any]:
    """Name and options, as plain data that ``make_estimator`` understands."""
    return {"name": estimator.name, **estimator.options()}


def plain(spec: Any) -> dict[str, Any]:
    """A choice of estimator as plain data: one estimator (``describe``), or several by patterns of parameter names.

    >>> plain({"head.*": "w_transpose", "*": "activation_perturbation"})["patterns"]["head.*"]["name"]
    'w_transpose'
    """
    if not isinstance(spec, dict) or "name" in spec:
        return describe(make_estimator(spec))
    patterns = spec["patterns"] if set(spec) == {"patterns"} else spec
    if not patterns:
        raise ValueError("estimator: the dict of name patterns is empty")
    return {"patterns": {str(pattern): plain(choice) for pattern, choice in patterns.items()}}


def estimators_for(choice: dict[str, Any], names: Sequence[str], named: bool) -> list[Estimator]:
    """One estimator for each parameter of a group. Of several patterns the first that matches decides.

    Args:
        choice: as ``plain`` gives it.
        names: of the parameters.
        named: whether the user has given these names.

    Raises:
        ValueError: patterns for parameters without names, or a parameter that no pattern matches.
    """
    if "patterns" not in choice:
        return [make_estimator(choice)] * len(names)
    if not named:
        raise ValueError(
            "estimator: name patterns need named parameters; pass model.named_parameters() in place of "
            "model.parameters()"
        )
    found = []
    for name in names:
        match = next((c for pattern, c in choice["patterns"].items() if fnmatchcase(name, pattern)), None)
        if match is None:
            raise ValueError(
                f"estimator: no pattern matches the parameter {name!r} (patterns: {', '.join(choice['patterns'])}); "
                "add '*' for the rest"
            )
        found += estimators_for(match, [name], named)
    return found
