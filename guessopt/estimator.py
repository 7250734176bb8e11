"""The contract of an estimator: ``prepare``, ``sample`` and ``second_moment``.

What an estimator tells users is in ``reporting``, how it learns in ``learning``, and its name in ``registry``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from guessopt.learning import Learning
from guessopt.linalg import conjugate_gradients
from guessopt.reporting import Reporting
from guessopt.sites import Matrix, Site
from guessopt.tracing.context import SiteContext


class Estimator(Reporting, Learning, ABC):
    """How to guess a cotangent: work worth keeping (``prepare``), the guess (``sample``) and its second moment.

    The engine injects the guess ``y`` at the site's output and measures each example's directional derivative ``D_n``.
    The estimate is ``g^[n] = D_n y[n]`` (Singhal eq. 13), so that ``E g^ = E[y y^T] g`` (eq. 14).

    A complete estimator, activation perturbation at a tenth of the scale:

    >>> from dataclasses import dataclass
    >>> import torch, guessopt
    >>> @guessopt.estimators.register_estimator("whisper")
    ... @dataclass(frozen=True)
    ... class Whisper(guessopt.estimators.Estimator):
    ...     scale: float = 0.1
    ...     def sample(self, state, ctx):
    ...         return self.scale * ctx.noise(ctx.s.shape)
    ...     def second_moment(self, state, ctx, g):
    ...         return self.scale**2 * g
    >>> net = torch.nn.Linear(3, 2)
    >>> opt = guessopt.GuessGradOptimizer(net.parameters(), torch.optim.SGD, "whisper", lr=0.1)
    >>> x = torch.ones(4, 3)
    >>> opt.step(lambda: net(x).square().mean()).shape
    torch.Size([])
    """

    name: ClassVar[str]
    #: "activations": one guess for each site. "parameters": one guess for each parameter.
    space: ClassVar[str] = "activations"
    #: Whether the last site takes its exact error where the optimizer's ``exact_last`` is None.
    exact_last: ClassVar[bool] = False
    #: ``prepare`` runs again after so many steps.
    refresh: int = 50
    #: Kind of noise; see ``SiteContext.noise``.
    noise: str = "normal"
    #: Whether to undo the bias within the span of the guesses; see ``correct``.
    debias: bool = False
    #: Whether a site with a large output and few parameters (a norm's scale) gets a guess for each example's parameters
    #: in place of its output. That guess is unbiased (uniform noise is centred there) and has far fewer dimensions.
    per_example_parameters: ClassVar[bool] = True
    #: Whether the guess depends on the calls up to the next matrix site. If so, a site without one gets another guess.
    guided: ClassVar[bool] = True
    #: Whether ``joint`` may be true.
    joins: ClassVar[bool] = False

    @property
    def looks_ahead(self) -> bool:
        """Whether a guess depends on calls that the closure makes after the site."""
        return True

    @property
    def joint(self) -> bool:
        """Whether parallel sites (``SiteGraph.joints``) are guessed as one layer. ``sample`` and ``second_moment`` then
        get a ``ParallelContext``, and give and take a tuple with one tensor for each site."""
        return self.joins and not self.debias

    @property
    def unbiased(self) -> bool:
        """Whether ``E g^ = g`` at every site."""
        return False

    @property
    def prepares(self) -> bool:
        """Whether ``prepare`` does anything."""
        return False

    def for_site(self, site: Site) -> Estimator:
        """The estimator that guesses at this site; another one if this one delegates."""
        return self

    def prepare(self, site: Site, weights: list[tuple[Matrix, Tensor]], previous: Any = None) -> Any:
        """Work worth keeping for ``refresh`` steps.

        Args:
            site: never a last site.
            weights: of the next matrix sites, each ``[b, o, i]``.
            previous: the result of the last call, for weights that have moved since; None on the first call.
        """
        return None

    @abstractmethod
    def sample(self, state: Any, ctx: SiteContext) -> Tensor:
        """The guess ``y``: shape, dtype and device of ``ctx.s``. ``state``: what ``prepare`` returned, else None."""

    def second_moment(self, state: Any, ctx: SiteContext, g: Tensor) -> Tensor | None:
        """``E[y y^T] g`` for noise of mean zero and unit variance; None if it has no closed form.

        Define it only for a guess that is linear in the noise. ``diagnostics.expected_gradient`` then adds the mean of
        ``noise="uniform"``, by which sites act on each other.

        Args:
            g: shape of ``ctx.s``; so is the result.
        """
        return None

    def correct(self, state: Any, ctx: SiteContext, y: Tensor) -> Tensor:
        """The factor in place of ``y`` in ``g^ = D y``; the pass itself still injects ``y``.

        With ``debias`` it is ``E[y y^T]^+ y``. Then ``E g^`` is the true cotangent, projected on the span of the
        guesses (the question "undo the bias" of Singhal section 5). Conjugate gradients on ``second_moment`` solve for
        all examples at once. The variance grows with the condition number of ``E[y y^T]``.

        Raises:
            ValueError: ``debias``, and ``second_moment`` has no closed form.
        """
        if not self.debias or y.is_complex():  # at complex sites the guess is isotropic
            return y

        def apply(v: Tensor) -> Tensor:
            moment = self.second_moment(state, ctx, v)
            if moment is None:
                raise ValueError(f"debias: {self.name} has no second moment in closed form with these options")
            return moment

        def total(t: Tensor) -> Tensor:
            return layout.spread(layout.sum_examples(t, ctx.examples), tuple(t.shape)).to(t.dtype)

        layout = ctx.site.layout
        return conjugate_gradients(apply, y, total)

    def amplitude(self, entries: int) -> float:
        """Factor on guesses for parameters; ``entries``: the number of entries of all these parameters."""
        return 1.0
