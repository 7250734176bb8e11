"""Train PyTorch networks without backpropagation: structured guesses, one forward-mode pass, any ``torch.optim``
base."""

from guessopt import estimators
from guessopt.errors import ClosureError, GuessWarning
from guessopt.estimators import (
    ActivationPerturbation,
    DirectionalDescent,
    Estimator,
    WPerp,
    WTranspose,
    register_estimator,
)
from guessopt.optimizer import GuessGradOptimizer
from guessopt.preflight import Preflight, preflight
from guessopt.rules import register_rule

__all__ = [
    "ActivationPerturbation",
    "ClosureError",
    "DirectionalDescent",
    "Estimator",
    "GuessGradOptimizer",
    "GuessWarning",
    "Preflight",
    "WPerp",
    "WTranspose",
    "estimators",
    "preflight",
    "register_estimator",
    "register_rule",
]
__version__ = "0.1.0"
