"""The estimator contract, and the registry of names."""

from __future__ import annotations

import dataclasses
import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from guessopt.graph import SiteGraph
from guessopt.layout import Shape
from guessopt.linalg import conjugate_gradients
from guessopt.record import ForwardRecord
from guessopt.sites import Matrix, Site
from guessopt.tracing.context import NOISES, SiteContext

_ESTIMATORS: dict[str, type[Estimator]] = {}


class Estimator(ABC):
    """How to guess a cotangent: reusable work in ``prepare``, the guess in ``sample``, its second moment declared.

    The engine injects the guess ``y`` at the site's output, obtains each example's directional derivative ``D_n``, and
    estimates the cotangent as ``g^[n] = D_n y[n]`` (Singhal eq. 13), so that ``E g^ = E[y y^T] g`` (eq. 14).

    A complete estimator, here activation perturbation at a tenth of the scale:

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
    #: "activations": a guess per site; "parameters": a guess per parameter.
    space: ClassVar[str] = "activations"
    #: Whether the last site takes its exact error where the optimizer's ``exact_last`` is None.
    exact_last: ClassVar[bool] = False
    #: Steps after which ``prepare`` runs again.
    refresh: int = 50
    #: Kind of noise; see ``SiteContext.noise``.
    noise: str = "normal"
    #: Undo the bias within the span of the guesses; see ``correct``.
    debias: bool = False
    #: Whether sites whose output far outnumbers their parameters (a norm's scale) have each example's parameters
    #: guessed in place of the output: unbiased (uniform noise is centred there), and in far fewer dimensions.
    per_example_parameters: ClassVar[bool] = True

    #: Whether the guess depends on the calls up to the next matrix site. If so, a site without one gets another guess.
    guided: ClassVar[bool] = True

    #: Whether ``joint`` may be true.
    joins: ClassVar[bool] = False

    #: Whether a ``LearningStep`` forms the cotangents, in place of ``g^ = D y``, from states that it learns.
    learns: ClassVar[bool] = False

    #: Whether it works along a residual stream where there is one (``SiteGraph.chain``).
    streams: bool = False

    @property
    def looks_ahead(self) -> bool:
        """Whether a guess depends on calls that the closure makes after the site."""
        return True

    @property
    def joint(self) -> bool:
        """Whether parallel sites (``SiteGraph.joints``) are guessed as the one layer that they might be: ``sample`` and
        ``second_moment`` then take a ``ParallelContext`` there, and tuples in place of a tensor of the site's shape."""
        return self.joins and not self.debias

    def for_site(self, site: Site) -> Estimator:
        """The estimator that serves a site: this one, unless it leaves the work to others."""
        return self

    @property
    def unbiased(self) -> bool:
        """Whether ``E g^ = g`` at every site."""
        return False

    def prepare(self, site: Site, weights: list[tuple[Matrix, Tensor]], previous: Any = None) -> Any:
        """Work worth keeping for ``refresh`` steps.

        Args:
            site: never a last site.
            weights: of the next matrix site(s), each as ``[b, o, i]``.
            previous: what the last call gave, for weights that have moved since; None on the first.
        """
        return None

    @property
    def prepares(self) -> bool:
        """Whether ``prepare`` does anything."""
        return False

    @abstractmethod
    def sample(self, state: Any, ctx: SiteContext) -> Tensor:
        """The guess ``y``: shape, dtype and device of ``ctx.s``. ``state`` is what ``prepare`` gave (else None)."""

    def second_moment(self, state: Any, ctx: SiteContext, g: Tensor) -> Tensor | None:
        """``E[y y^T] g``, shape of ``g`` (that of ``ctx.s``), for noise of mean zero and unit variance; None where
        there is no closed form. Give one only if the guess is linear in the noise: ``diagnostics.expected_gradient``
        then finds what the mean of ``noise="uniform"`` adds, by which sites act on each other."""
        return None

    def correct(self, state: Any, ctx: SiteContext, y: Tensor) -> Tensor:
        """What takes the guess's place in ``g^ = D y`` (not in the pass): with ``debias``, ``E[y y^T]^+ y``, so that
        ``E g^`` is the true cotangent projected on the span of the guesses ("undo the bias", which Singhal section 5
        leaves open). Conjugate gradients on ``second_moment``, all examples at once; variance grows with its condition
        number."""
        if not self.debias or y.is_complex():  # at complex sites the guess is isotropic
            return y

        def apply(v: Tensor) -> Tensor:
            moment = self.second_moment(state, ctx, v)
            if moment is None:
                raise ValueError(f"debias: {self.name} has no second moment in closed form with these options")
            return moment

        layout, n = ctx.site.layout, ctx.examples
        return conjugate_gradients(
            apply, y, lambda t: layout.spread(layout.sum_examples(t, n), tuple(t.shape)).to(t.dtype)
        )

    def amplitude(self, entries: int) -> float:
        """Factor on the noise, where parameters are guessed; ``entries``: how many these have in all."""
        return 1.0

    def period(self, graph: SiteGraph) -> int:
        """Steps from one that needs guesses to the next; those between run without tangents (others than 1 only where
        ``learns``)."""
        return 1

    def injects(self, step: int, graph: SiteGraph) -> bool:
        """Whether this step needs guesses."""
        return step % self.period(graph) == 0

    def begin(self, sites: tuple[Site, ...], graph: SiteGraph, states: dict[int, Any], noise: Noise) -> LearningStep:
        """A step; only where ``learns``.

        Args:
            sites: every site of this estimator.
            states: what the last step has learned, by site index; None on the first. Not to be changed in place: a step
                that fails goes back to them.
            noise: draws numbers.
        """
        raise NotImplementedError

    def refuses(self, memory: str, graph: SiteGraph | None) -> str | None:
        """Why this estimator cannot serve in a memory mode other than ``"store"``, and what to do; None if it can.
        ``graph`` None: as far as the options tell."""
        return None

    def forms(self, sites: tuple[Site, ...], graph: SiteGraph) -> dict[int, tuple[str, int]]:
        """By site index, in which form the estimate is made, in a few words, and the bytes learned for it; for
        ``preflight``."""
        return {}

    def reversed_matrices(self, graph: SiteGraph) -> int:
        """The most matrix sites that a graph differentiated in reverse holds on one path; 1 counts as none, since every
        site's own rule may be such a graph."""
        return 0

    def note(self, site: Site) -> str | None:
        """Why a site that is not last gets another guess than the one this estimator is named for;
        None if it gets it."""
        return None

    def check(self, sites: tuple[Site, ...]) -> None:  # noqa: B027 (optional)
        """Raise ``ValueError`` if the options make no sense for these sites."""

    def options(self) -> dict[str, Any]:
        """Plain data from which ``make_estimator`` builds an equal one."""
        return dataclasses.asdict(self) if dataclasses.is_dataclass(self) else {}


#: Draws normal numbers from the guesses' stream, of a site's dtype and on its device, in a given shape.
Noise = Callable[[Site, Shape], Tensor]


class LearningStep(ABC):
    """One step of an estimator that learns: the cotangents of its sites, and what their guesses teach.

    ``memory="store"`` asks for all at once (``estimate``), and keeps for it what ``keeps`` says. Where nothing is kept
    between passes, each site is shown as a pass reaches it: to ``begin`` as long as it ``needs_init``; to
    ``observe`` in
    the pass with guesses, which ``close`` ends; if it ``subtracts``, to ``subtract`` in one more; and to ``cotangents``
    in the last, which ``open`` begins (again, if it fails half-way). What was learned is then ``learned``.
    """

    #: Whether ``estimate`` needs the surroundings of every site, and the guesses.
    keeps: tuple[bool, bool] = True, True

    @abstractmethod
    def estimate(
        self, contexts: dict[int, SiteContext], record: ForwardRecord, consume: Callable[[dict[int, Tensor]], None]
    ) -> dict[int, Tensor]:
        """Cotangents by site index, where there are any, but for those handed to ``consume``.

        Args:
            locals: every site's; they may be taken out.
            spend: turns some cotangents into gradients there and then.
        """

    @abstractmethod
    def learned(self) -> dict[int, Any]:
        """The states that take the place of those given, by site index."""

    @property
    def needs_init(self) -> bool:
        """Whether a pass must be made before the first, for what has not been learned yet to begin at."""
        return False

    def begin(self, ctx: SiteContext, y: Tensor | None) -> None:
        """A site; the guess is not used."""
        raise NotImplementedError

    def observe(self, ctx: SiteContext, y: Tensor) -> None:
        """A site and its guess, under way to the output."""
        raise NotImplementedError

    def close(self, record: ForwardRecord) -> None:
        """The pass is over: errors, tangents and ``D_n`` are known."""
        raise NotImplementedError

    @property
    def subtracts(self) -> bool:
        """Whether a pass must look at every site before the first can be served."""
        return False

    def subtract(self, ctx: SiteContext, y: Tensor | None) -> None:
        """A site and its guess, once more."""
        raise NotImplementedError

    def open(self) -> None:
        """A pass begins that looks or serves."""
        raise NotImplementedError

    def cotangents(self, ctx: SiteContext, y: Tensor | None) -> dict[int, Tensor | None]:
        """A site and its guess, for the last time: the cotangents now known, of this site or of earlier ones (None:
        there is none)."""
        raise NotImplementedError


E = TypeVar("E", bound=type[Estimator])


def register_estimator(name: str) -> Any:
    """Class decorator: make an estimator known by a name, for ``GuessGradOptimizer(..., estimator=name)``.

    >>> sorted(name for name in estimator_names() if name.startswith("w_t"))
    ['w_transpose']
    """

    def decorate(cls: E) -> E:
        cls.name = name
        _ESTIMATORS[name] = cls
        return cls

    return decorate


def estimator_names() -> tuple[str, ...]:
    """Every registered name."""
    return tuple(_ESTIMATORS)


def make_estimator(spec: Any) -> Estimator:
    """An estimator from an instance, a class, a registered name, or ``{"name": ..., **options}``.

    Raises:
        ValueError: unknown name (the nearest is suggested) or bad options.
        TypeError: anything else.

    >>> make_estimator({"name": "w_perp", "k": 3}).k
    3
    """
    if isinstance(spec, Estimator):
        return spec
    if isinstance(spec, type) and issubclass(spec, Estimator):
        return spec()
    if isinstance(spec, str):
        spec = {"name": spec}
    if isinstance(spec, dict) and "name" in spec:
        options = {key: value for key, value in spec.items() if key != "name"}
        name = spec["name"]
        if name not in _ESTIMATORS:
            near = difflib.get_close_matches(str(name), _ESTIMATORS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"estimator: no estimator is named {name!r}; {hint}Known: {', '.join(sorted(_ESTIMATORS))}"
            )
        return _ESTIMATORS[name](**options)
    raise TypeError(
        "estimator: expected an Estimator, a subclass, a registered name or {'name': ..., **options}, "
        f"got {type(spec).__name__}"
    )


def describe(estimator: Estimator) -> dict[str, Any]:
    """Name and options, as plain data that ``make_estimator`` understands."""
    return {"name": estimator.name, **estimator.options()}


def plain(spec: Any) -> dict[str, Any]:
    """A choice of estimator as plain data: of one (``describe``), or of several by patterns of parameter names.

    >>> plain({"head.*": "w_transpose", "*": "activation_perturbation"})["patterns"]["head.*"]["name"]
    'w_transpose'
    """
    if isinstance(spec, dict) and "name" not in spec:
        patterns = spec["patterns"] if set(spec) == {"patterns"} else spec
        if not patterns:
            raise ValueError("estimator: the dict of name patterns is empty")
        return {"patterns": {str(pattern): plain(choice) for pattern, choice in patterns.items()}}
    return describe(make_estimator(spec))


def estimators_for(choice: dict[str, Any], names: Sequence[str], named: bool) -> list[Estimator]:
    """One for each parameter of a group; ``choice`` as ``plain`` gives it; the first pattern that matches decides.

    Raises:
        ValueError: patterns for parameters without names (``named=False``), or a parameter that none matches."""
    if "patterns" not in choice:
        return [make_estimator(choice)] * len(names)
    if not named:
        raise ValueError(
            "estimator: name patterns need named parameters; pass model.named_parameters() in place of "
            "model.parameters()"
        )
    found = []
    for name in names:
        match = next((c for pattern, c in choice["patterns"].items() if fnmatchcase(name, pattern)), None)
        if match is None:
            raise ValueError(
                f"estimator: no pattern matches the parameter {name!r} (patterns: "
                f"{', '.join(choice['patterns'])}); add '*' "
                "for the rest"
            )
        found += estimators_for(match, [name], named)
    return found


def check_noise(noise: str) -> None:
    if noise not in NOISES:
        raise ValueError(f"noise: {noise!r} is not one of {', '.join(NOISES)}")


def check_refresh(refresh: int) -> None:
    if refresh < 1:
        raise ValueError(f"refresh: steps between preparations must be at least 1, got {refresh}")


def check_debias(debias: bool, noise: str) -> None:
    if debias and noise == "uniform":
        raise ValueError("debias: the mean of uniform noise couples the sites; use noise='uniform_centred'")
