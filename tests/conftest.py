"""What every test shares: the device, the seed, and the rule for tests that need a GPU."""

import gc

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """``"cuda"`` where there is a GPU, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


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
