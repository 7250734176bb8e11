"""Learned feedback: predict each site's cotangent from the exact error at the output, guess only what is left.

Not in the papers; see docs/learned_feedback.md.

Letters: n example, g group (1, or the output's positions), p position, f feature of a site, c feature of the output.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from guessopt.estimators.base import Estimator, describe, make_estimator, register_estimator
from guessopt.sites import Cut, ForwardRecord, Layout, Matrix, Shape, Site, SiteGraph, numel
from guessopt.tracing.local import Local

STRUCTURES = ("auto", "position", "shared")

#: Entries of ``B`` up to which ``structure="auto"`` gives each position of a feature map its own.
LARGEST = 2**20

#: Largest amplitude of a guess, in units of the smallest.
LOUDEST = 1e4

#: Weight of the newest step in the running moments, once there are so many.
RECENT = 0.02


@register_estimator("learned_feedback")
@dataclass(frozen=True)
class LearnedFeedback(Estimator):
    """``g^_i = c_i + gamma (e . d) y_i``: a predicted cotangent ``c_i = M_i B_i e``, and what the guess adds to it.

    ``e`` is the exact error at the network's output and ``d = v' - sum_i B_i^T M_i y_i`` the part of the output's
    tangent that the feedback matrices ``B_i`` did not foresee. After use each ``B_i`` takes a least-mean-squares step
    on ``d``, which needs neither loss nor label. Where the way to the next matrix site is not elementwise, its
    pull-back takes the place of ``M_i``. Sites that the loss reads take their exact error.

    Args:
        guess: any estimator of activation guesses: instance, name or ``{"name": ..., **options}``.
        gamma: 1: a control variate, unbiased where the guess is; 0: the guesses serve to learn ``B`` alone; ``"auto"``:
            per site, by the share of noise in the correction (James-Stein).
        every: a forward-mode pass on one step in so many; the others cost a plain forward pass and use ``c_i``.
        beta: gain of the least-mean-squares steps, as a fraction of a stable one; the first steps take more.
        structure: ``"position"``: a ``B`` that tells the positions of a feature map apart; ``"shared"``: one for all
            positions; ``"auto"``: positions apart for convolutions of up to a million entries of ``B``. Where the
            output has as many positions as a site (a language model), each position's error serves that position.
        leak: fraction of ``B`` forgotten in every update.
        clip: largest update, in units of the usual one.

    >>> LearnedFeedback(gamma=1).unbiased, LearnedFeedback(gamma=0).unbiased, LearnedFeedback("w_perp", 1).unbiased
    (True, False, False)
    """

    guess: Any = "activation_perturbation"
    gamma: float | str = "auto"
    every: int = 1
    beta: float = 0.1
    structure: str = "auto"
    leak: float = 1e-3
    clip: float = 5.0

    exact_last: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    per_example_parameters: ClassVar[bool] = False

    def __post_init__(self) -> None:
        guess = make_estimator(self.guess)
        if guess.space != "activations" or guess.learns or guess.debias:
            raise ValueError(
                f"guess: {guess.name} cannot serve here; choose an estimator that guesses activations, without debias"
            )
        object.__setattr__(self, "guess", guess)
        if self.gamma != "auto" and not (isinstance(self.gamma, (int, float)) and 0 <= self.gamma <= 1):
            raise ValueError(f"gamma: the correction's weight must be 0 to 1 or 'auto', got {self.gamma!r}")
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every: steps between forward-mode passes must be at least 1, got {self.every}")
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta: the gain must be above 0 and at most 1, got {self.beta}")
        if self.structure not in STRUCTURES:
            raise ValueError(f"structure: {self.structure!r} is not one of {', '.join(STRUCTURES)}")
        if not 0 <= self.leak < 1:
            raise ValueError(f"leak: the fraction forgotten must be at least 0 and below 1, got {self.leak}")
        if not self.clip >= 1:
            raise ValueError(f"clip: the largest update must be at least the usual one, 1, got {self.clip}")

    # --- the guess is another estimator's -----------------------------------------------------------------------------

    @property
    def refresh(self) -> int:  # type: ignore[override]
        refresh: int = self.guess.refresh
        return refresh

    @property
    def prepares(self) -> bool:
        prepares: bool = self.guess.prepares
        return prepares

    @property
    def unbiased(self) -> bool:
        return self.gamma == 1 and self.every == 1 and bool(self.guess.unbiased)

    def prepare(self, site: Site, weights: list[tuple[Matrix, Tensor]], previous: Any = None) -> Any:
        return self.guess.prepare(site, weights, previous)

    def sample(self, state: Any, local: Local) -> Tensor:
        """The guess at the site's amplitude ``a_i``; ``state``: what was prepared, and what was learned."""
        prepared, learned = state
        y: Tensor = self.guess.sample(prepared, local)
        return y if learned is None else y * learned["amplitude"].to(y.dtype)

    def second_moment(self, state: Any, local: Local, g: Tensor) -> Tensor | None:
        """In closed form where the estimate is unbiased; elsewhere it depends on what ``B`` has learned."""
        return g if self.unbiased else None

    def note(self, site: Site) -> str | None:
        note: str | None = self.guess.note(site)
        return note

    def check(self, sites: tuple[Site, ...]) -> None:
        self.guess.check(sites)

    def options(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**own, "guess": describe(self.guess)}

    # --- the estimate -------------------------------------------------------------------------------------------------

    def injects(self, step: int) -> bool:
        return step % self.every == 0

    def estimate(
        self, locals: dict[int, Local], record: ForwardRecord, graph: SiteGraph, states: dict[int, Any]
    ) -> tuple[dict[int, Tensor], dict[int, Any]]:
        """Predict, correct by the guess, then learn from what the prediction missed."""
        output = _Output(graph)
        e = output.of(record.errors)
        ways = {index: _Way(local, output, self.structure) for index, local in locals.items()}
        before = {index: _fitting(states[index], way) for index, way in ways.items() if way.is_open}

        found: dict[int, Tensor] = {}
        for index, way in ways.items():
            state = before.get(index)
            if state is not None and e is not None:
                found[index] = way.pull_back(e, state["B"])  # c_i = M_i B_i e
        guesses = {index: record.guesses[index] for index in locals if index in record.guesses}
        if not guesses:
            return found, {}

        amplitudes = {index: 1.0 if state is None else state["amplitude"] for index, state in states.items()}
        learned = self._learn(output, record, ways, guesses, before, amplitudes)
        rest = self._rest(record, graph, ways, found, guesses)
        for index, y in guesses.items():
            state = before.get(index)
            gamma: Any = 1.0 if index not in before else self.gamma
            if gamma == "auto":
                gamma = 1.0 if state is None else state["gamma"]
            elif gamma == 0:
                found.setdefault(index, torch.zeros_like(y))
                continue
            rate = rest / amplitudes[index] ** 2
            correction = y.mul_(ways[index].layout.spread(rate, tuple(y.shape)).to(y.dtype))  # (e . d) y_i / a_i^2
            if self.gamma == "auto" and index in learned:
                learned[index] |= _shrunken(state, correction, ways[index], learned[index]["steps"])
            correction = correction if isinstance(gamma, float) and gamma == 1 else correction.mul_(gamma)
            found[index] = found[index] + correction if index in found else correction
        return found, learned

    @staticmethod
    def _rest(
        record: ForwardRecord,
        graph: SiteGraph,
        ways: dict[int, _Way],
        predicted: dict[int, Tensor],
        guesses: dict[int, Tensor],
    ) -> Tensor:
        """``(e . d)_n = D_n - sum_i <c_i[n], y_i[n]>``, ``[N]`` or their sum ``[1]``."""
        rest = record.d
        for index, c in predicted.items():
            if index in guesses:
                part = ways[index].apart.sum_examples(_wide(c) * _wide(guesses[index]), graph.batch)
                rest = rest - part if part.shape == rest.shape else rest.sum().reshape(1) - part.sum()
        return rest

    def _learn(
        self,
        output: _Output,
        record: ForwardRecord,
        ways: dict[int, _Way],
        guesses: dict[int, Tensor],
        before: dict[int, dict[str, Any] | None],
        amplitudes: dict[int, Any],
    ) -> dict[int, dict[str, Any]]:
        """A normalised least-mean-squares step of every ``B`` on ``d = v' - sum_i B_i^T M_i y_i``."""
        d = output.of(record.tangents)
        if d is None:
            return {}
        moved = {index: ways[index].push_forward(guesses[index]) for index in before if index in guesses}
        for index, r in moved.items():
            state = before[index]
            if state is not None:
                d = d - ways[index].foreseen(r, state["B"])
        learned = {index: _moments(before[index], r, amplitudes[index]) for index, r in moved.items()}
        crowd = 1 + sum(new["power"] / new["width"].clamp_min(_TINY) / _samples(moved[i]) for i, new in learned.items())
        for index, r in moved.items():
            old, new = before[index], learned[index]
            gradient = ways[index].outer(r, d) / (_samples(r) * amplitudes[index] ** 2)
            size = gradient.norm()
            sound = torch.isfinite(size)
            bounded = size if old is None else torch.minimum(size, self.clip * old["usual"])
            gain = max(self.beta, 1 / (new["steps"] + 1)) / (new["width"] * crowd).clamp_min(_TINY)
            step = torch.where(sound, gradient * (gain * bounded / size.clamp_min(_TINY)), 0)
            if old is None:
                new |= {"B": step, "usual": torch.where(sound, size, 0)}
            else:
                recent = max(RECENT, 1 / new["steps"])
                usual = old["usual"] + recent * (torch.where(sound, bounded, old["usual"]) - old["usual"])
                new |= {"B": (1 - self.leak) * old["B"] + step, "usual": usual}
        reach = {i: new["B"].norm() * new["width"].sqrt() for i, new in learned.items()}
        furthest = torch.stack(list(reach.values())).max() if reach else None
        for index, new in learned.items():
            new["amplitude"] = (furthest / reach[index].clamp_min(_TINY)).clamp(1, LOUDEST)
        return learned


_TINY = 1e-30


def _samples(r: Tensor) -> int:
    return r.shape[0] * r.shape[1]


def _moments(old: dict[str, Any] | None, r: Tensor, amplitude: Any) -> dict[str, Any]:
    """Running ``E |r|^2`` and ``E (r . r')^2`` of two examples, at amplitude 1; ``width``: their ratio, a typical
    eigenvalue of ``E r r^T``."""
    flat = r.flatten(0, 1)
    power = flat.square().sum(1).mean() / amplitude**2
    pairs = (flat * flat.roll(1, 0) / amplitude**2).sum(1).square().mean()
    steps = 1 if old is None else old["steps"] + 1
    if old is not None:
        weight = max(RECENT, 1 / steps)
        power = old["power"] + weight * (power.nan_to_num(0, 0, 0) - old["power"])
        pairs = old["pairs"] + weight * (pairs.nan_to_num(0, 0, 0) - old["pairs"])
    width = torch.maximum(pairs / power.clamp_min(_TINY), power / flat.shape[1])  # no smaller than the mean eigenvalue
    return {"power": power, "pairs": pairs, "width": width, "steps": steps}


def _shrunken(old: dict[str, Any] | None, correction: Tensor, way: _Way, steps: int) -> dict[str, Any]:
    """``gamma = 1 - noise / signal`` (positive part): of the squared mean correction, the share that is not the noise
    of a mean over so many examples."""
    each = way.examples(correction)
    signal = each.mean(0).square().sum()
    noise = each.square().sum() / each.shape[0] ** 2
    if old is not None:
        weight = max(RECENT, 1 / steps)
        signal, noise = (a + weight * (b - a) for a, b in ((old["signal"], signal), (old["noise"], noise)))
    gamma = (1 - noise / signal.clamp_min(_TINY)).clamp(0, 1)
    return {"signal": signal, "noise": noise, "gamma": gamma}


def _fitting(state: dict[str, Any] | None, way: _Way) -> dict[str, Any] | None:
    """The state, unless it was learned at another size."""
    return state if state is not None and tuple(state["B"].shape) == way.b_shape else None


class _Output:
    """The network's output as the feedback sees it: all cuts that hold examples, ``[n, g, c]``."""

    def __init__(self, graph: SiteGraph) -> None:
        self.n = graph.batch
        self.cuts = [(k, cut) for k, cut in enumerate(graph.cuts) if cut.layout is not Layout.COUPLED]
        views = {k: _View(cut.layout, cut.shape, self.n, _is_map(cut)) for k, cut in self.cuts}
        positions = {view.positions for view in views.values()}
        self.views, self.same = views, len(positions) == 1
        self.positions = next(iter(positions)) if self.same else 1
        self.features = sum(v.features if self.same else v.positions * v.features for v in views.values())

    def of(self, values: list[Any]) -> Tensor | None:
        """Errors or tangents of the cuts, side by side; None where there are none."""
        parts = []
        for k, view in self.views.items():
            v: Tensor | None = values[k]
            if v is None:
                any_one = next((value for value in values if value is not None), None)
                if any_one is None:
                    return None
                v = any_one.new_zeros(view.shape)
            part = view.unfold(_wide(v))
            parts.append(part if self.same else part.flatten(1)[:, None])
        return torch.cat(parts, -1) if parts else None


class _Way:
    """A site's way to the space in which ``B`` predicts: the next matrix site's input, or its own output where none
    follows. Maps ``[n, g, f]`` to the site's cotangent and back.

    Attributes:
        layout: the site's own.
        apart: the same, or that of examples that act on each other a little (batch statistics).
        is_open: whether examples can be told apart at all.
    """

    def __init__(self, local: Local, output: _Output, structure: str) -> None:
        self.local, self.output = local, output
        site, n = local.site, output.n
        self.layout = site.layout
        self.apart = Layout.candidates(site.shape, n)[0] if site.layout is Layout.COUPLED else site.layout
        segment = site.segment
        shape = site.shape if segment is None else segment.matrices[0].x_shape
        layout = self.apart if self.apart.fits(shape, n) else Layout.candidates(shape, n)[0]
        self.is_open = bool(output.cuts) and n > 1 and Layout.COUPLED not in (self.apart, layout)
        if not self.is_open:
            return
        maps = _maps(segment.matrices[0]) if segment is not None else len(shape) > 3
        self.view = _View(layout, shape, n, maps)
        p, f = self.view.positions, self.view.features
        self.matched = p == output.positions > 1
        self.apart_positions = not self.matched and (
            p == 1 or structure == "position" or (structure == "auto" and maps and p * f * output.features <= LARGEST)
        )
        self.b_shape = (p * f if self.apart_positions else f, output.features)

    def pull_back(self, e: Tensor, b: Tensor) -> Tensor:
        """``M B e``: the site's predicted cotangent."""
        if not self.matched and e.shape[1] > 1:
            e = e.sum(1, keepdim=True)
        u = e @ b.T  # n g c, f c -> n g f
        n, p, f = e.shape[0], self.view.positions, self.view.features
        u = u.reshape(n, p, f) if self.apart_positions else u.expand(n, p, f)
        u = self.view.fold(u.to(self.local.s.dtype))
        return u if self.local.site.segment is None else self.local.pull_back(u)

    def push_forward(self, y: Tensor) -> Tensor:
        """``M y`` as ``[n, g, f]``: what ``B`` sees of the guess."""
        r = y if self.local.site.segment is None else self.local.push_forward(y)
        r = self.view.unfold(_wide(r))
        if self.matched:
            return r
        return r.flatten(1)[:, None] if self.apart_positions else r.sum(1, keepdim=True)

    def foreseen(self, r: Tensor, b: Tensor) -> Tensor:
        """``B^T r``: the output tangent expected of the guess; broadcasts over the output's positions."""
        return r @ b  # n g f, f c -> n g c

    def outer(self, r: Tensor, d: Tensor) -> Tensor:
        """``sum_n r d^T``."""
        if not self.matched and d.shape[1] > 1:
            d = d.mean(1, keepdim=True)
        return r.flatten(0, 1).mT @ d.flatten(0, 1)  # (n g) f, (n g) c -> f c

    def examples(self, t: Tensor) -> Tensor:
        """The site's cotangent by example, ``[n, -1]``."""
        if self.layout is Layout.COUPLED:
            return _wide(t).reshape(1, -1)
        return _View(self.layout, tuple(t.shape), self.output.n, False).unfold(_wide(t)).flatten(1)


class _View:
    """A tensor as ``[n, p, f]``, and back. ``maps``: features come before positions."""

    def __init__(self, layout: Layout, shape: Shape, n: int, maps: bool) -> None:
        self.layout, self.shape, self.n = layout, shape, n
        if layout is Layout.BATCH_SECOND:
            inner = (shape[0], *shape[2:])
        elif layout is Layout.BATCH_FIRST:
            inner = shape[1:]
        else:
            inner = (shape[0] // n, *shape[1:])
        self.inner, self.maps = inner, maps and len(inner) > 1
        self.features = 1 if not inner else inner[0] if self.maps else inner[-1]
        self.positions = numel(inner) // max(self.features, 1)

    def unfold(self, t: Tensor) -> Tensor:
        if self.layout is Layout.BATCH_SECOND:
            t = t.transpose(0, 1)
        elif self.layout is Layout.FLAT_T:
            t = t.reshape(self.shape[0] // self.n, self.n, *self.shape[1:]).transpose(0, 1)
        if self.maps:
            return t.reshape(self.n, self.features, self.positions).mT
        return t.reshape(self.n, self.positions, self.features)

    def fold(self, u: Tensor) -> Tensor:
        if self.maps:
            u = u.mT
        if self.layout in (Layout.BATCH_SECOND, Layout.FLAT_T):
            u = u.reshape(self.n, *self.inner).transpose(0, 1)
        return u.reshape(self.shape)


def _maps(matrix: Matrix) -> bool:
    return matrix.rule.geometry(matrix.call) != "linear"


def _is_map(cut: Cut) -> bool:
    return len(cut.shape) > 3


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
