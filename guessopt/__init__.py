"""Train PyTorch networks without backpropagation: structured guesses, one forward-mode pass, any ``torch.optim``
base."""

from guessopt import estimators
from guessopt.audit import audit
from guessopt.engine.audit.report import AuditReport
from guessopt.errors import AuditError, ClosureError, GuessWarning, PartialUpdateError
from guessopt.estimators import (
    ActivationMixing,
    ActivationPerturbation,
    Auto,
    DirectionalDescent,
    Downstream,
    Estimator,
    LearnedFeedback,
    SelfSharpening,
    WPerp,
    WPerpNS,
    WPreconditioned,
    WTranspose,
    register_estimator,
)
from guessopt.memory_plan import MemoryPlan, ModeCost, plan
from guessopt.ops import register_rule
from guessopt.optimizer import GuessGradOptimizer
from guessopt.preflight import Preflight, preflight
from guessopt.saving import load, save

__all__ = [
    "ActivationMixing",
    "ActivationPerturbation",
    "AuditError",
    "AuditReport",
    "Auto",
    "ClosureError",
    "DirectionalDescent",
    "Downstream",
    "Estimator",
    "GuessGradOptimizer",
    "GuessWarning",
    "LearnedFeedback",
    "MemoryPlan",
    "ModeCost",
    "PartialUpdateError",
    "Preflight",
    "SelfSharpening",
    "WPerp",
    "WPerpNS",
    "WPreconditioned",
    "WTranspose",
    "audit",
    "estimators",
    "load",
    "plan",
    "preflight",
    "register_estimator",
    "register_rule",
    "save",
]
__version__ = "0.1.0.dev0"
