"""How an estimator learns: when it needs guesses, and the phases of one step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from guessopt.graph import SiteGraph
from guessopt.layout import Shape
from guessopt.record import ForwardRecord
from guessopt.sites import Site
from guessopt.tracing.context import SiteContext

#: Draws normal numbers from the optimizer's random stream: ``(site, shape)`` to a tensor of the site's dtype.
Noise = Callable[[Site, Shape], Tensor]


class LearningStep(ABC):
    """One step of an estimator that learns. It forms the cotangents of its sites, and learns from their guesses.

    With ``memory="store"`` one call does all the work: ``estimate``. With ``memory="replay"`` and ``"stream"`` nothing
    is kept between passes, so the step is told in phases. In every phase a pass calls the method once for each site, in
    the order of the closure:

    | phase | made if | before | for each site | after |
    |---|---|---|---|---|
    | initialise | ``needs_init``, as often as it is true | ``open`` | ``init`` | |
    | observe | always; without guesses no method is called for a site | ``open`` | ``observe`` | ``close`` |
    | subtract | ``subtracts`` | ``open`` | ``subtract`` | |
    | predict | always; again if the pass fails | ``open`` | ``cotangents`` | |

    At the end ``learned`` gives the new states. A step that fails leaves the old states as they were.
    """

    #: Whether ``estimate`` needs the ``SiteContext`` of every site.
    keeps_contexts: bool = True
    #: Whether ``estimate`` needs the guesses.
    keeps_guesses: bool = True

    @abstractmethod
    def estimate(
        self, contexts: dict[int, SiteContext], record: ForwardRecord, consume: Callable[[dict[int, Tensor]], None]
    ) -> dict[int, Tensor]:
        """The cotangents by site index. Cotangents that are given to ``consume`` are left out.

        Args:
            contexts: by site index; empty without ``keeps_contexts``. The method may remove entries.
            record: of the pass.
            consume: turns cotangents, by site index, into gradients of parameters at once.
        """

    @abstractmethod
    def learned(self) -> dict[int, Any]:
        """The states that replace the old ones, by site index."""

    @property
    def needs_init(self) -> bool:
        """Whether some state has yet to be initialised from the weights."""
        return False

    @property
    def subtracts(self) -> bool:
        """Whether ``cotangents`` needs to know first how much of ``D_n`` all predictions explain."""
        return False

    def open(self) -> None:
        """A pass begins in which sites are told to this step."""
        raise NotImplementedError

    def init(self, ctx: SiteContext, y: Tensor | None) -> None:
        """Initialise the site's state from the weights. ``y`` is not used."""
        raise NotImplementedError

    def observe(self, ctx: SiteContext, y: Tensor) -> None:
        """Measure the guess ``y`` of a site, before the pass has reached the output."""
        raise NotImplementedError

    def close(self, record: ForwardRecord) -> None:
        """The pass with the guesses has ended: the errors, the output's tangents and ``D_n`` are known."""
        raise NotImplementedError

    def subtract(self, ctx: SiteContext, y: Tensor | None) -> None:
        """Subtract ``<c, y>`` from ``D_n``, for the site's prediction ``c``."""
        raise NotImplementedError

    def cotangents(self, ctx: SiteContext, y: Tensor | None) -> dict[int, Tensor | None]:
        """Learn from the guess ``y``. Return the cotangents that are now known, by site index: of this site or of
        earlier ones. None: the site has no cotangent in this step."""
        raise NotImplementedError


class Learning:
    """The part of an estimator that learns. The defaults are for an estimator that does not."""

    #: Whether a ``LearningStep`` forms the cotangents, in place of ``g^ = D y``.
    learns: ClassVar[bool] = False

    #: Whether the estimator works along a residual stream where there is one (``SiteGraph.chain``).
    streams: bool = False

    def period(self, graph: SiteGraph) -> int:
        """Every so many steps one needs guesses. The steps between run without tangents."""
        return 1

    def injects(self, step: int, graph: SiteGraph) -> bool:
        """Whether this step needs guesses."""
        return step % self.period(graph) == 0

    def learning_step(
        self, sites: tuple[Site, ...], graph: SiteGraph, states: dict[int, Any], noise: Noise
    ) -> LearningStep:
        """A new step. Called only where ``learns``.

        Args:
            sites: every site of this estimator.
            states: what earlier steps have learned, by site index; None for a site without a state. The step must not
                change them in place: a step that fails goes back to them.
            noise: draws normal numbers.
        """
        raise NotImplementedError

    def refuses(self, memory: str, graph: SiteGraph | None) -> str | None:
        """Why this estimator cannot run in the memory mode, and the remedy; None if it can.

        Args:
            memory: ``"replay"`` or ``"stream"``.
            graph: None before the first trace: then the options alone decide.
        """
        return None
