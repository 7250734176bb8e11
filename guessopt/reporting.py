"""What an estimator tells users: notes and errors about a model's sites, sizes for ``preflight``, its own options."""

from __future__ import annotations

import dataclasses
from typing import Any

from guessopt.graph import SiteGraph
from guessopt.sites import Site


class Reporting:
    """The part of an estimator that reports. The defaults report nothing."""

    def note(self, site: Site) -> str | None:
        """Why this site gets another guess than the estimator's name says; None if it does not. Users see the
        note once, as a warning. A last site, which has no next weight, needs none."""
        return None

    def check(self, sites: tuple[Site, ...]) -> None:
        """Raise ``ValueError`` if the options do not suit these sites."""

    def forms(self, sites: tuple[Site, ...], graph: SiteGraph) -> dict[int, tuple[str, int]]:
        """By site index, how the cotangent is formed (a few words), and the bytes learned for it."""
        return {}

    def reversed_matrices(self, graph: SiteGraph) -> int:
        """The most matrix sites on one path of a graph that is differentiated in reverse. The largest value that means
        "none but a site's own rule" is 1."""
        return 0

    def options(self) -> dict[str, Any]:
        """Plain data from which ``make_estimator`` builds an equal estimator."""
        return dataclasses.asdict(self) if dataclasses.is_dataclass(self) else {}
