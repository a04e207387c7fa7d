"""The quantising ops in plain PyTorch; their laws: :mod:`ditnorm.ops.quantization`."""

from torch import Tensor

from . import quantization, reference, reference_activation
from .calls_quantize import (
    DequantizeProduct,
    GeluQuantize,
    NormScaleShiftQuantize,
    Quantize,
    ScaleResidualNormScaleShiftQuantize,
    SwiGLUQuantize,
)


def quantize(call: Quantize) -> tuple[Tensor, Tensor]:
    """``(values, scale)`` as of :class:`ditnorm.ops.quantization.Quantized`."""
    return quantization.quantize(call.x, call.law)


def gelu_quantize(call: GeluQuantize) -> tuple[Tensor, Tensor]:
    """``(values, scale)`` of what ``gelu`` returns, in the dtype of ``x``."""
    return quantization.quantize(reference_activation.gelu(call.activation), call.law)


def swiglu_quantize(call: SwiGLUQuantize) -> tuple[Tensor, Tensor]:
    """``(values, scale)`` of what ``swiglu`` returns."""
    return quantization.quantize(reference_activation.swiglu(call.activation), call.law)


def norm_scale_shift_quantize(call: NormScaleShiftQuantize) -> tuple[Tensor, Tensor]:
    """``(values, scale)`` of ``y``."""
    return quantization.quantize(reference.norm_scale_shift(call.site), call.law)


def scale_residual_norm_scale_shift_quantize(call: ScaleResidualNormScaleShiftQuantize) -> tuple[Tensor, Tensor, Tensor]:
    """``(values, scale, r)``: values and scale are those of ``y``."""
    y, r = reference.scale_residual_norm_scale_shift(call.site)
    return *quantization.quantize(y, call.law), r


def norm_scale_shift_and_quantize(call: NormScaleShiftQuantize) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, values, scale)``: ``y`` itself, and its values and scale."""
    y = reference.norm_scale_shift(call.site)
    return y, *quantization.quantize(y, call.law)


def scale_residual_norm_scale_shift_and_quantize(call: ScaleResidualNormScaleShiftQuantize) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(y, values, scale, r)``: ``y`` itself, its values and scale, and ``r``."""
    y, r = reference.scale_residual_norm_scale_shift(call.site)
    return y, *quantization.quantize(y, call.law), r


def dequantize_product(call: DequantizeProduct) -> Tensor:
    """[rows, N] in ``dtype``.

    Source: the ``linear`` of torchao's ``Int8Tensor``, with ``int_scaled_matmul``.
    """
    y = (call.product * call.scale).to(call.dtype) * call.weight_scale.flatten()
    if call.bias is not None:
        y += call.bias
    return y.to(call.dtype)
