"""The base optimizer's update: whole or not at all, and one parameter at a time where the base allows it."""

from guessopt.update.base import base_step
from guessopt.update.one_by_one import only, together
from guessopt.update.whole import Updates

__all__ = ["Updates", "base_step", "only", "together"]
