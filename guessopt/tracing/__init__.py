"""Closure to ``SiteGraph``: interception, the tape, the analysis, and a site's view of its surroundings."""

from guessopt.tracing.analysis import Analysis
from guessopt.tracing.context import SiteContext
from guessopt.tracing.extract import sites_of
from guessopt.tracing.graph import site_graph
from guessopt.tracing.interceptor import Interceptor
from guessopt.tracing.tape import Tape

__all__ = ["Analysis", "Interceptor", "SiteContext", "Tape", "site_graph", "sites_of"]
