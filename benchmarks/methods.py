"""The table of methods: under each name, how the optimizer is built. All experiments take their methods from here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn
from torch.optim import AdamW

from benchmarks.baselines import InBackward, MeZO, ZerothOrder, checkpointed, trainable
from benchmarks.training import Backprop, Forward, Learner
from guessopt import (
    ActivationMixing,
    ActivationPerturbation,
    DirectionalDescent,
    Downstream,
    GuessGradOptimizer,
    LearnedFeedback,
    SelfSharpening,
    WPerp,
    WPerpNS,
    WPreconditioned,
    WTranspose,
)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        label: in printed tables and pictures.
        build: makes a learner from a model, a learning rate and options.
        lr: the default learning rate.
        options: for ``build``; the options of a call come on top.
    """

    label: str
    build: Callable[..., Learner]
    lr: float = 1e-4
    options: dict[str, Any] = field(default_factory=dict)

    def learner(self, model: nn.Module, lr: float | None = None, **options: Any) -> Learner:
        """A learner that trains the parameters of the model that require gradients."""
        return self.build(model, self.lr if lr is None else lr, **{**self.options, **options})

    def variant(self, label: str = "", **options: Any) -> Method:
        """The method with further options, and with another label if one is given."""
        return replace(self, label=label or self.label, options={**self.options, **options})


def backprop(model: nn.Module, lr: float, **options: Any) -> Learner:
    return Backprop(model, AdamW(trainable(model), lr=lr, **options))


def checkpointed_backprop(
    model: nn.Module, lr: float, blocks: Iterable[nn.Module] | None = None, **options: Any
) -> Learner:
    return backprop(checkpointed(model, blocks), lr, **options)


def head_alone(model: nn.Module, lr: float, head: str = "head", **options: Any) -> Learner:
    """Trains the module of that name and freezes all else. Its gradient is exact without backpropagation."""
    model.requires_grad_(False).get_submodule(head).requires_grad_(True)
    return backprop(model, lr, **options)


def mezo(model: nn.Module, lr: float, **options: Any) -> Learner:
    return ZerothOrder(model, MeZO(trainable(model), lr, **options))


def guess(model: nn.Module, lr: float, estimator: Any, base: Any = AdamW, **options: Any) -> Learner:
    """``estimator``: an estimator, its registered name, or a function that makes one; ``options``: of the optimizer and
    its base."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    chosen = estimator() if callable(estimator) else estimator
    return Forward(model, GuessGradOptimizer(named, base=base, estimator=chosen, lr=lr, **options))


def guessing(label: str, estimator: Any) -> Method:
    return Method(label, guess, options={"estimator": estimator})


_learned = partial(LearnedFeedback, gamma=0, every="auto")
#: Direct feedback alignment: the error reaches every layer through a fixed matrix of its own.
_fixed = partial(LearnedFeedback, gamma=0, beta=0, ahead=0, residual=False)

METHODS: dict[str, Method] = {
    "backprop": Method("backprop", backprop),
    "checkpointed": Method("checkpointed backprop", checkpointed_backprop),
    "in_backward": Method("backprop, update in the backward", InBackward),
    "head": Method("head alone", head_alone),
    "mezo": Method("MeZO", mezo, lr=1e-6),
    "directional_descent": guessing("forward gradient (directional descent)", DirectionalDescent),
    "activation_perturbation": guessing("activation perturbation", ActivationPerturbation),
    # Position credit: the best discount is measured.
    "activation_credit": guessing("activation perturbation, credit", ActivationPerturbation).variant(discount="auto"),
    "w_perp_credit": guessing("W-perp, credit", partial(WPerp, k=10)).variant(discount="auto"),
    **{
        f"{name}_credit_exact": guessing(f"{label}, credit, exact head", estimator).variant(
            discount="auto", exact_last=True
        )
        for name, label, estimator in (
            ("activation", "activation perturbation", ActivationPerturbation),
            ("w_perp", "W-perp", partial(WPerp, k=10)),
        )
    },
    "activation_mixing": guessing("activation mixing", ActivationMixing),
    "downstream": guessing("downstream", Downstream),
    "self_sharpening": guessing("self-sharpening", SelfSharpening),
    "w_transpose": guessing("W^T", WTranspose),
    **{f"power_{p:g}": guessing(f"W^T, power {p:g}", partial(WTranspose, power=p)) for p in (0.1, 0.5, 2.0, 4.0)},
    "w_perp": guessing("W-perp", partial(WPerp, k=10)),
    "w_perp_ns": guessing("W-perp-NS", partial(WPerpNS, k=10)),
    # The paper's form: a basis for each example.
    "w_perp_example": guessing("W-perp, own bases", partial(WPerp, k=10, basis="example")),
    "w_perp_example_25": guessing("W-perp, own bases, k=25", partial(WPerp, k=25, basis="example")),
    "w_perp_example_1": guessing("W-perp, own bases, k=1", partial(WPerp, k=1, basis="example")),
    "w_perp_bottom": guessing("W-perp, bottom k", partial(WPerp, k=10, basis="example", select="bottom")),
    "w_perp_ns_example": guessing("W-perp-NS, own bases", partial(WPerpNS, k=10, basis="example")),
    "w_preconditioned": guessing("W-P", WPreconditioned),
    "learned_feedback": guessing("learned feedback", partial(LearnedFeedback, gamma=0, every=4)),
    "learned_feedback_every": guessing("learned feedback", _learned),
    "random_feedback": guessing("random DFA", partial(_fixed, start="random")),
    "fixed_feedback": guessing("fixed DFA", partial(_fixed, start="weights")),
    # Learned feedback with one part changed, to see what the part is worth.
    "learned_feedback_near": guessing("learned, ahead=0", partial(_learned, ahead=0)),
    "learned_feedback_skips": guessing("skips alone", partial(LearnedFeedback, gamma=0, beta=0, ahead=0)),
    "learned_feedback_sites": guessing("learned, no stream", partial(_learned, residual=False)),
    "learned_feedback_position": guessing("learned, position", partial(_learned, structure="position")),
    "learned_feedback_shared": guessing("learned, shared", partial(_learned, structure="shared")),
    "learned_feedback_guesses": guessing("learned, guesses", partial(_learned, source="guesses")),
    "learned_feedback_weights": guessing("learned, weights", partial(_learned, source="weights")),
    "learned_feedback_zero": guessing("learned, from zero", partial(_learned, start="zero", source="guesses")),
    "learned_feedback_auto": guessing("learned, gamma auto", LearnedFeedback),
}


def labels(names: Iterable[str]) -> dict[str, str]:
    """Label by name."""
    return {name: METHODS[name].label for name in names}
