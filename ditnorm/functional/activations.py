"""The ops of activations."""

import torch
from torch import Tensor

from .. import kernels
from ..swapping.torch_private import forward_ad
from .path import REJECTED, ROUNDING, differentiable, in_pytorch, rejected, traced_by_dynamo, unfused

_gelu = kernels.ops.gelu.default
_swiglu = kernels.ops.swiglu.default


def gelu(x: Tensor, beside: Tensor | None = None, *, rounding: str = "single") -> Tensor:
    """GELU of ``x``, in its tanh approximation (arXiv:1606.08415), behind ``beside`` along the last
    dim: attention's result and the MLP's in one buffer, as the last linear layer of a block
    reads them.

    The two rounding laws agree here, and on CUDA they have the bits of PyTorch's GELU. The call is
    fused where all tensors have one dtype: float32, float16 or bfloat16. For gradients see
    :mod:`ditnorm.functional`. Source: ``FluxSingleTransformerBlock``,
    ``HunyuanVideoSingleTransformerBlock`` in diffusers.

    Args:
        x: [B, S, D] or [S, D]; any strides: chunks of a fused projection are read in place.
        beside: None, or [B, S, D'] or [S, D'].
        rounding: ``"single"`` or ``"eager"``.

    Returns:
        [B, S, D' + D], contiguous, in the dtype of ``x``.

    Raises:
        TypeError: for the kind or dtype of an argument, which the message names.
        ValueError: for a shape, a device or a combination.

    Examples:
        >>> attention, hidden = torch.randn(2, 16, 64), torch.randn(2, 16, 256)
        >>> both = functional.gelu(hidden, attention)
        >>> expected = torch.cat([attention, F.gelu(hidden, approximate="tanh")], dim=-1)
        >>> torch.equal(both, expected)
        True
    """
    tensors = (x, beside)
    try:
        code = ROUNDING[rounding]
        if (torch.is_grad_enabled() or forward_ad._current_level >= 0) and in_pytorch(tensors):
            return differentiable("gelu", tensors, (rounding,), (code,))
        if traced_by_dynamo() and unfused("gelu", tensors, (rounding,)):
            return rejected("gelu", tensors, (rounding,))
        return _gelu(*tensors, code)
    except REJECTED:
        return rejected("gelu", tensors, (rounding,))


def swiglu(x: Tensor, value: Tensor, beside: Tensor | None = None, *, rounding: str = "single") -> Tensor:
    """``silu(x) * value`` (SwiGLU, arXiv:2002.05202) behind ``beside`` along the last dim.

    ``"eager"`` rounds ``silu(x)`` to its dtype before the product, ``"single"`` rounds the product
    only. For the rest see :func:`gelu`. Source: ``Flux2SwiGLU``, Z-Image's ``FeedForward``,
    ``OvisImageSingleTransformerBlock`` in diffusers.

    Args:
        x: [B, S, D] or [S, D]; any strides.
        value: the shape of ``x``.
        beside: None, or [B, S, D'] or [S, D'].
        rounding: ``"single"`` or ``"eager"``.

    Returns:
        [B, S, D' + D], contiguous, in the dtype of ``x``.

    Raises:
        TypeError: for the kind or dtype of an argument, which the message names.
        ValueError: for a shape, a device or a combination.

    Examples:
        >>> x, value = torch.randn(2, 2, 16, 64).unbind()
        >>> torch.equal(functional.swiglu(x, value, rounding="eager"), F.silu(x) * value)
        True
    """
    tensors = (x, value, beside)
    try:
        code = ROUNDING[rounding]
        if (torch.is_grad_enabled() or forward_ad._current_level >= 0) and in_pytorch(tensors):
            return differentiable("swiglu", tensors, (rounding,), (code,))
        if traced_by_dynamo() and unfused("swiglu", tensors, (rounding,)):
            return rejected("swiglu", tensors, (rounding,))
        return _swiglu(*tensors, code)
    except REJECTED:
        return rejected("swiglu", tensors, (rounding,))
