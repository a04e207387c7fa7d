"""The ops that quantise what a linear layer reads, and the one that makes numbers of an int8
product.

``law`` says how: it is one of :data:`ditnorm.ops.quantization.LAWS`. None of these ops is
differentiable. Errors are those of :mod:`ditnorm.functional`; besides, float8 needs a GPU of
compute capability 8.9 (``ValueError``).
"""

from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..ops.options import default_eps
from ..ops.quantization import CODES, Law, Quantized
from ..swapping.torch_private import without_frame
from .norms import norm_scale_shift, scale_residual_norm_scale_shift
from .path import HALF, NORM, REJECTED, ROUNDING, needs_pytorch, rejected, traced_by_dynamo

_quantize = kernels.ops.quantize.default
_quantize_in_eager = without_frame(_quantize)
_gelu_quantize = kernels.ops.gelu_quantize.default
_swiglu_quantize = kernels.ops.swiglu_quantize.default
_dequantize_product = kernels.ops.dequantize_product.default
_dequantize_product_in_eager = without_frame(_dequantize_product)
_norm_scale_shift_quantize = kernels.ops.norm_scale_shift_quantize.default
_scale_residual_norm_scale_shift_quantize = kernels.ops.scale_residual_norm_scale_shift_quantize.default
_norm_scale_shift_and_quantize = kernels.ops.norm_scale_shift_and_quantize.default
_scale_residual_norm_scale_shift_and_quantize = kernels.ops.scale_residual_norm_scale_shift_and_quantize.default


def quantize(x: Tensor, law: Law) -> Quantized:
    """``x`` [..., D], float32, float16 or bfloat16, as a linear layer with quantised weights reads
    it.

    Source: torchao's ``Float8Tensor.from_hp`` and ``Int8Tensor.from_hp``.
    """
    values, scale = values_and_scale(x, law)
    return Quantized(values, scale, x.shape, x.dtype, law)


def values_and_scale(x: Tensor, law: Law) -> tuple[Tensor, Tensor]:
    """:func:`quantize` without its structure, which costs a caller that needs none too much: the
    values [rows, D] and their scale, [rows, 1] or [1, 1].
    """
    rows = x if x.dim() <= 3 else x.flatten(0, -2)
    op = _quantize if traced_by_dynamo() else _quantize_in_eager
    try:
        values, scale = op(rows, CODES[law])
    except REJECTED:
        values, scale = rejected("quantize", (rows,), (law,))
    return values, scale


def norm_scale_shift_quantize(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    law: Law,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    index: Tensor | None = None,
    norm: str = "layer",
    eps: float | None = None,
    rounding: str = "single",
) -> Quantized:
    """:func:`norm_scale_shift` and then :func:`quantize`, in one call."""
    tensors = (x, scale, shift, weight, bias, scale_table, shift_table, index)
    try:
        if not needs_pytorch(tensors, rounding):
            codes = (NORM[norm], default_eps(norm, x) if eps is None else eps, ROUNDING[rounding], CODES[law])
            values, row_scale = _norm_scale_shift_quantize(*tensors, *codes)
            return Quantized(values, row_scale, x.shape, x.dtype, law)
    except REJECTED:
        pass  # one of the two ops says what is wrong with the call
    options: dict[str, Any] = {"weight": weight, "bias": bias, "scale_table": scale_table, "shift_table": shift_table, "index": index}
    return quantize(norm_scale_shift(x, scale, shift, **options, norm=norm, eps=eps, rounding=rounding), law)


def scale_residual_norm_scale_shift_quantize(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    law: Law,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    index: Tensor | None = None,
    norm: str = "layer",
    eps: float | None = None,
    rounding: str = "single",
) -> tuple[Quantized, Tensor]:
    """``(y, r)`` of :func:`scale_residual_norm_scale_shift`, with ``y`` quantised as by
    :func:`quantize`.
    """
    tensors = (residual, x, gate, scale, shift, weight, bias, gate_table, scale_table, shift_table, index)
    try:
        if not needs_pytorch(tensors, rounding):
            codes = (NORM[norm], default_eps(norm, x) if eps is None else eps, ROUNDING[rounding], CODES[law])
            values, row_scale, r = _scale_residual_norm_scale_shift_quantize(*tensors, *codes)
            return Quantized(values, row_scale, x.shape, x.dtype, law), r
    except REJECTED:
        pass  # one of the two ops says what is wrong with the call
    options: dict[str, Any] = {"weight": weight, "bias": bias, "gate_table": gate_table, "scale_table": scale_table}
    options |= {"shift_table": shift_table, "index": index, "norm": norm, "eps": eps, "rounding": rounding}
    y, r = scale_residual_norm_scale_shift(residual, x, gate, scale, shift, **options)
    return quantize(y, law), r


def norm_scale_shift_and_quantize(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    law: Law,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    index: Tensor | None = None,
    norm: str = "layer",
    eps: float | None = None,
    rounding: str = "single",
) -> tuple[Tensor, Quantized]:
    """``(y, quantised)``: ``y`` of :func:`norm_scale_shift`, and :func:`quantize` of it. It serves
    sites whose result is also read as it is, by adapters.
    """
    tensors = (x, scale, shift, weight, bias, scale_table, shift_table, index)
    try:
        if not needs_pytorch(tensors, rounding):
            codes = (NORM[norm], default_eps(norm, x) if eps is None else eps, ROUNDING[rounding], CODES[law])
            y, values, row_scale = _norm_scale_shift_and_quantize(*tensors, *codes)
            return y, Quantized(values, row_scale, x.shape, x.dtype, law)
    except REJECTED:
        pass  # one of the two ops says what is wrong with the call
    options: dict[str, Any] = {"weight": weight, "bias": bias, "scale_table": scale_table, "shift_table": shift_table, "index": index}
    y = norm_scale_shift(x, scale, shift, **options, norm=norm, eps=eps, rounding=rounding)
    return y, quantize(y, law)


def scale_residual_norm_scale_shift_and_quantize(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    law: Law,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    index: Tensor | None = None,
    norm: str = "layer",
    eps: float | None = None,
    rounding: str = "single",
) -> tuple[Tensor, Quantized, Tensor]:
    """``(y, quantised, r)``: ``(y, r)`` of :func:`scale_residual_norm_scale_shift`, and
    :func:`quantize` of ``y``.
    """
    tensors = (residual, x, gate, scale, shift, weight, bias, gate_table, scale_table, shift_table, index)
    try:
        if not needs_pytorch(tensors, rounding):
            codes = (NORM[norm], default_eps(norm, x) if eps is None else eps, ROUNDING[rounding], CODES[law])
            y, values, row_scale, r = _scale_residual_norm_scale_shift_and_quantize(*tensors, *codes)
            return y, Quantized(values, row_scale, x.shape, x.dtype, law), r
    except REJECTED:
        pass  # one of the two ops says what is wrong with the call
    options: dict[str, Any] = {"weight": weight, "bias": bias, "gate_table": gate_table, "scale_table": scale_table}
    options |= {"shift_table": shift_table, "index": index, "norm": norm, "eps": eps, "rounding": rounding}
    y, r = scale_residual_norm_scale_shift(residual, x, gate, scale, shift, **options)
    return y, quantize(y, law), r


def gelu_quantize(x: Tensor, law: Law, beside: Tensor | None = None) -> Quantized:
    """:func:`gelu` and then :func:`quantize`, in one call. Without ``beside``, ``x`` may have any
    number of dims.
    """
    rows = x if x.dim() <= 3 or beside is not None else x.flatten(0, -2)
    try:
        values, scale = _gelu_quantize(rows, beside, CODES[law])
    except REJECTED:
        values, scale = rejected("gelu_quantize", (rows, beside), (law,))
    return Quantized(values, scale, torch.Size((*x.shape[:-1], values.shape[-1])), x.dtype, law)


def swiglu_quantize(x: Tensor, value: Tensor, law: Law, beside: Tensor | None = None, *, rounding: str = "single") -> Quantized:
    """:func:`swiglu` and then :func:`quantize`, in one call."""
    try:
        values, scale = _swiglu_quantize(x, value, beside, ROUNDING[rounding], CODES[law])
    except REJECTED:
        values, scale = rejected("swiglu_quantize", (x, value, beside), (rounding, law))
    return Quantized(values, scale, torch.Size((*x.shape[:-1], values.shape[-1])), x.dtype, law)


def dequantize_product(product: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``product * scale * weight_scale + bias``, what an int8 matrix product stands for: [rows, N]
    in ``dtype``, which is float16 or bfloat16.

    ``product`` is int32 [rows, N], ``scale`` float32 [rows, 1], ``weight_scale`` float32 [N, 1],
    and ``bias`` [N] in ``dtype`` or None; all are contiguous.

    Source: the ``linear`` of torchao's ``Int8Tensor``.
    """
    op = _dequantize_product if traced_by_dynamo() else _dequantize_product_in_eager
    try:
        return op(product, scale, weight_scale, bias, HALF[dtype])
    except REJECTED:
        return rejected("dequantize_product", (product, scale, weight_scale, bias), (dtype,))
