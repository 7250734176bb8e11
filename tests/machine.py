"""Tests of what torch itself refuses on the machine at hand are skipped, with torch's reason."""

from collections.abc import Callable, Hashable
from typing import Any

import pytest

from benchmarks.machine import refused

__all__ = ["refused", "skip_if_refused"]


def skip_if_refused(run: Callable[[], Any], key: Hashable = None) -> None:
    """Skip the test if plain torch does not run this; see ``refused``."""
    if (why := refused(run, key)) is not None:
        pytest.skip(f"torch refuses it on this machine: {why}")
