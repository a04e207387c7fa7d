"""The fused call of a quantised linear layer, and its comparison with the unfused expression."""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..functional import norm_scale_shift_and_quantize, norm_scale_shift_quantize, quantize
from ..ops import quantization, reference
from ..ops.bits import same_bits
from ..ops.calls import NormScaleShift
from ..ops.options import HALVES
from ..ops.quantization import Law, Quantized
from .module import upstream_of
from .sites import random_numbers

_ROWS = 2304  # that a verification quantises: enough for the kernels of many rows


@dataclass(frozen=True)
class QuantizedProduct:
    """A quantised matrix product, with a quantiser of its activation."""

    law: Law
    width: int
    out: int
    dtype: torch.dtype
    bias: bool
    body: type[Any]
    """The layer's body, a :class:`ditnorm.fused.quantized_linear.QuantizedLinear`."""
    linear: weakref.ref[Any] = field(compare=False)
    """One of the layers: which one doesn't matter, and what was verified must not keep it alive."""

    @property
    def op(self) -> str:
        return "quantize"

    @property
    def quantised(self) -> str | None:
        return str(self.law)

    @property
    def fused(self) -> bool:
        return self.dtype in HALVES

    def __str__(self) -> str:
        return f"{self.law} ({self.dtype}, {self.width} to {self.out})".replace("torch.", "")

    def same_bits(self, device: torch.device) -> bool:
        """Values and scales against the law in PyTorch, and the product against upstream's own."""
        linear, rows = self.linear(), self._rows(device)
        if not self._same_values(rows):
            return False
        if linear is None or linear.weight.device != device:
            return True  # offloaded: no weight to multiply with
        operand = self.body.operand_in(linear)
        if operand is None or operand.law is not self.law or not operand.takes(rows.shape, rows.dtype, linear.bias):
            return True
        upstream: Any = upstream_of(type(linear))
        return same_bits(self.body.multiplied(quantize(rows, self.law), linear), upstream.forward(linear, rows))

    def _rows(self, device: torch.device) -> Tensor:
        random = random_numbers(device)
        x, spread = random(_ROWS, self.width), random(_ROWS, 1)
        return (x * (2 * spread).exp()).to(self.dtype)

    def _same_values(self, rows: Tensor) -> bool:
        """Whether ``rows`` are quantised as the law in PyTorch does it, alone and behind a norm,
        with tables and without.
        """
        law = self.law
        scale, shift = rows[:2].chunk(2)
        norm: dict[str, Any] = {"norm": "layer", "eps": 1e-6, "rounding": "eager"}

        def same(found: Quantized, expected: Tensor) -> bool:
            return same_bits((found.values, found.scale), quantization.quantize(expected, law))

        def same_behind_a_norm(*tables: Tensor | None) -> bool:
            scale_table, shift_table = tables
            call = NormScaleShift(rows, scale, shift, None, None, scale_table, shift_table, None, **norm)
            expected, options = reference.norm_scale_shift(call), norm | {"scale_table": scale_table, "shift_table": shift_table}
            y, beside = norm_scale_shift_and_quantize(rows, scale, shift, law=law, **options)
            found = norm_scale_shift_quantize(rows, scale, shift, law=law, **options)
            return same(found, expected) and same(beside, expected) and same_bits(y, expected)

        return same(quantize(rows, law), rows) and same_behind_a_norm(None, None) and same_behind_a_norm(*rows[2:4].float())
