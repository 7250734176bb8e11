"""Without a stream: the sites that have a ``B``, the site or cut that each prediction comes from, and what ``B`` learns
from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from guessopt.feedback.maps import FeedbackMap, Form, Output, SiteFeedback, rows_per_sample
from guessopt.feedback.options import FeedbackOptions
from guessopt.graph import SiteGraph
from guessopt.sites import Site

#: Most features of the output for which ``B`` begins at the product of the weights, and may come from weights. Each
#: feature takes a pull-back at every site.
MAX_OUTPUT_FEATURES = 128

#: Most rows of ``B`` for each sample of a batch, times the steps between two forward-mode passes.
MAX_ROW_STEPS_PER_SAMPLE = 32


@dataclass(frozen=True)
class SitewisePlan:
    """The part of the work that is the same in every step.

    Attributes:
        output: the network's output.
        maps: the ``B`` of each site whose examples can be told apart, by site index.
        coupled: the other sites.
        next_site: by site index, the site whose output is that of the next matrix site.
        next_cut: by site index, the cut that is the output of the next matrix site.
        products: the sites from which weights lead to the output, from the last to the first. Their ``B`` begins at the
            product of these weights.
        by_weights: whether every ``B`` is fitted to the next one's prediction. If not, every ``B`` learns from guesses.
    """

    output: Output
    maps: dict[int, SiteFeedback]
    coupled: frozenset[int]
    next_site: dict[int, int]
    next_cut: dict[int, int]
    products: list[int]
    by_weights: bool

    @cached_property
    def fitted(self) -> dict[int, FeedbackMap]:
        """The ``B`` that are fitted: those that predict for another site."""
        return {index: self.maps[index] for index in reversed(self.products)} if self.by_weights else {}

    @staticmethod
    def of(
        options: FeedbackOptions, sites: tuple[Site, ...], graph: SiteGraph, by_weights: bool | None = None
    ) -> SitewisePlan:
        """The plan, made once for each graph.

        Args:
            by_weights: where ``B`` has come from in earlier steps; None before the first.
        """
        key = options, tuple(site.index for site in sites), by_weights
        return graph.cached(key, lambda: _made(options, sites, graph, by_weights))


def _made(options: FeedbackOptions, sites: tuple[Site, ...], graph: SiteGraph, by_weights: bool | None) -> SitewisePlan:
    output, form = Output.of_cuts(graph), options.form
    maps, next_site, next_cut = separable_sites(sites, output, form), dict[int, int](), dict[int, int]()
    coupled = frozenset(site.index for site in sites if site.index not in maps)
    for index in maps:
        site = following(graph, graph.sites[index])
        if site is not None and site.index in maps:
            next_site[index] = site.index
        elif site is not None and site.index not in coupled and site.cut is not None:
            next_cut[index] = site.cut
    products: list[int] = []
    if len(output.axes) == 1 and output.features <= MAX_OUTPUT_FEATURES:
        for index in sorted(maps, reverse=True):
            leads_on = next_cut.get(index) in output.axes or next_site.get(index) in products
            if leads_on and maps[index].rank is None:
                products.append(index)
    whole = not coupled and len(products) == len(maps)
    by_weights = takes_weights(options, graph, whole) if by_weights is None else by_weights and whole
    if by_weights and form.structure == "auto":
        maps = separable_sites(sites, output, Form("position", form.entries))
    if by_weights:
        products = [index for index in products if index in next_site.values()]
    return SitewisePlan(output, maps, coupled, next_site, next_cut, products, by_weights)


def takes_weights(options: FeedbackOptions, graph: SiteGraph, whole: bool) -> bool:
    """Whether every ``B`` is fitted to the next one's prediction. The first batch decides; later ones may be smaller.

    Args:
        whole: whether weights lead to the output from every site.

    Raises:
        ValueError: they do not, and ``source="weights"``.
    """
    if options.source == "weights" and not whole:
        raise ValueError(
            "source: 'weights' needs weights, one after another, from every site to one output of at most "
            f"{MAX_OUTPUT_FEATURES} features; use 'auto' or 'guesses'"
        )
    if not (whole and options.may_fit):
        return False
    return options.source == "weights" or 2 * sitewise_rows(options, graph) > MAX_ROW_STEPS_PER_SAMPLE


def sitewise_rows(options: FeedbackOptions, graph: SiteGraph) -> float:
    """``rows_per_sample`` of every ``B`` that may be learned."""

    def rows() -> float:
        inner = (site for site in graph.sites if site.shares is None and site.cut is None)
        return rows_per_sample(list(separable_sites(inner, Output.of_cuts(graph), options.form).values()))

    return graph.cached(("sitewise rows", options), rows)


def separable_sites(sites: Iterable[Site], output: Output, form: Form) -> dict[int, SiteFeedback]:
    """The ``B`` of every site whose examples can be told apart, by site index."""
    every = ((site.index, SiteFeedback.of(site, output, form)) for site in sites)
    return {index: map_ for index, map_ in every if map_ is not None}


def following(graph: SiteGraph, site: Site) -> Site | None:
    """The site that has the cotangent of the next matrix site's output. None if several matrix sites read the segment,
    or if nothing trains there."""
    segment = site.segment
    if segment is None or len(segment.matrices) > 1 or len(segment.matrices[0].weights) > 1:
        return None
    found = next(iter(graph.sites_at.get(segment.matrices[0].call.index, ())), None)
    while found is not None and found.shares is not None:
        found = graph.sites[found.shares]
    return found
