"""Run the closure in forward mode: tangents in, directional derivatives out; then parameter gradients."""

from guessopt.engine.forward import Departure, Pass
from guessopt.engine.gradients import estimated_cotangents, parameter_gradients
from guessopt.engine.levels import make_level
from guessopt.engine.planning import Plan, trace
from guessopt.engine.transaction import Transaction

__all__ = [
    "Departure",
    "Pass",
    "Plan",
    "Transaction",
    "estimated_cotangents",
    "make_level",
    "parameter_gradients",
    "trace",
]
