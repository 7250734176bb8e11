"""One file per operation family: gradients of its parameters, its tangent, and W~ where it is a matrix."""

from guessopt.ops import affine, attention, conv, elementwise, embedding, linear, norm
from guessopt.ops.base import MatrixRule, Rule, register_rule, register_tangent, rule_for, tangent_for

__all__ = [
    "MatrixRule",
    "Rule",
    "affine",
    "attention",
    "conv",
    "elementwise",
    "embedding",
    "linear",
    "norm",
    "register_rule",
    "register_tangent",
    "rule_for",
    "tangent_for",
]
