"""Operations that are linear in their input through a weight: linear layers and convolutions.

Letters: b block (convolution group), o output row, i input column, r rows of a matrix used in place of W.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from guessopt.layout import Shape
from guessopt.ops.base import NamedRule
from guessopt.sites import Matrix


class MatrixRule(NamedRule, ABC):
    """A rule for an operation that is linear in its input through a weight. All of its methods must be there."""

    @abstractmethod
    def weight(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The weight among the arguments: a tensor, or the ``Value`` of a recorded call. None if it is no matrix."""

    @abstractmethod
    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The activation among the arguments."""

    @abstractmethod
    def matrix(self, matrix: Matrix, weight: Tensor) -> Tensor:
        """The weight as ``[b, o, i]``."""

    @abstractmethod
    def cotangent_shape(self, matrix: Matrix, rows: Tensor, x_shape: Shape) -> Shape:
        """The shape of the output with ``rows`` ``[b, r, i]`` in place of W."""

    @abstractmethod
    def transpose(self, matrix: Matrix, rows: Tensor, e: Tensor, x_shape: Shape) -> Tensor:
        """``rows^T e``: a cotangent ``e`` of the output (shape: ``cotangent_shape``), pulled back to ``x_shape``."""

    @abstractmethod
    def apply(self, matrix: Matrix, rows: Tensor, x: Tensor) -> Tensor:
        """``rows x``: the operation with ``rows`` ``[b, r, i]`` in place of W, without bias."""

    @abstractmethod
    def rank(self, matrix: Matrix) -> int:
        """An upper bound of the weight's rank: the smaller side of the (stacked) weight."""

    @abstractmethod
    def geometry(self, call: Any) -> str:
        """Stride, padding and the like as a string. Weights of calls with equal strings may be stacked."""
