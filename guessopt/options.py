"""The options of ``GuessGradOptimizer``: their types, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar, overload

from torch import Tensor
from torch.optim import Optimizer

from guessopt.estimator import Estimator
from guessopt.step.estimation import Estimation
from guessopt.step.mode import MODES

Memory: TypeAlias = Literal["store", "replay", "stream", "auto"]
Engine: TypeAlias = Literal["fast", "dual", "func"]
BatchNorm: TypeAlias = Literal["exact", "frozen_statistics"]
Discount: TypeAlias = "float | Literal['auto'] | None"
ForeignGradients: TypeAlias = Literal["refuse", "allow"]

#: Parameters, named parameters, or groups.
Params: TypeAlias = "Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]"
#: An optimizer class, a callable from groups to an optimizer, or an optimizer.
Base: TypeAlias = "type[Optimizer] | Callable[..., Optimizer] | Optimizer"
#: An estimator, its class, its name or ``{"name": ..., **options}``; or a dict from patterns to any of these.
EstimatorChoice: TypeAlias = "Estimator | type[Estimator] | str | Mapping[str, Any]"

T = TypeVar("T")


class HasEstimation(Protocol):
    """A ``GuessGradOptimizer``."""

    estimation: Estimation


class Option(Generic[T]):
    """An option that users read and set on the optimizer, and that its ``Estimation`` holds."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, opt: None, owner: type) -> Option[T]: ...
    @overload
    def __get__(self, opt: HasEstimation, owner: type) -> T: ...
    def __get__(self, opt: HasEstimation | None, owner: type) -> Any:
        return self if opt is None else getattr(opt.estimation, self.name)

    def __set__(self, opt: HasEstimation, value: T) -> None:
        setattr(opt.estimation, self.name, value)


def check_options(
    *,
    guesses: Any,
    stack_guesses: Any,
    orthogonal: Any,
    discount: Any,
    memory: Any,
    budget: Any,
    batch_norm: Any,
    foreign_gradients: Any,
) -> None:
    """Raise ``ValueError`` for an option that makes no sense, by name. ``Estimation`` refuses an unknown engine."""
    if not isinstance(guesses, int) or guesses < 1:
        raise ValueError(f"guesses: the number of guesses per step must be an integer of at least 1, got {guesses!r}")
    if memory not in (*MODES, "auto"):
        raise ValueError(f"memory: {memory!r} is not one of {', '.join(MODES)}, auto")
    if budget is not None and memory != "auto":
        raise ValueError(f"budget: memory={memory!r} takes none; use memory='auto'")
    if stack_guesses not in (None, True, False):
        raise ValueError(f"stack_guesses: {stack_guesses!r} is not one of None, True, False")
    if orthogonal and guesses < 2:
        raise ValueError(f"orthogonal: takes at least 2 guesses to project on, got guesses={guesses}")
    if orthogonal and memory != "auto" and not MODES[memory].keeps:
        raise ValueError(f"orthogonal: takes all guesses at once, which memory={memory!r} does not keep; use 'store'")
    if discount not in (None, "auto") and not (isinstance(discount, (int, float)) and 0 <= discount <= 1):
        raise ValueError(f"discount: {discount!r} is not None, 'auto' or a number from 0 to 1")
    if discount is not None and orthogonal:
        raise ValueError("discount: orthogonal guesses have one derivative for each example; set orthogonal=False")
    if batch_norm not in ("exact", "frozen_statistics"):
        raise ValueError(f"batch_norm: {batch_norm!r} is not one of exact, frozen_statistics")
    if foreign_gradients not in ("refuse", "allow"):
        raise ValueError(f"foreign_gradients: {foreign_gradients!r} is not one of refuse, allow")
