"""Instruments that judge estimators. The only part of the package that may backpropagate through the network.

Each instrument is a function of ``(optimizer, closure, options)`` that returns plain data with a ``plot()``. It changes
nothing (parameters, buffers, ``.grad``, optimizer state, global random states), except that the stream of guesses moves
on.
"""

from guessopt.diagnostics.gradients import (
    Cosine,
    CosineByGuesses,
    cosine,
    cosine_by_guesses,
    estimated_gradient,
    expected_gradient,
    true_cotangents,
    true_gradient,
)
from guessopt.diagnostics.moments import Bias, CovarianceNorm, Variance, bias, covariance_norm, variance
from guessopt.diagnostics.monitor import METRICS, CSVWriter, Monitor, TensorBoardWriter
from guessopt.diagnostics.reverse import Closure
from guessopt.diagnostics.reverse import backpropagate as _backpropagate
from guessopt.diagnostics.spectra import (
    ActivationOverlap,
    EffectiveRank,
    JacobianSpectra,
    Overlap,
    activation_overlap,
    effective_rank,
    effective_rank_of,
    jacobian_spectra,
    overlap,
)
from guessopt.diagnostics.steps import CosineMatched, Effectiveness, effectiveness

__all__ = [
    "METRICS",
    "ActivationOverlap",
    "Bias",
    "CSVWriter",
    "Closure",
    "Cosine",
    "CosineByGuesses",
    "CosineMatched",
    "CovarianceNorm",
    "EffectiveRank",
    "Effectiveness",
    "JacobianSpectra",
    "Monitor",
    "Overlap",
    "TensorBoardWriter",
    "Variance",
    "_backpropagate",
    "activation_overlap",
    "bias",
    "cosine",
    "cosine_by_guesses",
    "covariance_norm",
    "effective_rank",
    "effective_rank_of",
    "effectiveness",
    "estimated_gradient",
    "expected_gradient",
    "jacobian_spectra",
    "overlap",
    "true_cotangents",
    "true_gradient",
    "variance",
]
