"""The ops of blocks that norm a branch before they add it to the stream (sandwich norm)."""

import torch
from torch import Tensor

from .. import kernels
from ..swapping.torch_private import forward_ad
from .path import REJECTED, ROUNDING, differentiable, in_pytorch, rejected, traced_by_dynamo, unfused

_norm_scale_residual = kernels.ops.norm_scale_residual.default
_norm_scale_residual_norm_scale_shift = kernels.ops.norm_scale_residual_norm_scale_shift.default


def norm_scale_residual(
    residual: Tensor,
    x: Tensor,
    x_weight: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    index: Tensor | None = None,
    eps: float = 1e-5,
    rounding: str = "single",
) -> Tensor:
    """``residual + gate * norm(x)``, the norm being diffusers' ``RMSNorm``.

    :mod:`ditnorm.functional` has shapes, dtypes, rounding and gradients in full. Source: the end of
    ``ZImageTransformerBlock`` in diffusers.

    Args:
        residual: the shape of ``x``; float32, float16 or bfloat16; any strides.
        x: [B, S, D], or [S, D] meaning B = 1; float32, float16 or bfloat16; any strides.
        x_weight: the norm's own, [D].
        gate: as of :func:`scale_residual`.
        index: integer or bool, [S] or [B or 1, S]: the row of the gate that each token takes.
        eps: of the norm.
        rounding: ``"single"`` or ``"eager"``, the bits of diffusers' own expression.

    Returns:
        The sum, in the shape of ``x`` and the dtype of ``residual``, contiguous.

    Raises:
        TypeError: for the kind or dtype of an argument, which the message names.
        ValueError: for a shape, a device or a combination.
        IndexError: for an index out of range, on the CPU; elsewhere its row is NaN.

    Examples:
        >>> residual, x = torch.randn(2, 2, 16, 64).unbind()
        >>> weight, gate = torch.randn(64), torch.randn(64)
        >>> r = functional.norm_scale_residual(residual, x, weight, gate)
        >>> torch.testing.assert_close(r, residual + gate * F.rms_norm(x, (64,), weight, 1e-5))
    """
    tensors, options = (residual, x, x_weight, gate, index), (eps, rounding)
    try:
        codes = (eps, ROUNDING[rounding])
        if (torch.is_grad_enabled() or forward_ad._current_level >= 0) and in_pytorch(tensors):
            return differentiable("norm_scale_residual", tensors, options, codes)
        if traced_by_dynamo() and unfused("norm_scale_residual", tensors, options):
            return rejected("norm_scale_residual", tensors, options)
        return _norm_scale_residual(*tensors, *codes)
    except REJECTED:
        return rejected("norm_scale_residual", tensors, options)


def norm_scale_residual_norm_scale_shift(
    residual: Tensor,
    x: Tensor,
    x_weight: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    index: Tensor | None = None,
    eps: float = 1e-5,
    rounding: str = "single",
) -> tuple[Tensor, Tensor]:
    """``r = residual + gate * norm(x)`` and ``norm(r) * (1 + scale) + shift``, both norms being
    diffusers' ``RMSNorm`` with one ``eps``.

    :mod:`ditnorm.functional` has shapes, dtypes, rounding and gradients in full. Source: the middle
    of ``ZImageTransformerBlock``, ``Lumina2TransformerBlock`` in diffusers.

    Args:
        residual: the shape of ``x``; float32, float16 or bfloat16; any strides.
        x: [B, S, D], or [S, D] meaning B = 1; float32, float16 or bfloat16; any strides.
        x_weight: of the norm of ``x``, [D].
        gate: as ``scale``.
        scale: [D], [B or 1, D] or [B or 1, 1, D] (per sample), [B or 1, S, D] (per token) or [B or
            1, F, 1, D] (per frame, F dividing S); with ``index`` rows [M, D] or [B or 1, M, D]. Any
            strides but a dense last dim.
        shift: as ``scale``.
        weight: of the norm of ``r``, [D].
        index: integer or bool, [S] or [B or 1, S]: the row of the modulations that each token
            takes.
        eps: of both norms.
        rounding: ``"single"`` or ``"eager"``, the bits of diffusers' own expression.

    Returns:
        ``(y, r)``, in the dtypes of ``x`` and ``residual``, contiguous.

    Raises:
        TypeError: for the kind or dtype of an argument, which the message names.
        ValueError: for a shape, a device or a combination.
        IndexError: for an index out of range, on the CPU; elsewhere its row is NaN.

    Examples:
        >>> residual, x = torch.randn(2, 2, 16, 64).unbind()
        >>> gate, scale = torch.randn(2, 64).unbind()
        >>> y, r = functional.norm_scale_residual_norm_scale_shift(residual, x, None, gate, scale)
        >>> torch.testing.assert_close(r, residual + gate * F.rms_norm(x, (64,), eps=1e-5))
        >>> torch.testing.assert_close(y, F.rms_norm(r, (64,), eps=1e-5) * (1 + scale))
    """
    tensors, options = (residual, x, x_weight, gate, scale, shift, weight, index), (eps, rounding)
    try:
        codes = (eps, ROUNDING[rounding])
        if (torch.is_grad_enabled() or forward_ad._current_level >= 0) and in_pytorch(tensors):
            return differentiable("norm_scale_residual_norm_scale_shift", tensors, options, codes)
        if traced_by_dynamo() and unfused("norm_scale_residual_norm_scale_shift", tensors, options):
            return rejected("norm_scale_residual_norm_scale_shift", tensors, options)
        return _norm_scale_residual_norm_scale_shift(*tensors, *codes)
    except REJECTED:
        return rejected("norm_scale_residual_norm_scale_shift", tensors, options)
