"""The ops of query and key."""

import torch
from torch import Tensor

from .. import kernels
from ..ops import checks_qk
from ..swapping.torch_private import any_autocast_enabled, forward_ad
from .path import PAIR, QK_NORM, REJECTED, ROUNDING, differentiable, in_pytorch, rejected, traced_by_dynamo, unfused

_qk_norm_rope = kernels.ops.qk_norm_rope.default
_joint_qk_norm_rope = kernels.ops.joint_qk_norm_rope.default


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    rotary: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    key_rotary: Tensor | tuple[Tensor, Tensor] | None = None,
    head_dim: int,
    norm: str = "rms",
    eps: float = 1e-6,
    pairs: str = "neighbours",
    rounding: str = "single",
) -> tuple[Tensor, Tensor]:
    """Query and key, each RMS-normed, then rotated by position (RoPE, arXiv:2104.09864): what
    stands between the projections and the attention of a block.

    It is fused where query and key have one dtype, which under ``"eager"`` their weights have too,
    and where tables are float32 or complex64. PyTorch's operations serve the rest. On CUDA the bits
    of ``"eager"`` are promised for the norms that diffusers has: ``"diffusers_rms"`` per head,
    ``"rms"`` per head and across heads, with d a multiple of 8. :mod:`ditnorm.functional` has
    rounding and gradients in full. Source: ``WanAttnProcessor``, ``HunyuanVideoAttnProcessor2_0``,
    ``FluxAttnProcessor``, ``LTX2AudioVideoAttnProcessor`` in diffusers.

    Args:
        query: [B, S, H * d], d being ``head_dim``; float32, float16 or bfloat16; any strides:
            chunks of a fused projection are read in place.
        key: as ``query``, with an S, H and dtype of its own.
        query_weight: [d] to norm per head, [H * d] to norm across all heads, None to norm per head
            without a weight.
        key_weight: as ``query_weight``.
        rotary: None, a complex64 table [S', d / 2] (Qwen-Image), or ``(cos, sin)``, float32 or as a
            model cast as a whole has them, of width d (a value for each element, HunyuanVideo) or
            d / 2 (for each pair, Wan): [S', n], [B or 1, S', n] or [B or 1, S', 1 or H, n], any
            strides. The first S' <= S tokens are rotated, the rest is only normed.
        key_rotary: the key's tables, where it has its own (LTX-2).
        head_dim: d, an even number where there is a rotary table.
        norm: ``"rms"`` (``torch.nn.RMSNorm``) or ``"diffusers_rms"`` (diffusers' ``RMSNorm``, which
            under ``"eager"`` rounds before it multiplies by the weight).
        eps: of the norm.
        pairs: the elements that are turned against each other: ``"neighbours"`` or, by tables of
            width d / 2, the ``"halves"`` of a head (LTX-2).
        rounding: ``"single"`` or ``"eager"``, the bits of diffusers' own expression.

    Returns:
        ``(query, key)``: [B, S, H, d] each, contiguous, in the dtype that it had, or under
            ``"eager"`` in the one that upstream's expression promotes it to.

    Raises:
        TypeError: for the kind or dtype of an argument, which the message names.
        ValueError: for a shape, a device or a combination.

    Examples:
        >>> query, key = torch.randn(2, 2, 16, 4 * 32).unbind()  # 4 heads of 32
        >>> angles = torch.outer(torch.arange(16.0), torch.logspace(0, -4, 16))
        >>> rotary = torch.polar(torch.ones_like(angles), angles)
        >>> q, k = ditnorm.qk_norm_rope(query, key, rotary=rotary, head_dim=32)
        >>> normed = F.rms_norm(query.unflatten(-1, (4, 32)), (32,), eps=1e-6)
        >>> pairs = torch.view_as_complex(normed.unflatten(-1, (16, 2)))
        >>> rotated = torch.view_as_real(pairs * rotary[:, None]).flatten(-2)
        >>> torch.testing.assert_close(q, rotated)
    """
    cos, sin = (rotary, None) if rotary is None or isinstance(rotary, Tensor) else checks_qk.tables(rotary)
    key_cos, key_sin = (
        (key_rotary, None) if key_rotary is None or isinstance(key_rotary, Tensor) else checks_qk.tables(key_rotary, "key_rotary")
    )
    tensors = (query, key, query_weight, key_weight, cos, sin, key_cos, key_sin)
    try:
        codes = (head_dim, QK_NORM[norm], eps, PAIR[pairs], ROUNDING[rounding])
        if (torch.is_grad_enabled() or any_autocast_enabled() or forward_ad._current_level >= 0) and in_pytorch(tensors, rounding, norm):
            return differentiable("qk_norm_rope", tensors, (head_dim, norm, eps, pairs, rounding), codes)
        if traced_by_dynamo() and unfused("qk_norm_rope", tensors, (head_dim, norm, eps, pairs, rounding)):
            return rejected("qk_norm_rope", tensors, (head_dim, norm, eps, pairs, rounding))
        return _qk_norm_rope(*tensors, *codes)
    except REJECTED:
        return rejected("qk_norm_rope", tensors, (head_dim, norm, eps, pairs, rounding))


def joint_qk_norm_rope(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    rotary: Tensor | tuple[Tensor, Tensor] | None,
    encoder_query: Tensor,
    encoder_key: Tensor,
    encoder_value: Tensor,
    encoder_query_weight: Tensor | None,
    encoder_key_weight: Tensor | None,
    encoder_rotary: Tensor | tuple[Tensor, Tensor] | None,
    *,
    head_dim: int,
    norm: str = "rms",
    eps: float = 1e-6,
    encoder_first: bool = False,
    rounding: str = "single",
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of joint attention: :func:`qk_norm_rope` of two streams, both written
    into one tensor each, with the values beside them.

    For the rest see there. Source: ``QwenDoubleStreamAttnProcessor2_0``,
    ``HunyuanVideoAttnProcessor2_0`` in diffusers.

    Args:
        query: [B, S, H * d] of the first stream.
        key: as ``query``.
        value: as ``query``.
        query_weight: [d], [H * d] or None.
        key_weight: [d], [H * d] or None.
        rotary: the first stream's: None, a complex table or ``(cos, sin)``.
        encoder_query: [B, S_encoder, H * d] of the second stream, the text.
        encoder_key: as ``encoder_query``.
        encoder_value: as ``encoder_query``.
        encoder_query_weight: [d], [H * d] or None.
        encoder_key_weight: [d], [H * d] or None.
        encoder_rotary: the second stream's.
        head_dim: d.
        norm: ``"rms"`` or ``"diffusers_rms"``.
        eps: of the norm.
        encoder_first: whether the second stream's tokens come first (Qwen-Image, FLUX.1) or last
            (HunyuanVideo).
        rounding: ``"single"`` or ``"eager"``, the bits of diffusers' own expression.

    Returns:
        ``(query, key, value)``: [B, S + S_encoder, H, d] each, contiguous.

    Raises:
        TypeError: for the kind or dtype of an argument, which the message names.
        ValueError: for a shape, a device or a combination.

    Examples:
        >>> image, text = torch.randn(3, 1, 16, 64).unbind(), torch.randn(3, 1, 5, 64).unbind()
        >>> q, k, v = ditnorm.joint_qk_norm_rope(
        ...     *image, None, None, None, *text, None, None, None, head_dim=32
        ... )
        >>> q.shape
        torch.Size([1, 21, 2, 32])
        >>> torch.equal(v.flatten(2), torch.cat([image[2], text[2]], dim=1))
        True
    """
    cos, sin = (rotary, None) if rotary is None or isinstance(rotary, Tensor) else checks_qk.tables(rotary)
    encoder_cos, encoder_sin = (
        (encoder_rotary, None) if encoder_rotary is None or isinstance(encoder_rotary, Tensor) else checks_qk.tables(encoder_rotary)
    )
    encoder = (encoder_query, encoder_key, encoder_value, encoder_query_weight, encoder_key_weight, encoder_cos, encoder_sin)
    tensors = (query, key, value, query_weight, key_weight, cos, sin, *encoder)
    try:
        codes = (head_dim, QK_NORM[norm], eps, encoder_first, ROUNDING[rounding])
        if (torch.is_grad_enabled() or any_autocast_enabled() or forward_ad._current_level >= 0) and in_pytorch(tensors, rounding, norm):
            return differentiable("joint_qk_norm_rope", tensors, (head_dim, norm, eps, encoder_first, rounding), codes)
        if traced_by_dynamo() and unfused("joint_qk_norm_rope", tensors, (head_dim, norm, eps, encoder_first, rounding)):
            return rejected("joint_qk_norm_rope", tensors, (head_dim, norm, eps, encoder_first, rounding))
        return _joint_qk_norm_rope(*tensors, *codes)
    except REJECTED:
        return rejected("joint_qk_norm_rope", tensors, (head_dim, norm, eps, encoder_first, rounding))
