"""Tables and headers of what the scripts print."""

import platform
import sys
from collections.abc import Sequence

import diffusers
import torch

import ditnorm
from ditnorm import kernels


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to one width; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def environment(device: torch.device) -> dict[str, str]:
    """The device and the versions that results depend on."""
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "ditnorm": ditnorm.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
    if "torchao" in sys.modules:
        found["torchao"] = sys.modules["torchao"].__version__
    if device.type == "cuda":
        found["kernels"] = "CUDA" if kernels.unavailable is None else f"none: {kernels.unavailable}"
    return found


def environment_line(device: torch.device) -> str:
    """:func:`environment` in one line."""
    found = environment(device)
    return f"{found['device']}; torch {found['torch']}, diffusers {found['diffusers']}, Python {found['python']}"
