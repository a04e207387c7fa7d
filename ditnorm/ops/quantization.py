"""Quantising what a linear layer reads: one law a quantiser, each with its reference.

    scale = amax(|x|) / (the largest value of the dtype)        of each row of x, or of all of it
    value = x / scale, rounded to the dtype

The laws are those of quantisers that models are loaded with, rounding for rounding, on the CPU and
on CUDA: an activation quantised here has the bits of the one that the quantiser makes itself. A row
of zeros has the scale 0 and its float8 values are NaN where the quantiser's are.

Sources: torchao 0.18 (``Float8Tensor.from_hp`` without MSLK, ``Int8Tensor.from_hp``);
``BFLFP8RLinear`` in diffusers 0.42.1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_FLOAT8_MAX = 448.0
FLOAT8_CAPABILITY = (8, 9)
"""The lowest compute capability of GPUs that have float8."""
_INT8_MAX = 127.5
_INT8_EPS = torch.finfo(torch.float32).eps
_BFL_EPS = 1e-12


@dataclass(frozen=True, eq=False)
class Law:
    """A way of quantising an activation. ``per_row``: whether each row has a scale of its own; else
    there is one for all.
    """

    name: str
    dtype: torch.dtype
    per_row: bool
    scale: Callable[[Tensor], Tensor]
    """amax(|x|), in the dtype of x -> the scale, float32."""
    round: Callable[[Tensor, Tensor], Tensor]
    """x and the scale -> the values."""

    def __str__(self) -> str:
        return self.name


class Quantized(NamedTuple):
    """An activation as a quantised linear layer reads it."""

    values: Tensor
    """[rows, D], contiguous."""
    scale: Tensor
    """float32, [rows, 1] or, of a law that isn't per row, [1, 1]."""
    shape: torch.Size
    """Of the activation, [..., D]."""
    dtype: torch.dtype
    """Of the activation."""
    law: Law

    @property
    def device(self) -> torch.device:
        return self.values.device


@dataclass(frozen=True, eq=False)
class Beside:
    """In place of a law: an activation is wanted as it is, with what it was quantised to attached
    to it (:func:`attach`), since only some of its readers take it quantised.
    """

    law: Law


Wanted = Law | Beside
"""How the readers of an activation take it."""


def attach(x: Tensor, quantized: Quantized) -> Tensor:
    """Attaches to ``x`` what it was quantised to, for whoever is given this very object. Returns
    ``x``.
    """
    setattr(x, _ATTACHED, (_version(x), quantized))
    return x


def attached(x: Tensor, law: Law) -> Quantized | None:
    """What ``x`` was quantised to by ``law``, if that was attached to it and nobody has written to
    ``x`` since.
    """
    found = getattr(x, _ATTACHED, None)
    return found[1] if found is not None and found[1].law is law and found[0] == _version(x) else None


_ATTACHED = "_ditnorm_quantized"


def _version(x: Tensor) -> int | None:
    """A number that changes when somebody writes to ``x``. None in inference mode, where PyTorch
    doesn't count that.
    """
    return None if x.is_inference() else x._version


def quantize(x: Tensor, law: Law) -> tuple[Tensor, Tensor]:
    """``(values, scale)`` of ``x`` [..., D], as of :class:`Quantized`."""
    rows = x.reshape(-1, x.shape[-1])
    amax = rows.abs().amax(dim=-1, keepdim=True) if law.per_row else rows.abs().amax().view(1, 1)
    scale = law.scale(amax)
    return law.round(rows, scale).contiguous(), scale


def _float8_scale(amax: Tensor) -> Tensor:
    return (amax / _FLOAT8_MAX).float()


def _bfl_scale(amax: Tensor) -> Tensor:
    return (amax.float() / _FLOAT8_MAX).clamp(min=_BFL_EPS)


def _int8_scale(amax: Tensor) -> Tensor:
    return (amax / _INT8_MAX).clamp(min=_INT8_EPS).float()


def _to_float8(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() / scale).clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(torch.float8_e4m3fn)


def _to_int8(x: Tensor, scale: Tensor) -> Tensor:
    return (x * (1.0 / scale)).round().clamp(-128, 127).to(torch.int8)


FLOAT8_ROW = Law("float8-row", torch.float8_e4m3fn, True, _float8_scale, _to_float8)
FLOAT8_TENSOR = Law("float8-tensor", torch.float8_e4m3fn, False, _float8_scale, _to_float8)
INT8_ROW = Law("int8-row", torch.int8, True, _int8_scale, _to_int8)
FLOAT8_ROW_BFL = Law("float8-row-bfl", torch.float8_e4m3fn, True, _bfl_scale, _to_float8)

LAWS = (FLOAT8_ROW, FLOAT8_TENSOR, INT8_ROW, FLOAT8_ROW_BFL)
"""By the number that the ops know them by: ``quantize.cuh`` has the same order."""

BESIDE = {law: Beside(law) for law in LAWS}

CODES = {law: code for code, law in enumerate(LAWS)}
