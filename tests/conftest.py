"""Shared by all tests: fixed random states, and a torchvision that imports beside a CPU-only torch."""

import gc
import random
import sys
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest
import torch


def _declare_torchvision_operators() -> torch.library.Library | None:
    """Declare the two schemas that the registry's (CUDA) torchvision looks up and a CPU-only torch does not have.

    Wheels from PyTorch's own index say "+cpu" or "+cu..." and bring their operators along.
    """
    try:
        cuda_build = "+" not in version("torchvision") and sys.platform == "linux"
    except PackageNotFoundError:
        return None
    if torch.version.cuda is not None or not cuda_build:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_TORCHVISION = _declare_torchvision_operators()  # the declarations live as long as this object


# Problems here are tiny: a second thread would only make the first one wait, all the more on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def pytest_collection_finish() -> None:
    """Exclude all objects that the imports made from garbage collection. Collections in the tests are then fast."""
    gc.freeze()
