"""Run the closure in forward mode: tangents in, directional derivatives out; then parameter gradients."""

from guessopt.engine.forward import ForwardRun, GraphMismatch
from guessopt.engine.gradients import estimated_cotangents, parameter_gradients
from guessopt.engine.levels import make_engine
from guessopt.engine.planning import Plan, trace
from guessopt.engine.transaction import Transaction

__all__ = [
    "ForwardRun",
    "GraphMismatch",
    "Plan",
    "Transaction",
    "estimated_cotangents",
    "make_engine",
    "parameter_gradients",
    "trace",
]
