"""The estimators: one family a file, all on one contract (``base.py``)."""

from guessopt.estimators.activation import ActivationPerturbation
from guessopt.estimators.base import Estimator, describe, estimator_names, make_estimator, register_estimator
from guessopt.estimators.directional import DirectionalDescent
from guessopt.estimators.perp import WPerp
from guessopt.estimators.transpose import WTranspose

__all__ = [
    "ActivationPerturbation",
    "DirectionalDescent",
    "Estimator",
    "WPerp",
    "WTranspose",
    "describe",
    "estimator_names",
    "make_estimator",
    "register_estimator",
]
