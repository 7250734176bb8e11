"""``save`` and ``load``: an optimizer and its model in one safetensors file, to continue training bit for bit.

The file's tensors are the state's tensors. The rest is JSON in the file's metadata. A value that JSON does not know is
an object with one entry, ``{kind: content}``; a tensor is ``{"tensor": {"name": ...}}``.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import secrets
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from guessopt.errors import GuessWarning
from guessopt.optimizer import GuessGradOptimizer
from guessopt.rng import RandomState, cuda_devices, is_here

#: Entries of the file's metadata. Raise the version with a change that older versions cannot read.
FORMAT, VERSION = "guessopt", 1

#: The dtypes that every version of safetensors stores; others are stored as bytes.
NATIVE = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip


def save(
    path: str | os.PathLike[str], opt: GuessGradOptimizer, model: nn.Module | None = None, *, rng: bool = True
) -> None:
    """Write a file from which training continues bit for bit. A crash at any moment leaves the old file or the new one.

    Args:
        path: of the file; replaced if it exists.
        opt: saved are the base's state, the stream of guesses, and the prepared and learned states. Options of groups
            that are no plain data (functions) are left out, with a ``GuessWarning``.
        model: if given, its ``state_dict`` is saved too.
        rng: whether to save the global random states of torch (CPU and the parameters' GPUs), numpy and ``random``.

    Raises:
        TypeError: the state holds something that is no plain data; the message says where.
        OSError: the file cannot be written; the old one is as it was.

    >>> import tempfile, torch, guessopt
    >>> path = tempfile.mkdtemp() + "/run.safetensors"
    >>> x = torch.ones(4, 3)
    >>> def start():
    ...     net = torch.nn.Linear(3, 2)
    ...     return net, guessopt.GuessGradOptimizer(net.parameters(), torch.optim.AdamW, lr=0.1)
    >>> net, opt = start()
    >>> _ = opt.step(lambda: net(x).square().mean())
    >>> guessopt.save(path, opt, net)
    >>> expected = opt.step(lambda: net(x).square().mean())
    >>> net, opt = start()
    >>> guessopt.load(path, opt, net)
    >>> torch.equal(opt.step(lambda: net(x).square().mean()), expected)
    True
    """
    _check_types(opt, model)
    state = opt.state_dict()
    groups = [dict(group) for group in state["param_groups"]]
    omitted = [[k, key] for k, group in enumerate(groups) for key, value in group.items() if not _is_plain(value)]
    for k, key in omitted:
        what = type(groups[k].pop(key)).__name__
        warnings.warn(
            f"save: option {key!r} of parameter group {k} is no plain data ({what}) and is not saved; after load it "
            "has the value of the optimizer that loads",
            GuessWarning,
            stacklevel=2,
        )
    state = {**state, "param_groups": groups, "guessopt": {**state["guessopt"], "omitted": omitted}}
    writer = _Writer()
    tree = {
        "optimizer": writer.encode(state, "optimizer"),
        "model": None if model is None else writer.encode(dict(model.state_dict()), "model"),
        "random": writer.encode(_random_states(opt), "random") if rng else None,
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "state": json.dumps(tree, allow_nan=False)}
    _replace(Path(os.path.realpath(path)), writer.tensors, metadata)


def load(
    path: str | os.PathLike[str], opt: GuessGradOptimizer, model: nn.Module | None = None, *, rng: bool = True
) -> None:
    """Read a file of ``save`` into an optimizer and a model that were built in the same way. Everything is checked
    before anything changes; after an error everything is as it was.

    Args:
        path: of the file.
        opt: built on the same parameters, with a base of the same class.
        model: if given, its state is loaded too.
        rng: whether to restore the global random states, if the file has them.

    Raises:
        ValueError: the file is not one of ``save``, is truncated or damaged, is of a newer version, or holds the state
            of another model or optimizer.
        OSError: the file cannot be read.

    >>> import tempfile, torch, guessopt
    >>> path, net = tempfile.mkdtemp() + "/run.safetensors", torch.nn.Linear(3, 2)
    >>> guessopt.save(path, guessopt.GuessGradOptimizer(net.parameters()), net)
    >>> other = torch.nn.Linear(5, 2)
    >>> guessopt.load(path, guessopt.GuessGradOptimizer(other.parameters()), other)
    Traceback (most recent call last):
    ValueError: load: weight in ... is [2, 3] torch.float32, and the model's is [2, 5] torch.float32: ...
    """
    _check_types(opt, model)
    tree = _read(path)
    states = None if tree["random"] is None or not rng else _checked(path, tree["random"])
    if model is None:
        opt.load_state_dict(tree["optimizer"])
        if tree["model"] is not None:
            warnings.warn(
                f"load: {path} also holds the model's state, which is not loaded; pass the model: load(path, opt, "
                "model)",
                GuessWarning,
                stacklevel=2,
            )
    else:
        _check_model(path, tree["model"], model)
        before = {k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in model.state_dict().items()}
        try:
            model.load_state_dict(tree["model"])
            opt.load_state_dict(tree["optimizer"])
        except BaseException:
            model.load_state_dict(before)
            raise
    if states is not None:
        states.restore()


def _check_types(opt: Any, model: Any) -> None:
    if not isinstance(opt, GuessGradOptimizer):
        raise TypeError(f"opt: expected a GuessGradOptimizer, got {type(opt).__name__}; for others use torch.save")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


# --- the file ---------------------------------------------------------------------------------------------------------


def _replace(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a temporary file beside ``path``, flush it to the disk, then replace ``path`` in one move."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save: the folder {path.parent} does not exist")
    temporary = path.with_name(f".guessopt-{secrets.token_hex(8)}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"save: {path} could not be written, and is as it was: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    with suppress(OSError):  # where a folder can be opened: its entry is safe too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"load: there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata)
            return _decoded(path, metadata, file)
    except SafetensorError as error:
        raise ValueError(
            f"load: {path} is no complete safetensors file ({error}): it is truncated, damaged, or of another kind"
        ) from error


def _decoded(path: str | os.PathLike[str], metadata: Mapping[str, str], file: Any) -> dict[str, Any]:
    try:
        tree = json.loads(metadata["state"])
        return {key: _decode(tree[key], file) for key in ("optimizer", "model", "random")}
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"load: the metadata of {path} is damaged ({type(error).__name__}: {error})") from error


def _check_metadata(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"load: {path} is a safetensors file, but not of guessopt.save (format {metadata.get('format')!r}); load "
            "weights with safetensors.torch.load_file"
        )
    version = metadata.get("version", "")
    if not version.isdecimal():
        raise ValueError(f"load: {path} has no version number ({version!r}): it is damaged")
    if int(version) > VERSION:
        raise ValueError(
            f"load: {path} has version {version}, and this guessopt reads up to {VERSION}: it was saved by a newer "
            "guessopt; upgrade with pip install -U guessopt"
        )


# --- values and JSON --------------------------------------------------------------------------------------------------


class _Writer:
    """Turns values into JSON and collects their tensors. Two tensors in the same memory are written once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[Any, str] = {}
        self._storages: set[int] = set()

    def encode(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": str(float(value))}
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value, where)}
        if isinstance(value, Mapping):
            pairs = [[self.encode(k, f"{where}/key"), self.encode(v, f"{where}/{k}")] for k, v in value.items()]
            return {"dict": pairs}
        if isinstance(value, torch.Size | tuple | list):
            items = [self.encode(item, f"{where}/{k}") for k, item in enumerate(value)]
            if type(value) is list:
                return items
            if type(value) in (tuple, torch.Size):
                return {"size" if isinstance(value, torch.Size) else "tuple": items}
        if isinstance(value, torch.dtype | torch.device):
            return {"dtype" if isinstance(value, torch.dtype) else "device": str(value).removeprefix("torch.")}
        if isinstance(value, bytes):
            return {"bytes": value.hex()}
        if isinstance(value, complex):
            return {"complex": [repr(value.real), repr(value.imag)]}
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.generic) and not value.dtype.hasobject:
            return self.encode(value.item(), where)
        if numpy is not None and isinstance(value, numpy.ndarray) and not value.dtype.hasobject:
            flat = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8) if value.size else torch.empty(0)
            return {"ndarray": [value.dtype.str, list(value.shape), self._tensor(flat, where)]}
        raise TypeError(f"save: {where} is of type {type(value).__name__}, which is no plain data and cannot be saved")

    def _tensor(self, tensor: Tensor, where: str) -> dict[str, Any]:
        t = tensor.detach()
        if type(t) is not Tensor or t.layout is not torch.strided or t.is_quantized or t.is_meta:
            kind = "on the meta device" if t.is_meta else f"{type(t).__name__}, {str(t.layout).removeprefix('torch.')}"
            raise TypeError(f"save: {where} is a tensor that safetensors cannot hold ({kind}, {t.dtype}); densify it")
        storage, stride = t.untyped_storage(), t.stride()
        key = (storage.data_ptr(), t.storage_offset(), t.shape, stride, t.dtype, t.device, t.is_conj(), t.is_neg())
        node: dict[str, Any] = {}
        dense = torch.empty_like(t, device="meta").stride() == stride
        if dense and not t.is_contiguous():
            node["stride"] = list(stride)
        if t.dtype not in NATIVE:
            node |= {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}
        if key not in self._names or not t.numel():
            name = where
            while name in self.tensors:
                name += "'"
            whole = t.resolve_conj().resolve_neg().contiguous()
            if t.dtype not in NATIVE:
                whole = _bytes(whole)
            if whole.untyped_storage().nbytes() != whole.nbytes or whole.untyped_storage().data_ptr() in self._storages:
                whole = whole.clone()  # safetensors holds no two tensors in one memory
            self._storages.add(whole.untyped_storage().data_ptr())
            self.tensors[name], self._names[key] = whole, name
        return {"name": self._names[key], **node}


def _bytes(t: Tensor) -> Tensor:
    return t.reshape(-1).view(torch.uint8)


def _is_plain(value: Any) -> bool:
    try:
        _Writer().encode(value, "")
    except TypeError:
        return False
    return True


def _decode(node: Any, file: Any) -> Any:
    if isinstance(node, list):
        return [_decode(item, file) for item in node]
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "dict":
        return {_decode(key, file): _decode(value, file) for key, value in content}
    if kind == "tuple":
        return tuple(_decode(item, file) for item in content)
    if kind == "size":
        return torch.Size(content)
    if kind == "float":
        return float(content)
    if kind == "complex":
        return complex(*map(float, content))
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "device":
        return torch.device(content)
    if kind == "tensor":
        return _decode_tensor(content, file)
    if kind == "ndarray":
        import numpy

        dtype, shape, flat = content
        return numpy.frombuffer(_decode_tensor(flat, file).numpy().tobytes(), dtype).reshape(shape).copy()
    raise TypeError(f"unknown kind {kind!r}")


def _decode_tensor(node: dict[str, Any], file: Any) -> Tensor:
    t: Tensor = file.get_tensor(node["name"])
    if "dtype" in node:
        t = t.clone().view(getattr(torch, node["dtype"])).reshape(node["shape"])
    if "stride" in node:
        t = torch.empty_strided(t.shape, node["stride"], dtype=t.dtype).copy_(t)
    return t


# --- what is checked --------------------------------------------------------------------------------------------------


def _check_model(path: str | os.PathLike[str], saved: dict[str, Any] | None, model: nn.Module) -> None:
    if saved is None:
        raise ValueError(f"load: {path} holds no model's state: it was saved without one; leave the model out")
    state, seen = model.state_dict(), dict[Any, str]()
    for keys, what in ((state.keys() - saved.keys(), "lacks"), (saved.keys() - state.keys(), "has")):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"load: {path} {what} {', '.join(sorted(keys)[:3])}{more}: it holds another model's state")
    for name, new in state.items():
        old = saved[name]
        if not isinstance(new, Tensor):
            continue
        if not isinstance(old, Tensor) or old.shape != new.shape or old.dtype != new.dtype:
            found = f"{list(old.shape)} {old.dtype}" if isinstance(old, Tensor) else type(old).__name__
            raise ValueError(
                f"load: {name} in {path} is {found}, and the model's is {list(new.shape)} {new.dtype}: it holds "
                "another model's state, or one of another dtype (model.to(dtype) first)"
            )
        memory = (new.device, new.untyped_storage().data_ptr(), new.storage_offset(), new.stride())
        tied = seen.setdefault(memory, name) if new.numel() and not new.is_meta else name
        if tied != name and not torch.equal(_bytes(saved[tied]), _bytes(old)):
            raise ValueError(f"load: {tied} and {name} are one tensor in the model, and two in {path}; untie them")


def _random_states(opt: GuessGradOptimizer) -> dict[str, Any]:
    state = RandomState.capture(cuda_devices(p for group in opt.param_groups for p in group["params"]))
    return {"torch": state.torch_cpu, "cuda": state.devices, "numpy": state.numpy, "random": state.python}


def _checked(path: str | os.PathLike[str], found: dict[str, Any]) -> RandomState:
    """The random states of the file that this machine can restore. Each is tried on a new generator first."""
    try:
        left = [index for index in found["cuda"] if not is_here(torch.device("cuda", index))]
        here = {index: state for index, state in found["cuda"].items() if index not in left}
        torch.Generator().set_state(found["torch"])
        for index, state in here.items():
            torch.Generator(torch.device("cuda", index)).set_state(state)
        random.Random().setstate(found["random"])
        if found["numpy"] is not None:
            import numpy

            numpy.random.RandomState().set_state(found["numpy"])
    except (RuntimeError, TypeError, ValueError, KeyError, OverflowError, AttributeError) as error:
        raise ValueError(f"load: the random states in {path} are damaged: {error}") from error
    if left:
        warnings.warn(
            f"load: {path} holds random states of GPUs that are not here ({', '.join(map(str, left))}); what the "
            "closure draws there is drawn anew",
            GuessWarning,
            stacklevel=3,
        )
    return RandomState(found["torch"], here, found["numpy"], found["random"])
