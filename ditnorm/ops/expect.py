"""What checks demand of an argument, as errors that name it, what it got and what it accepts.

``TypeError`` is raised for kinds and dtypes, ``ValueError`` for values, shapes and devices.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def option(name: str, value: object, accepted: tuple[str, ...]) -> None:
    """Demands one of the names ``accepted``."""
    if value not in accepted:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, accepted))}, got {value!r}")


def eps(value: object) -> None:
    """Demands a number."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"eps: expected a float, got {type(value).__name__}")


def tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> None:
    """Demands a tensor of one of the ``dtypes``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {value.dtype}")


def rows(x: Tensor) -> None:
    """Demands of ``x`` that it is [B, S, D] or [S, D]."""
    if x.dim() not in (2, 3) or x.shape[-1] < 1:
        raise ValueError(f"x: expected shape [B, S, D] or [S, D] with D >= 1, got {shape_of(x)}")


def devices(tensors: Mapping[str, Any], first: Tensor, of: str) -> None:
    """Demands the device of ``first``, which is called ``of``."""
    # Without this, one meta tensor sends a CPU call to the fake kernel.
    # What that returns is uninitialised memory.
    for name, t in tensors.items():
        if isinstance(t, Tensor) and t.device != first.device:
            raise ValueError(f"{name}: expected the device of {of}, {first.device}, got {t.device}")


def gradients(given: Mapping[str, Any], of: Tensor) -> None:
    """Demands of gradients, or None, the shape, dtype and device of the tensor that they are of."""
    for name, gradient in given.items():
        if gradient is None:
            continue
        tensor(name, gradient, (of.dtype,))
        if gradient.shape != of.shape:
            raise ValueError(f"{name}: expected shape {shape_of(of)}, got {shape_of(gradient)}")
    devices(given, of, "its tensor")


def shape_of(t: Tensor) -> str:
    """As messages write it."""
    return str(list(t.shape))
