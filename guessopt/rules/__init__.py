"""One file per operation family: gradients of its parameters, and W~ where it is a matrix."""

from guessopt.rules import conv, elementwise, linear, norm
from guessopt.rules.base import MatrixRule, Rule, register_rule, rule_for

__all__ = ["MatrixRule", "Rule", "conv", "elementwise", "linear", "norm", "register_rule", "rule_for"]
