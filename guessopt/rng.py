"""Random states: what a closure may draw from, recorded and replayed; and the guesses' own stream."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor


class RandomState:
    """The state of torch's, numpy's and ``random``'s global generators.

    >>> state = RandomState.capture()
    >>> a = torch.rand(2)
    >>> state.restore()
    >>> torch.equal(a, torch.rand(2))
    True
    """

    def __init__(self, torch_cpu: Tensor, devices: dict[int, Tensor], numpy: Any, python: Any) -> None:
        self.torch_cpu, self.devices, self.numpy, self.python = torch_cpu, devices, numpy, python

    @classmethod
    def capture(cls, devices: tuple[int, ...] = ()) -> RandomState:
        """Record; ``devices`` are the CUDA devices in use."""
        numpy = sys.modules.get("numpy")
        return cls(
            torch.get_rng_state(),
            {device: torch.cuda.get_rng_state(device) for device in devices},
            numpy.random.get_state() if numpy is not None else None,
            random.getstate(),
        )

    def restore(self) -> None:
        """Put every generator back to the recorded state."""
        torch.set_rng_state(self.torch_cpu)
        for device, state in self.devices.items():
            torch.cuda.set_rng_state(state, device)
        numpy = sys.modules.get("numpy")
        if numpy is not None and self.numpy is not None:
            numpy.random.set_state(self.numpy)
        random.setstate(self.python)


class NoiseSource:
    """The stream that guesses are drawn from: separate from the closure's, so that dropout sees what it always saw.

    With ``seed=None`` it follows ``torch.manual_seed``: a new global seed starts a new stream.

    >>> a, b = NoiseSource(0), NoiseSource(0)
    >>> cpu = torch.device("cpu")
    >>> torch.equal(a.normal((3,), torch.float32, cpu), b.normal((3,), torch.float32, cpu))
    True
    """

    def __init__(self, seed: int | None) -> None:
        self.seed = seed
        self._followed: int | None = None
        self._generators: dict[torch.device, torch.Generator] = {}

    def follow(self) -> None:
        """Start anew if ``torch.manual_seed`` has been called since the last step."""
        seed = torch.initial_seed() if self.seed is None else self.seed
        if seed != self._followed:
            self._followed = seed
            self._generators = {}

    def generator(self, device: torch.device) -> torch.Generator:
        found = self._generators.get(device)
        if found is None:
            if self._followed is None:
                self.follow()
            assert self._followed is not None
            # An odd constant keeps the stream apart from the closure's own, which starts at the seed itself.
            found = torch.Generator(device=device).manual_seed((self._followed ^ 0x9E3779B97F4A7C15) & (2**63 - 1))
            self._generators[device] = found
        return found

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=self.generator(device))

    def uniform(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.rand(shape, dtype=dtype, device=device, generator=self.generator(device))

    def state(self) -> dict[str, Any]:
        """Plain data (device names to state tensors) that ``load`` understands."""
        states = {str(device): generator.get_state() for device, generator in self._generators.items()}
        return {"seed": self._followed, "generators": states}

    def load(self, state: dict[str, Any]) -> None:
        self._followed = state["seed"]
        self._generators = {}
        for name, value in state["generators"].items():
            self.generator(torch.device(name)).set_state(value)
