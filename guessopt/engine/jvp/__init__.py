"""The engines by name: different ways to compute Jacobian-vector products, with equal numbers."""

from guessopt.engine.jvp.base import JvpEngine
from guessopt.engine.jvp.dual import DualEngine
from guessopt.engine.jvp.fast import FastEngine
from guessopt.engine.jvp.func import FuncEngine

#: The values of ``GuessGradOptimizer(engine=...)``.
ENGINES: dict[str, type[JvpEngine]] = {engine.name: engine for engine in (FastEngine, DualEngine, FuncEngine)}


def make_engine(name: str, *, frozen_statistics: bool = False) -> JvpEngine:
    """A fresh engine by name.

    Raises:
        ValueError: unknown name.
    """
    if name not in ENGINES:
        raise ValueError(f"engine: {name!r} is not one of {', '.join(ENGINES)}")
    return ENGINES[name](frozen_statistics=frozen_statistics)
