"""Random states: the generators that a closure may use, recorded and replayed; and the random stream of the guesses."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket


class RandomState:
    """The state of torch's, numpy's and ``random``'s global generators.

    >>> state = RandomState.capture()
    >>> a = torch.rand(2)
    >>> state.restore()
    >>> torch.equal(a, torch.rand(2))
    True
    """

    def __init__(
        self,
        torch_cpu: Tensor,
        devices: dict[int, Tensor],
        numpy: Any,
        python: Any,
        generators: Iterable[tuple[torch.Generator, Tensor]] = (),
    ) -> None:
        self.torch_cpu, self.devices, self.numpy, self.python = torch_cpu, devices, numpy, python
        self.generators = tuple(generators)

    @classmethod
    def capture(
        cls, devices: tuple[int, ...] = (), generators: Iterable[torch.Generator] = (), *, torch_alone: bool = False
    ) -> RandomState:
        """Record the global generators.

        Args:
            devices: the CUDA devices in use.
            generators: further generators.
            torch_alone: leave out the generators of numpy and ``random``.
        """
        numpy = None if torch_alone else sys.modules.get("numpy")
        return cls(
            torch.get_rng_state(),
            {device: torch.cuda.get_rng_state(device) for device in devices},
            numpy.random.get_state() if numpy is not None else None,
            None if torch_alone else random.getstate(),
            ((generator, generator.get_state()) for generator in generators),
        )

    @classmethod
    def before(cls, args: Any, kwargs: dict[str, Any], *fns: Callable[..., Any]) -> RandomState:
        """Record the generators from which a call may draw: the global generators, and those among its arguments.

        Args:
            fns: the functions that are called. If all are torch's own, only torch's generators are recorded.

        >>> generator = torch.Generator()
        >>> len(RandomState.before(((2, 3),), {"generator": generator}, torch.rand).generators)
        1
        """
        devices, generators = set[int](), list[torch.Generator]()
        _sources((args, kwargs), devices, generators)
        if torch.cuda.is_initialized() and (not devices or torch.get_default_device().type == "cuda"):
            devices.add(torch.cuda.current_device())  # a call without a device argument takes the default
        return cls.capture(tuple(devices), generators, torch_alone=bool(fns) and all(map(_is_of_torch, fns)))

    def restore(self) -> None:
        """Put every generator back to the recorded state."""
        for generator, given in self.generators:
            generator.set_state(given)
        torch.set_rng_state(self.torch_cpu)
        for device, state in self.devices.items():
            torch.cuda.set_rng_state(state, device)
        numpy = sys.modules.get("numpy")
        if numpy is not None and self.numpy is not None:
            numpy.random.set_state(self.numpy)
        if self.python is not None:
            random.setstate(self.python)


def cuda_devices(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Indices of the CUDA devices that hold any of the tensors."""
    return tuple({t.device.index for t in tensors if t.is_cuda})


@contextmanager
def replayed(state: RandomState | None) -> Iterator[None]:
    """Inside the block, the generators are as in ``state``; afterwards as before. None: do nothing."""
    if state is None:
        yield
        return
    generators = (generator for generator, _ in state.generators)
    now = RandomState.capture(tuple(state.devices), generators, torch_alone=state.python is None)
    state.restore()
    try:
        yield
    finally:
        now.restore()


def _sources(node: Any, devices: set[int], generators: list[torch.Generator]) -> None:
    """Add the CUDA devices and the generators among a call's arguments to ``devices`` and ``generators``."""
    if isinstance(node, Tensor):
        if node.is_cuda:
            devices.add(node.device.index)
    elif isinstance(node, torch.Generator):
        generators.append(node)
    elif isinstance(node, (tuple, list)):
        for item in node:
            _sources(item, devices, generators)
    elif isinstance(node, dict):
        for key, item in node.items():
            if key == "device" and item is not None and (device := torch.device(item)).type == "cuda":
                devices.add(torch.cuda.current_device() if device.index is None else device.index)
            else:
                _sources(item, devices, generators)


@lru_cache(maxsize=4096)
def draws(fn: Callable[..., Any]) -> bool:
    """Whether a torch function may draw random numbers.

    Torch's own operations have a tag for random draws. A Python function of torch draws if its code names an operation
    that draws. For other functions (a custom operation, a ``torch.autograd.Function``) the answer is True.

    >>> draws(torch.rand_like), draws(torch.nn.functional.gumbel_softmax), draws(torch.relu)
    (True, True, False)
    """
    if isinstance(fn, OpOverload):
        return torch.Tag.nondeterministic_seeded in fn.tags or fn.namespace not in _TAGGED
    if isinstance(fn, OpOverloadPacket):
        return any(draws(getattr(fn, name)) for name in fn.overloads())
    if isinstance(fn, FunctionType):
        return not _is_of_torch(fn) or _names_drawing(fn)
    if isinstance(fn, type) or type(fn).__module__ not in _BUILT_IN:
        return True
    return _is_drawing_operation(fn.__name__)


#: Namespaces of operations whose tags are complete; modules of the types of torch's built-in functions.
_TAGGED, _BUILT_IN = ("aten", "prims", "prim"), ("builtins", "torch")


@cache
def _is_drawing_operation(name: str) -> bool:
    packet = None if name.startswith("__") else getattr(torch.ops.aten, name, None)
    return packet is not None and draws(packet)


def _is_of_torch(fn: Callable[..., Any]) -> bool:
    """Whether a function is one of torch's own: built in, or written in Python."""
    if isinstance(fn, FunctionType):
        return fn.__module__.partition(".")[0] == "torch"
    return not isinstance(fn, type) and type(fn).__module__ in _BUILT_IN


def _names_drawing(fn: FunctionType, seen: frozenset[FunctionType] = frozenset()) -> bool:
    """Whether a Python function of torch names an operation that draws, directly or through functions it names."""
    seen |= {fn}
    if any(_is_drawing_operation(name) for name in fn.__code__.co_names):
        return True
    named = [fn.__globals__.get(name) for name in fn.__code__.co_names if name != "handle_torch_function"]
    for other in (*named, *(cell.cell_contents for cell in fn.__closure__ or ())):
        if (
            isinstance(other, FunctionType)
            and other not in seen
            and _is_of_torch(other)
            and _names_drawing(other, seen)
        ):
            return True
    return False


class NoiseSource:
    """The random stream of the guesses. It is separate from the closure's generators, so guesses do not change dropout.

    With ``seed=None`` it follows ``torch.manual_seed``: a new global seed starts a new stream.

    Attributes:
        means: for diagnostics: if True, callers replace each draw by its mean.
        guess_index: k, the number of the guess that is drawn. Each k has its own independent stream. Thus K guesses in
            one run equal K guesses in K runs.

    >>> a, b = NoiseSource(0), NoiseSource(0)
    >>> a.follow(); b.follow()
    >>> cpu = torch.device("cpu")
    >>> torch.equal(a.normal((3,), torch.float32, cpu), b.normal((3,), torch.float32, cpu))
    True
    """

    def __init__(self, seed: int | None) -> None:
        self.seed, self.means = seed, False
        self._seen: int | None = None
        self._awaited: int | None = None  # the global seed when saved: the user may restore it
        self._stream = 0
        self.guess_index = 0
        self._generators: dict[tuple[torch.device, int], torch.Generator] = {}

    def _seed_now(self) -> int:
        return torch.initial_seed() if self.seed is None else self.seed

    def follow(self) -> None:
        """Start a new stream if ``torch.manual_seed`` has been called since the last step."""
        seed = self._seed_now()
        if seed not in (self._seen, self._awaited):
            self._stream = seed
            self._generators = {}
        self._seen, self._awaited = seed, None

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of guess ``guess_index`` on a device."""
        found = self._generators.get((device, self.guess_index))
        if found is None:
            # The closure's own generator starts at the seed. Odd constants give each k another start.
            seed = (self._stream ^ 0x9E3779B97F4A7C15) + self.guess_index * 0xD1342543DE82EF95
            found = torch.Generator(device=device).manual_seed(seed & (2**63 - 1))
            self._generators[device, self.guess_index] = found
        return found

    def guess_indices(self, count: int) -> Iterator[int]:
        """Set ``guess_index`` to 0, ..., ``count - 1`` in turn, then back. For one guess, leave it as it is."""
        if count == 1:
            yield self.guess_index
            return
        before = self.guess_index
        for index in range(count):
            self.guess_index = index
            yield index
        self.guess_index = before  # after an error, ``restore`` sets it: Python may close an iterator late

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=self.generator(device))

    def uniform(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.rand(shape, dtype=dtype, device=device, generator=self.generator(device))

    def state(self) -> dict[str, Any]:
        """Plain data for ``load``: the stream's seed, the global seed, and the generators' states by device and guess
        index (``"cpu"``, ``"cpu lane 1"``)."""
        seed = self._seed_now()
        if seed not in (self._seen, self._awaited):  # the next step starts anew
            return {"stream": seed, "seed": seed, "generators": {}}
        states = {
            f"{device} lane {lane}" if lane else str(device): generator.get_state()
            for (device, lane), generator in self._generators.items()
        }
        return {"stream": self._stream, "seed": seed, "generators": states}

    def load(self, state: Mapping[str, Any], moved: Mapping[str, str] | None = None) -> list[str]:
        """Continue from a saved state. The global seed may stay as it is, or be restored before the next step
        (``torch.set_rng_state``). A later ``manual_seed`` starts a new stream.

        Args:
            state: returned by the method ``state``.
            moved: name of a device at the time of saving -> name of the device that replaces it.

        Returns:
            The devices whose generators cannot continue here. They start again from the stream's seed.

        Raises:
            ValueError: ``state`` is damaged; this object is unchanged.
        """
        new, left = NoiseSource(self.seed), []
        new._stream = state["stream"]
        for name, value in state["generators"].items():
            was, _, lane = name.partition(" lane ")
            device = torch.device((moved or {}).get(was, was))
            if device.type != torch.device(was).type or not is_here(device):
                left.append(was)
                continue
            new.guess_index = int(lane or 0)
            try:
                new.generator(device).set_state(value)
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"noise: the state of the generator {name!r} is damaged: {error}") from None
        self._seen, self._awaited = self._seed_now(), state["seed"] if self.seed is None else None
        self._stream, self._generators = new._stream, new._generators
        return list(dict.fromkeys(left))

    def snapshot(self) -> Any:
        """The stream's present state, for ``restore``."""
        states = [(k, g.get_state()) for k, g in self._generators.items()]
        return self._seen, self._awaited, self._stream, states, self.guess_index

    def restore(self, snapshot: Any) -> None:
        """Go back to a snapshot."""
        self._seen, self._awaited, self._stream, states, lane = snapshot
        self._generators = {}
        for (device, self.guess_index), state in states:
            self.generator(device).set_state(state)
        self.guess_index = lane

    def __getstate__(self) -> dict[str, Any]:
        return {"seed": self.seed, "state": self.state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["seed"])  # type: ignore[misc]
        self.load(state["state"])

    def __deepcopy__(self, memo: dict[int, Any]) -> NoiseSource:
        copied = NoiseSource(self.seed)
        copied.restore(self.snapshot())
        return copied


def is_here(device: torch.device) -> bool:
    """Whether this machine has the device.

    >>> is_here(torch.device("cpu")), is_here(torch.device("cuda:99"))
    (True, False)
    """
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        return False
    try:
        torch.Generator(device)
    except RuntimeError:
        return False
    return True
