"""The arguments of the quantising ops, as in :mod:`ditnorm.ops.calls`."""

from typing import NamedTuple

from torch import Tensor

from .calls import Gelu, NormScaleShift, ScaleResidualNormScaleShift, SwiGLU
from .options import Half, Norm, Quantiser, Rounding


class Quantize(NamedTuple):
    """``x`` [..., D] quantised."""

    x: Tensor
    law: Quantiser


class GeluQuantize(NamedTuple):
    """:class:`Gelu`, quantised."""

    x: Tensor
    beside: Tensor | None
    law: Quantiser

    @property
    def activation(self) -> Gelu:
        """What is quantised. (It has one law of rounding.)"""
        return Gelu(self.x, self.beside, "eager")


class SwiGLUQuantize(NamedTuple):
    """:class:`SwiGLU`, quantised."""

    x: Tensor
    value: Tensor
    beside: Tensor | None
    rounding: Rounding
    law: Quantiser

    @property
    def activation(self) -> SwiGLU:
        """What is quantised."""
        return SwiGLU(*self[:-1])


class DequantizeProduct(NamedTuple):
    """What an int8 matrix product [rows, N] stands for: ``product * scale * weight_scale +
    bias``.
    """

    product: Tensor
    scale: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    dtype: Half


class NormScaleShiftQuantize(NamedTuple):
    """:class:`NormScaleShift`, quantised."""

    x: Tensor
    scale: Tensor | None
    shift: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    scale_table: Tensor | None
    shift_table: Tensor | None
    index: Tensor | None  # type: ignore[assignment]
    norm: Norm
    eps: float
    rounding: Rounding
    law: Quantiser

    @property
    def site(self) -> NormScaleShift:
        """What is quantised."""
        return NormScaleShift(*self[:-1])


class ScaleResidualNormScaleShiftQuantize(NamedTuple):
    """:class:`ScaleResidualNormScaleShift`, its ``y`` quantised."""

    residual: Tensor
    x: Tensor
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    gate_table: Tensor | None
    scale_table: Tensor | None
    shift_table: Tensor | None
    index: Tensor | None  # type: ignore[assignment]
    norm: Norm
    eps: float
    rounding: Rounding
    law: Quantiser

    @property
    def site(self) -> ScaleResidualNormScaleShift:
        """What is quantised."""
        return ScaleResidualNormScaleShift(*self[:-1])


QuantizedSiteCall = NormScaleShiftQuantize | ScaleResidualNormScaleShiftQuantize
QuantizedActivationCall = GeluQuantize | SwiGLUQuantize
