"""Experiments that measure guessopt: `python -m benchmarks NAME` (see `--help` for the names)."""

import os

# The profiler behind measure.py announces its start and stop on the terminal; torch reads this once, on import.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
