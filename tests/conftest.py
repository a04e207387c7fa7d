"""What every test shares: the device, the seed, and the rule for tests that need a GPU."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module


@pytest.fixture(scope="session")
def device() -> str:
    """``"cuda"`` where there is a GPU, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_hook_is_left() -> Iterator[None]:
    """None of those that PyTorch calls for every module."""
    call = nn.Module.__call__
    yield
    nn.Module.__call__ = call
    torch_module._global_forward_hooks.clear()
    torch_module._global_forward_pre_hooks.clear()
    torch_module._global_backward_hooks.clear()
    torch_module._global_backward_pre_hooks.clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked ``gpu`` on a machine without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish() -> None:
    """Takes what was imported out of the garbage collector's sight: half a million objects, which
    every full collection and every unpatching would look through.
    """
    gc.collect()
    gc.freeze()
