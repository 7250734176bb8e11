"""The estimators: one family a file, all on one contract (``guessopt.estimator``)."""

from guessopt.estimator import Estimator
from guessopt.estimators.activation import ActivationPerturbation
from guessopt.estimators.auto import Auto
from guessopt.estimators.directional import DirectionalDescent
from guessopt.estimators.downstream import Downstream, SelfSharpening
from guessopt.estimators.mixing import ActivationMixing
from guessopt.estimators.newton_schulz import WPerpNS
from guessopt.estimators.perp import WPerp
from guessopt.estimators.precondition import WPreconditioned
from guessopt.estimators.transpose import WTranspose
from guessopt.feedback.learned import LearnedFeedback
from guessopt.registry import describe, estimator_names, make_estimator, register_estimator

__all__ = [
    "ActivationMixing",
    "ActivationPerturbation",
    "Auto",
    "DirectionalDescent",
    "Downstream",
    "Estimator",
    "LearnedFeedback",
    "SelfSharpening",
    "WPerp",
    "WPerpNS",
    "WPreconditioned",
    "WTranspose",
    "describe",
    "estimator_names",
    "make_estimator",
    "register_estimator",
]
