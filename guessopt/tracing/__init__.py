"""Closure to ``SiteGraph``: interception, the tape, the analysis, and a site's view of its surroundings."""

from guessopt.tracing.context import SiteContext
from guessopt.tracing.graph import Analysis
from guessopt.tracing.interceptor import Interceptor
from guessopt.tracing.tape import Tape

__all__ = ["Analysis", "Interceptor", "SiteContext", "Tape"]
