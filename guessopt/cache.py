"""States of estimators at sites: prepared (the leading singular vectors of a weight) or learned; each with its age."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from guessopt.tree import map_tensors, tensors_in

#: Marks the keys of states that are learned from step to step, not prepared anew.
LEARNED = "learned: "


class SiteCache:
    """States by key. A prepared state is made again when it is ``refresh`` steps old. Refreshes of different sites are
    spread over time, so that no step pays for all of them.

    >>> cache = SiteCache()
    >>> cache.get("a", step=0, refresh=50, make=lambda old: "first")
    'first'
    >>> cache.get("a", step=49, refresh=50, make=lambda old: "second")
    'first'
    >>> cache.get("a", step=50, refresh=50, make=lambda old: "second")
    'second'
    """

    def __init__(self) -> None:
        self._states: dict[str, tuple[int, Any]] = {}

    def get(self, key: str, *, step: int, refresh: int, make: Callable[[Any], Any]) -> Any:
        """The prepared state. If the state is missing or due, ``make(previous state or None)`` makes it."""
        found = self._states.get(key)
        if found is None:
            # The n-th site is refreshed first after refresh - 7n (mod refresh) steps: sites take turns.
            found = (step - 7 * len(self._states) % refresh, make(None))
            self._states[key] = found
        elif step - found[0] >= refresh:
            found = (step, make(found[1]))
            self._states[key] = found
        return found[1]

    def peek(self, key: str) -> Any:
        """The learned state of a key; None if there is none."""
        found = self._states.get(LEARNED + key)
        return None if found is None else found[1]

    def put(self, key: str, step: int, state: Any) -> None:
        """Replace the learned state of a key. The old state is left unchanged: a snapshot may hold it."""
        self._states[LEARNED + key] = (step, state)

    def learned(self) -> dict[str, tuple[int, Any]]:
        """A snapshot of the learned states, for ``relearn``."""
        return {key: entry for key, entry in self._states.items() if key.startswith(LEARNED)}

    def relearn(self, states: dict[str, tuple[int, Any]]) -> None:
        """Go back to a snapshot made by ``learned``. Prepared states stay as they are."""
        kept = {key: entry for key, entry in self._states.items() if not key.startswith(LEARNED)}
        self._states = {**kept, **states}

    def state_dict(self) -> dict[str, Any]:
        """All states as plain data and tensors; each with the step that made it and its device."""
        return {
            key: {"step": step, "state": state, "device": device_of(state)}
            for key, (step, state) in self._states.items()
        }

    def load_state_dict(self, state: Mapping[str, Any], place: Callable[[str], torch.device] = torch.device) -> None:
        """Load a copy of a state that ``state_dict`` returned.

        Args:
            state: returned by ``state_dict``.
            place: gives, for the name of a device at the time of saving, the device for its tensors now.
        """
        self._states = {
            key: (entry["step"], copied(entry["state"], None if entry["device"] is None else place(entry["device"])))
            for key, entry in state.items()
        }

    def copy(self) -> dict[str, tuple[int, Any]]:
        """A snapshot for ``restore``."""
        return dict(self._states)

    def restore(self, states: dict[str, tuple[int, Any]]) -> None:
        """Go back to a snapshot made by ``copy``."""
        self._states = states


def device_of(state: Any) -> str | None:
    """The device of the first tensor in nested lists, tuples and dicts; None if there is none.

    >>> device_of([1, {"a": torch.ones(2)}])
    'cpu'
    """
    tensors = tensors_in(state)
    return str(tensors[0].device) if tensors else None


def copied(state: Any, device: torch.device | None) -> Any:
    """Nested lists, tuples and dicts with their tensors copied to a device (None: each stays on its own).

    >>> a = [torch.ones(2), {"b": (None, 3)}]
    >>> b = copied(a, torch.device("cpu"))
    >>> b[1:], b[0] is a[0]
    ([{'b': (None, 3)}], False)
    """
    return map_tensors(state, lambda t: t.detach().to(device or t.device, copy=True))
