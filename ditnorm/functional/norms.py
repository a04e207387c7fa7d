"""The ops of norm sites and residuals.

Each function here and beside it spells out the same few lines. A helper would cost every call
another Python frame, and these calls run hundreds of times a step.
"""

import torch
from torch import Tensor

from .. import kernels
from ..ops.options import default_eps
from ..swapping.torch_private import any_autocast_enabled, forward_ad
from .path import NORM, REJECTED, ROUNDING, differentiable, in_pytorch, rejected, traced_by_dynamo, unfused

_norm_scale_shift = kernels.ops.norm_scale_shift.default
_scale_residual_norm_scale_shift = kernels.ops.scale_residual_norm_scale_shift.default
_scale_residual = kernels.ops.scale_residual.default


def norm_scale_shift(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    index: Tensor | None = None,
    norm: str = "layer",
    eps: float | None = None,
    rounding: str = "single",
) -> Tensor:
    """``norm(x) * (1 + scale) + shift``: an adaptive LayerNorm or RMSNorm (adaLN).

    :mod:`ditnorm.functional` has shapes, dtypes, rounding and gradients in full. Source:
    ``AdaLayerNormZero``, ``QwenImageTransformerBlock._modulate``, ``WanTransformerBlock`` in
    diffusers.

    Args:
        x: [B, S, D], or [S, D] meaning B = 1; float32, float16 or bfloat16; any strides.
        scale: [D], [B or 1, D] or [B or 1, 1, D] (per sample), [B or 1, S, D] (per token) or [B or
            1, F, 1, D] (per frame, F dividing S); with ``index`` rows [M, D] or [B or 1, M, D]. Any
            strides but a dense last dim.
        shift: as ``scale``.
        weight: the norm's own, [D].
        bias: the norm's own, [D].
        scale_table: [D], added to ``scale`` in float32.
        shift_table: [D], added to ``shift`` in float32.
        index: integer or bool, [S] or [B or 1, S]: the row of the modulations that each token
            takes.
        norm: ``"layer"``, ``"rms"``, ``"fp32_layer"`` or ``"diffusers_rms"``.
        eps: by default torch's: 1e-5 for LayerNorm, the resolution of float32 for RMSNorm.
        rounding: ``"single"`` or ``"eager"``, the bits of diffusers' own expression.

    Returns:
        The result, in the shape and dtype of ``x``, contiguous.

    Raises:
        TypeError: for the kind or dtype of an argument, which the message names.
        ValueError: for a shape, a device or a combination.
        IndexError: for an index out of range, on the CPU; elsewhere its row is NaN.

    Examples:
        >>> x, scale, shift = torch.randn(2, 16, 64), torch.randn(2, 1, 64), torch.randn(2, 1, 64)
        >>> y = ditnorm.norm_scale_shift(x, scale, shift, rounding="eager")
        >>> torch.equal(y, F.layer_norm(x, (64,)) * (1 + scale) + shift)
        True
    """
    tensors = (x, scale, shift, weight, bias, scale_table, shift_table, index)
    try:
        eps = default_eps(norm, x) if eps is None else eps
        codes = (NORM[norm], eps, ROUNDING[rounding])
        if (torch.is_grad_enabled() or any_autocast_enabled() or forward_ad._current_level >= 0) and in_pytorch(tensors, rounding, norm):
            return differentiable("norm_scale_shift", tensors, (norm, eps, rounding), codes)
        if traced_by_dynamo() and unfused("norm_scale_shift", tensors, (norm, eps, rounding)):
            return rejected("norm_scale_shift", tensors, (norm, eps, rounding))
        return _norm_scale_shift(*tensors, *codes)
    except REJECTED:
        return rejected("norm_scale_shift", tensors, (norm, eps, rounding))


def scale_residual_norm_scale_shift(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    gate_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    index: Tensor | None = None,
    norm: str = "layer",
    eps: float | None = None,
    rounding: str = "single",
) -> tuple[Tensor, Tensor]:
    """``r = residual + gate * x`` and ``norm(r) * (1 + scale) + shift``: what stands between two
    sub-layers of a block.

    :mod:`ditnorm.functional` has shapes, dtypes, rounding and gradients in full. Source: the middle
    of ``QwenImageTransformerBlock``, ``WanTransformerBlock``, ``HunyuanVideoTransformerBlock`` in
    diffusers.

    Args:
        residual: the shape of ``x``; float32, float16 or bfloat16; any strides.
        x: [B, S, D], or [S, D] meaning B = 1; float32, float16 or bfloat16; any strides.
        gate: as ``scale``.
        scale: [D], [B or 1, D] or [B or 1, 1, D] (per sample), [B or 1, S, D] (per token) or [B or
            1, F, 1, D] (per frame, F dividing S); with ``index`` rows [M, D] or [B or 1, M, D]. Any
            strides but a dense last dim.
        shift: as ``scale``.
        weight: the norm's own, [D].
        bias: the norm's own, [D].
        gate_table: [D], added to ``gate`` in float32.
        scale_table: [D], added to ``scale`` in float32.
        shift_table: [D], added to ``shift`` in float32.
        index: integer or bool, [S] or [B or 1, S]: the row of the modulations that each token
            takes.
        norm: ``"layer"``, ``"rms"``, ``"fp32_layer"`` or ``"diffusers_rms"``.
        eps: by default torch's: 1e-5 for LayerNorm, the resolution of float32 for RMSNorm.
        rounding: ``"single"`` or ``"eager"``, the bits of diffusers' own expression.

    Returns:
        ``(y, r)``: the normed and modulated stream, in the dtype of ``x``, and the stream itself,
        in the dtype of ``residual``, both contiguous.

    Raises:
        TypeError: for the kind or dtype of an argument, which the message names.
        ValueError: for a shape, a device or a combination.
        IndexError: for an index out of range, on the CPU; elsewhere its row is NaN.

    Examples:
        >>> residual, x = torch.randn(2, 2, 16, 64).unbind()
        >>> gate, scale, shift = torch.randn(3, 2, 1, 64).unbind()
        >>> y, r = ditnorm.scale_residual_norm_scale_shift(
        ...     residual, x, gate, scale, shift, norm="rms", rounding="eager"
        ... )
        >>> torch.equal(r, residual + gate * x)
        True
        >>> torch.equal(y, F.rms_norm(r, (64,)) * (1 + scale) + shift)
        True
    """
    tensors = (residual, x, gate, scale, shift, weight, bias, gate_table, scale_table, shift_table, index)
    try:
        eps = default_eps(norm, x) if eps is None else eps
        codes = (NORM[norm], eps, ROUNDING[rounding])
        if (torch.is_grad_enabled() or any_autocast_enabled() or forward_ad._current_level >= 0) and in_pytorch(tensors, rounding, norm):
            return differentiable("scale_residual_norm_scale_shift", tensors, (norm, eps, rounding), codes)
        if traced_by_dynamo() and unfused("scale_residual_norm_scale_shift", tensors, (norm, eps, rounding)):
            return rejected("scale_residual_norm_scale_shift", tensors, (norm, eps, rounding))
        return _scale_residual_norm_scale_shift(*tensors, *codes)
    except REJECTED:
        return rejected("scale_residual_norm_scale_shift", tensors, (norm, eps, rounding))


def scale_residual(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None = None,
    *,
    gate_table: Tensor | None = None,
    index: Tensor | None = None,
    rounding: str = "single",
) -> Tensor:
    """``residual + gate * x``: the end of a block.

    :mod:`ditnorm.functional` has shapes, dtypes, rounding and gradients in full. Source: the end of
    every transformer block in diffusers.

    Args:
        residual: the shape of ``x``; float32, float16 or bfloat16; any strides.
        x: [B, S, D], or [S, D] meaning B = 1; float32, float16 or bfloat16; any strides.
        gate: [D], [B or 1, D] or [B or 1, 1, D] (per sample), [B or 1, S, D] (per token) or [B or
            1, F, 1, D] (per frame, F dividing S); with ``index`` rows [M, D] or [B or 1, M, D].
        gate_table: [D], added to ``gate`` in float32.
        index: integer or bool, [S] or [B or 1, S]: the row of the gate that each token takes.
        rounding: ``"single"`` or ``"eager"``, the bits of diffusers' own expression.

    Returns:
        The sum, in the shape of ``x`` and the dtype of ``residual``, contiguous.

    Raises:
        TypeError: for the kind or dtype of an argument, which the message names.
        ValueError: for a shape, a device or a combination.
        IndexError: for an index out of range, on the CPU; elsewhere its row is NaN.

    Examples:
        >>> residual, x = torch.randn(2, 2, 16, 64).unbind()
        >>> gates, row = torch.randn(2, 64), torch.arange(16) >= 4
        >>> r = ditnorm.scale_residual(residual, x, gates, index=row)
        >>> torch.testing.assert_close(r, residual + gates[row.long()] * x)
    """
    tensors = (residual, x, gate, gate_table, index)
    try:
        codes = (ROUNDING[rounding],)
        if (torch.is_grad_enabled() or forward_ad._current_level >= 0) and in_pytorch(tensors):
            return differentiable("scale_residual", tensors, (rounding,), codes)
        if traced_by_dynamo() and unfused("scale_residual", tensors, (rounding,)):
            return rejected("scale_residual", tensors, (rounding,))
        return _scale_residual(*tensors, *codes)
    except REJECTED:
        return rejected("scale_residual", tensors, (rounding,))
