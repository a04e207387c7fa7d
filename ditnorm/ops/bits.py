"""Tensors as their bits: NaN is equal to itself, and 0 isn't to -0."""

from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t: Tensor) -> Tensor:
    """A view as integers of the same size, of the same shape."""
    return t.view(_INTEGERS[t.element_size()])


def same_bits(got: Any, expected: Any) -> bool:
    """Whether the results of two calls are equal bit for bit."""
    pairs = [(got, expected)] if isinstance(got, Tensor) else list(zip(got, expected, strict=True))
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
