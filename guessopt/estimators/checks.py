"""Checks of options, which several estimators share. Each raises ``ValueError`` that begins with the option's name."""

from __future__ import annotations

from typing import Any

from guessopt.sites import Site
from guessopt.tracing.context import NOISES


def check_noise(noise: str) -> None:
    check_choice("noise", noise, *NOISES)


def check_choice(name: str, value: Any, *allowed: str) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(allowed)}")


def check_refresh(refresh: int) -> None:
    if refresh < 1:
        raise ValueError(f"refresh: steps between preparations must be at least 1, got {refresh}")


def check_debias(debias: bool, noise: str) -> None:
    if debias and noise == "uniform":
        raise ValueError("debias: the mean of uniform noise couples the sites; use noise='uniform_centred'")


def check_dimension(k: Any) -> None:
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k: the guess needs at least one dimension, got {k}")


def check_rank(k: int, default: int, sites: tuple[Site, ...]) -> None:
    """``k`` must not exceed the rank of every site. The default ``k`` serves every model: it is clipped."""
    most = max((site.rank for site in sites if not site.is_last), default=k)
    if k > most and k != default:
        raise ValueError(f"k: {k} exceeds the rank of every site (the largest is {most}); choose k <= {most}")
