"""Calls in a new process, which starts with nothing allocated; and a file to which every result is written at once."""

from __future__ import annotations

import argparse
import gc
import json
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.report import write_json
from guessopt import GuessWarning

Task = tuple[Callable[..., Any], tuple[Any, ...]]


def fresh(function: Callable[..., Any], *args: Any) -> Any:
    """The function's result, from a new process. Raises ``BrokenProcessPool`` if that process dies."""
    context = get_context("forkserver")
    context.set_forkserver_preload([function.__module__, "torch._dynamo"])  # imported once, nothing run
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_alone, function, args).result()


def _alone(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    gc.freeze()  # collections skip all that was imported
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore", GuessWarning)  # the guess of a site does not matter for memory
    return function(*args)


def collect(path: Path, args: argparse.Namespace, settings: Mapping[str, Any], tasks: Mapping[str, Task]) -> Any:
    """Result by task. Each is a dataclass, returned as a dict.

    Every task runs in a new process, and ``path`` is written after every result. Results that the file has from the
    same settings are taken from it.
    """
    found: dict[str, Any] = {}
    if path.is_file() and not args.fresh:
        content = json.loads(path.read_text())
        if content["settings"] == settings:
            found = content["figures"]
    missing = [name for name in tasks if name not in found]
    if len(missing) < len(tasks):
        print(f"{len(tasks) - len(missing)} finished measurements taken from {path} (--fresh makes them again)")
    for name in tqdm(missing, unit="measurement", leave=False, disable=None):
        function, arguments = tasks[name]
        found[name] = asdict(fresh(function, *arguments))
        write_json(path, args, seeds=[0], settings=settings, figures=found)
    return {name: found[name] for name in tasks}
