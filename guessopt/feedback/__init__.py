"""Learned feedback: maps from the error at the output to the cotangent at a site, learned from guesses or weights."""
