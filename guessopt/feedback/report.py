"""For ``preflight``: how learned feedback forms each site's cotangent, and the shape and size of ``B``."""

from __future__ import annotations

from guessopt.chains import ResidualChain
from guessopt.feedback.fitting import keepers
from guessopt.feedback.maps import FeedbackMap
from guessopt.feedback.options import FeedbackOptions
from guessopt.feedback.residual import stream_maps
from guessopt.feedback.sitewise_plan import SitewisePlan
from guessopt.graph import SiteGraph
from guessopt.sites import Site

#: By site index: a few words, and bytes.
Forms = dict[int, tuple[str, int]]


def stream_forms(options: FeedbackOptions, sites: tuple[Site, ...], graph: SiteGraph, stream: ResidualChain) -> Forms:
    """The forms along a residual stream."""
    found: Forms = {}
    maps = dict(stream_maps({site.index for site in sites}, graph, options).values())
    reads = set(keepers(maps).values()) if options.fits_stream else set()
    *blocks, head = stream.blocks
    for number, block in enumerate([*blocks, head], 1):
        text = "exact error" if block is head else f"block {number} of {len(blocks)} by itself"
        for index in block.sites:
            found[index] = _form(text, maps.get(index), graph.sites[index], options.fits_stream, index in reads)
    return {site.index: found[site.index] for site in sites if site.index in found}


def sitewise_forms(options: FeedbackOptions, sites: tuple[Site, ...], graph: SiteGraph) -> Forms:
    """The forms without a stream."""
    found: Forms = {}
    plan = SitewisePlan.of(options, sites, graph)
    reads = set(keepers(plan.fitted).values())
    for site in sites:
        map_: FeedbackMap | None = plan.maps.get(site.index)
        if map_ is None:
            found[site.index] = ("no examples: the correction alone", 0)
            continue
        text = "own"
        if options.ahead and site.index in plan.next_cut:
            text = "exact error through the head"
        elif options.ahead and site.index in plan.next_site:
            text = "one matrix site ahead"
        map_ = plan.fitted.get(site.index) if plan.by_weights else map_
        found[site.index] = _form(text, map_, site, plan.by_weights, site.index in reads)
    return found


def _form(text: str, map_: FeedbackMap | None, site: Site, by_weights: bool, reads: bool) -> tuple[str, int]:
    """``reads``: whether the site keeps the second moment of the errors. All is float32 at least."""
    if map_ is None:
        return text, 0
    rows, columns = map_.b_shape
    text += f", B {list(map_.b_shape)}" + (" from weights" if by_weights else "")
    return text, (rows * columns + reads * columns**2) * max(site.dtype.itemsize, 4)
