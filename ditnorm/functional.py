"""The fused ops of a diffusion transformer's norm sites.

    r = residual + gate * x                 gated residual
    y = norm(r) * (1 + scale) + shift       adaptive LayerNorm or RMSNorm (adaLN, arXiv:2212.09748)

Shapes. ``x`` and ``residual``: [B, S, D], or [S, D] meaning B = 1; any strides (a last dim that
isn't dense is copied once).
``scale``, ``shift``, ``gate``, each on its own: None, [D], [B or 1, D] and [B or 1, 1, D] (per
sample), [B or 1, S, D] (per token), [B or 1, F, 1, D] with F dividing S (per frame); views with a
dense last dim are read in place. With ``index`` (integer or bool, [S] or [B or 1, S]) they are rows
[M, D] or [B or 1, M, D], the same M for all, and token s takes row ``index[s]``.
``weight``, ``bias``: the norm's affine, [D], each alone or together. ``*_table``: [D], added to its
modulation in float32.
``y`` and ``r`` are contiguous. An ``x`` or ``residual`` of batch 1 beside others of batch B is
broadcast, unfused.

Dtypes: float32, float16, bfloat16, each tensor its own. ``y`` has the dtype of ``x``, ``r`` that of
``residual``. Calls with a float64 among them run unfused.

``norm``: ``"layer"``, ``"rms"`` (``torch.nn.functional.rms_norm``), ``"fp32_layer"`` (diffusers'
``FP32LayerNorm``) or ``"diffusers_rms"`` (diffusers' ``RMSNorm``; ``"eager"`` is fused where
everything has one dtype and there are no tables, and its bits are promised up to a width of 8160).
``eps``: by default that of torch's function, 1e-5 for LayerNorm, the resolution of float32 for
RMSNorm.

``rounding``: ``"single"`` computes in float32, rounds ``r`` once, norms the rounded ``r`` and
rounds ``y`` once. ``"eager"`` equals, bit for bit, what diffusers computes without ditnorm: every
operation rounds to its own dtype. It is fused for ``x`` and ``residual`` of one dtype T and
modulations in T or float32; other mixtures run unfused, and the results have the dtypes of
upstream's. On CUDA the bits are promised for D a multiple of 4 and aligned pointers, as ATen's
vectorised norms take them, and not for a bias without a weight; elsewhere the roundings are the
same.

What runs unfused is upstream's expression in PyTorch's operations (:mod:`ditnorm.ops.reference`),
counted as ``"reference"``.

Errors: ``TypeError`` (kind or dtype), ``ValueError`` (shape, device, combination), naming the
argument. An index out of range is an ``IndexError`` on the CPU and a row of NaN elsewhere.

All are differentiable. Where the kernels run and only gradients of ``x``, ``residual``, query, key
and value are wanted, as in LoRA training, these are fused too, and the rows of the inputs (``r`` in
place of what it is the sum of) are all that is saved; under ``"eager"`` they have the bits of eager
autograd. Other gradients are those of PyTorch's operations: ``"single"`` saves its inputs only and
recomputes, ``"eager"`` runs unfused. Under forward-mode differentiation both do.
"""

from typing import Any

import torch
from torch import Tensor

from . import kernels
from .ops import checks, checks_qk
from .ops.autograd import GRADIENTS, Recompute, kernel_of
from .ops.calls import HALVES, HALVES_OF_CUDA, NORMS, PAIRS, QK_NORMS, ROUNDINGS, default_eps
from .ops.quantization import CODES, Law, Quantized
from .ops.table import OPS
from .swapping.torch_private import any_autocast_enabled, forward_ad

_NORM = {name: code for code, name in enumerate(NORMS)}
_QK_NORM = {name: code for code, name in enumerate(QK_NORMS)}
_PAIRS = {"neighbours": 0, "halves": PAIRS.index(HALVES_OF_CUDA)}
_ROUNDING = {name: code for code, name in enumerate(ROUNDINGS)}
_HALF = {dtype: code for code, dtype in enumerate(HALVES)}
# What bad arguments raise on the way to the kernel.
_REJECTED = (RuntimeError, TypeError, KeyError, AttributeError)

# Looked up once: an overload packet costs a call half a microsecond.
_norm_scale_shift = kernels.ops.norm_scale_shift.default
_scale_residual_norm_scale_shift = kernels.ops.scale_residual_norm_scale_shift.default
_scale_residual = kernels.ops.scale_residual.default
_norm_scale_residual = kernels.ops.norm_scale_residual.default
_norm_scale_residual_norm_scale_shift = kernels.ops.norm_scale_residual_norm_scale_shift.default
_qk_norm_rope = kernels.ops.qk_norm_rope.default
_joint_qk_norm_rope = kernels.ops.joint_qk_norm_rope.default
_quantize = kernels.ops.quantize.default
_gelu_quantize = kernels.ops.gelu_quantize.default
_swiglu_quantize = kernels.ops.swiglu_quantize.default
_gelu = kernels.ops.gelu.default
_swiglu = kernels.ops.swiglu.default
_dequantize_product = kernels.ops.dequantize_product.default
_norm_scale_shift_quantize = kernels.ops.norm_scale_shift_quantize.default
_scale_residual_norm_scale_shift_quantize = kernels.ops.scale_residual_norm_scale_shift_quantize.default
_norm_scale_shift_and_quantize = kernels.ops.norm_scale_shift_and_quantize.default
_scale_residual_norm_scale_shift_and_quantize = kernels.ops.scale_residual_norm_scale_shift_and_quantize.default

# Under Dynamo an op that rejects its arguments ends the trace, and nothing catches that.
# So what no kernel takes is found before.
_traced_by_dynamo = torch.compiler.is_dynamo_compiling


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

    Shapes, dtypes, rounding and gradients in full: see the module. Source: ``AdaLayerNormZero``,
    ``QwenImageTransformerBlock._modulate``, ``WanTransformerBlock`` in diffusers.

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
        codes = (_NORM[norm], eps, _ROUNDING[rounding])
        if (torch.is_grad_enabled() or any_autocast_enabled() or forward_ad._current_level >= 0) and _in_pytorch(tensors, rounding):
            return _differentiable("norm_scale_shift", tensors, (norm, eps, rounding), codes)
        if _traced_by_dynamo() and _unfused("norm_scale_shift", tensors, (norm, eps, rounding)):
            return _rejected("norm_scale_shift", tensors, (norm, eps, rounding))
        return _norm_scale_shift(*tensors, *codes)
    except _REJECTED:
        return _rejected("norm_scale_shift", tensors, (norm, eps, rounding))


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

    Shapes, dtypes, rounding and gradients in full: see the module. Source: the middle of
    ``QwenImageTransformerBlock``, ``WanTransformerBlock``, ``HunyuanVideoTransformerBlock`` in
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
        codes = (_NORM[norm], eps, _ROUNDING[rounding])
        if (torch.is_grad_enabled() or any_autocast_enabled() or forward_ad._current_level >= 0) and _in_pytorch(tensors, rounding):
            return _differentiable("scale_residual_norm_scale_shift", tensors, (norm, eps, rounding), codes)
        if _traced_by_dynamo() and _unfused("scale_residual_norm_scale_shift", tensors, (norm, eps, rounding)):
            return _rejected("scale_residual_norm_scale_shift", tensors, (norm, eps, rounding))
        return _scale_residual_norm_scale_shift(*tensors, *codes)
    except _REJECTED:
        return _rejected("scale_residual_norm_scale_shift", tensors, (norm, eps, rounding))


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

    Shapes, dtypes, rounding and gradients in full: see the module. Source: the end of every
    transformer block in diffusers.

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
        codes = (_ROUNDING[rounding],)
        if (torch.is_grad_enabled() or any_autocast_enabled() or forward_ad._current_level >= 0) and _in_pytorch(tensors):
            return _differentiable("scale_residual", tensors, (rounding,), codes)
        if _traced_by_dynamo() and _unfused("scale_residual", tensors, (rounding,)):
            return _rejected("scale_residual", tensors, (rounding,))
        return _scale_residual(*tensors, *codes)
    except _REJECTED:
        return _rejected("scale_residual", tensors, (rounding,))


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

    Shapes, dtypes, rounding and gradients in full: see the module. Source: the end of
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
        codes = (eps, _ROUNDING[rounding])
        if (torch.is_grad_enabled() or any_autocast_enabled() or forward_ad._current_level >= 0) and _in_pytorch(tensors, rounding):
            return _differentiable("norm_scale_residual", tensors, options, codes)
        if _traced_by_dynamo() and _unfused("norm_scale_residual", tensors, options):
            return _rejected("norm_scale_residual", tensors, options)
        return _norm_scale_residual(*tensors, *codes)
    except _REJECTED:
        return _rejected("norm_scale_residual", tensors, options)


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

    Shapes, dtypes, rounding and gradients in full: see the module. Source: the middle of
    ``ZImageTransformerBlock``, ``Lumina2TransformerBlock`` in diffusers.

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
        codes = (eps, _ROUNDING[rounding])
        if (torch.is_grad_enabled() or any_autocast_enabled() or forward_ad._current_level >= 0) and _in_pytorch(tensors, rounding):
            return _differentiable("norm_scale_residual_norm_scale_shift", tensors, options, codes)
        if _traced_by_dynamo() and _unfused("norm_scale_residual_norm_scale_shift", tensors, options):
            return _rejected("norm_scale_residual_norm_scale_shift", tensors, options)
        return _norm_scale_residual_norm_scale_shift(*tensors, *codes)
    except _REJECTED:
        return _rejected("norm_scale_residual_norm_scale_shift", tensors, options)


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

    ``"eager"`` is fused for one dtype of query, key and weights; on CUDA its bits are promised for
    the norms that diffusers has: ``"diffusers_rms"`` per head, ``"rms"`` per head and across heads,
    with d a multiple of 8. Rounding and gradients in full: see the module. Source:
    ``WanAttnProcessor``, ``HunyuanVideoAttnProcessor2_0``, ``FluxAttnProcessor``,
    ``LTX2AudioVideoAttnProcessor`` in diffusers.

    Args:
        query: [B, S, H * d], d being ``head_dim``; float32, float16 or bfloat16; any strides:
            chunks of a fused projection are read in place.
        key: as ``query``, with an S and H of its own.
        query_weight: [d], normed per head; [H * d], normed across all heads; None: per head,
            without a weight.
        key_weight: as ``query_weight``.
        rotary: None, a complex64 table [S', d / 2] (Qwen-Image), or ``(cos, sin)``, float32, of
            width d (a value for each element, HunyuanVideo) or d / 2 (for each pair, Wan): [S', n],
            [B or 1, S', n] or [B or 1, S', 1 or H, n], any strides. The first S' <= S tokens are
            rotated, the rest is only normed.
        key_rotary: the key's tables, where it has its own (LTX-2).
        head_dim: d, an even number where there is a rotary table.
        norm: ``"rms"`` (``torch.nn.RMSNorm``) or ``"diffusers_rms"`` (diffusers' ``RMSNorm``, which
            under ``"eager"`` rounds before it multiplies by the weight).
        eps: of the norm.
        pairs: the elements that are turned against each other: ``"neighbours"`` or, by tables of
            width d / 2, the ``"halves"`` of a head (LTX-2).
        rounding: ``"single"`` or ``"eager"``, the bits of diffusers' own expression.

    Returns:
        ``(query, key)``: [B, S, H, d] each, contiguous, in the dtype of ``query``.

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
        codes = (head_dim, _QK_NORM[norm], eps, _PAIRS[pairs], _ROUNDING[rounding])
        if (torch.is_grad_enabled() or any_autocast_enabled() or forward_ad._current_level >= 0) and _in_pytorch(tensors, rounding, norm):
            return _differentiable("qk_norm_rope", tensors, (head_dim, norm, eps, pairs, rounding), codes)
        if _traced_by_dynamo() and _unfused("qk_norm_rope", tensors, (head_dim, norm, eps, pairs, rounding)):
            return _rejected("qk_norm_rope", tensors, (head_dim, norm, eps, pairs, rounding))
        return _qk_norm_rope(*tensors, *codes)
    except _REJECTED:
        return _rejected("qk_norm_rope", tensors, (head_dim, norm, eps, pairs, rounding))


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

    All that isn't said here is as there. Source: ``QwenDoubleStreamAttnProcessor2_0``,
    ``HunyuanVideoAttnProcessor2_0`` in diffusers.

    Args:
        query: [B, S, H * d] of the first stream.
        key: as ``query``.
        value: as ``query``.
        query_weight: [d], [H * d] or None.
        key_weight: [d], [H * d] or None.
        rotary: of the first stream; None, a complex table or ``(cos, sin)``.
        encoder_query: [B, S_encoder, H * d] of the second stream, the text.
        encoder_key: as ``encoder_query``.
        encoder_value: as ``encoder_query``.
        encoder_query_weight: [d], [H * d] or None.
        encoder_key_weight: [d], [H * d] or None.
        encoder_rotary: of the second stream.
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
        codes = (head_dim, _QK_NORM[norm], eps, encoder_first, _ROUNDING[rounding])
        if (torch.is_grad_enabled() or any_autocast_enabled() or forward_ad._current_level >= 0) and _in_pytorch(tensors, rounding, norm):
            return _differentiable("joint_qk_norm_rope", tensors, (head_dim, norm, eps, encoder_first, rounding), codes)
        if _traced_by_dynamo() and _unfused("joint_qk_norm_rope", tensors, (head_dim, norm, eps, encoder_first, rounding)):
            return _rejected("joint_qk_norm_rope", tensors, (head_dim, norm, eps, encoder_first, rounding))
        return _joint_qk_norm_rope(*tensors, *codes)
    except _REJECTED:
        return _rejected("joint_qk_norm_rope", tensors, (head_dim, norm, eps, encoder_first, rounding))


def gelu(x: Tensor, beside: Tensor | None = None, *, rounding: str = "single") -> Tensor:
    """GELU of ``x``, in its tanh approximation (arXiv:1606.08415), behind ``beside`` along the last
    dim: attention's result and the MLP's in one buffer, as the last linear layer of a block
    reads them.

    Both rounding laws are one here, and on CUDA have the bits of PyTorch's GELU. Fused where all
    have one dtype: float32, float16, bfloat16. Gradients: see the module. Source:
    ``FluxSingleTransformerBlock``, ``HunyuanVideoSingleTransformerBlock`` in diffusers.

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
        code = _ROUNDING[rounding]
        if (torch.is_grad_enabled() or any_autocast_enabled() or forward_ad._current_level >= 0) and _in_pytorch(tensors, rounding):
            return _differentiable("gelu", tensors, (rounding,), (code,))
        if _traced_by_dynamo() and _unfused("gelu", tensors, (rounding,)):
            return _rejected("gelu", tensors, (rounding,))
        return _gelu(*tensors, code)
    except _REJECTED:
        return _rejected("gelu", tensors, (rounding,))


def swiglu(x: Tensor, value: Tensor, beside: Tensor | None = None, *, rounding: str = "single") -> Tensor:
    """``silu(x) * value`` (SwiGLU, arXiv:2002.05202) behind ``beside`` along the last dim.

    All that isn't said here is as of :func:`gelu`. ``"eager"`` rounds ``silu(x)`` to its dtype.
    Source: ``Flux2SwiGLU``, Z-Image's ``FeedForward``, ``OvisImageSingleTransformerBlock`` in
    diffusers.

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
        code = _ROUNDING[rounding]
        if (torch.is_grad_enabled() or any_autocast_enabled() or forward_ad._current_level >= 0) and _in_pytorch(tensors, rounding):
            return _differentiable("swiglu", tensors, (rounding,), (code,))
        if _traced_by_dynamo() and _unfused("swiglu", tensors, (rounding,)):
            return _rejected("swiglu", tensors, (rounding,))
        return _swiglu(*tensors, code)
    except _REJECTED:
        return _rejected("swiglu", tensors, (rounding,))


def quantize(x: Tensor, law: Law) -> Quantized:
    """``x`` [..., D] as a linear layer with quantised weights reads it, by a law of
    :mod:`ditnorm.ops.quantization`.

    Not differentiable. Errors: ``TypeError``, ``ValueError``, naming the argument; float8 needs
    compute capability 8.9.

    Source: torchao's ``Float8Tensor.from_hp`` and ``Int8Tensor.from_hp``.
    """
    rows = x if x.dim() <= 3 else x.flatten(0, -2)
    try:
        values, scale = _quantize(rows, CODES[law])
    except _REJECTED:
        values, scale = _rejected("quantize", (rows,), (law,))
    return Quantized(values, scale, x.shape, x.dtype, law)


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
    """:func:`quantize` of :func:`norm_scale_shift`. Not differentiable."""
    tensors = (x, scale, shift, weight, bias, scale_table, shift_table, index)
    try:
        if not _needs_pytorch(tensors, rounding):
            codes = (_NORM[norm], default_eps(norm, x) if eps is None else eps, _ROUNDING[rounding], CODES[law])
            values, row_scale = _norm_scale_shift_quantize(*tensors, *codes)
            return Quantized(values, row_scale, x.shape, x.dtype, law)
    except _REJECTED:
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
    """``(y, r)`` of :func:`scale_residual_norm_scale_shift`, its ``y`` as :func:`quantize` makes
    it. Not differentiable.
    """
    tensors = (residual, x, gate, scale, shift, weight, bias, gate_table, scale_table, shift_table, index)
    try:
        if not _needs_pytorch(tensors, rounding):
            codes = (_NORM[norm], default_eps(norm, x) if eps is None else eps, _ROUNDING[rounding], CODES[law])
            values, row_scale, r = _scale_residual_norm_scale_shift_quantize(*tensors, *codes)
            return Quantized(values, row_scale, x.shape, x.dtype, law), r
    except _REJECTED:
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
    """:func:`norm_scale_shift`, and :func:`quantize` of it beside it, for what else reads it. Not
    differentiable.
    """
    tensors = (x, scale, shift, weight, bias, scale_table, shift_table, index)
    try:
        if not _needs_pytorch(tensors, rounding):
            codes = (_NORM[norm], default_eps(norm, x) if eps is None else eps, _ROUNDING[rounding], CODES[law])
            y, values, row_scale = _norm_scale_shift_and_quantize(*tensors, *codes)
            return y, Quantized(values, row_scale, x.shape, x.dtype, law)
    except _REJECTED:
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
    """``(y, quantised, r)``: :func:`scale_residual_norm_scale_shift`, and :func:`quantize` of its
    ``y``. Not differentiable.
    """
    tensors = (residual, x, gate, scale, shift, weight, bias, gate_table, scale_table, shift_table, index)
    try:
        if not _needs_pytorch(tensors, rounding):
            codes = (_NORM[norm], default_eps(norm, x) if eps is None else eps, _ROUNDING[rounding], CODES[law])
            y, values, row_scale, r = _scale_residual_norm_scale_shift_and_quantize(*tensors, *codes)
            return y, Quantized(values, row_scale, x.shape, x.dtype, law), r
    except _REJECTED:
        pass  # one of the two ops says what is wrong with the call
    options: dict[str, Any] = {"weight": weight, "bias": bias, "gate_table": gate_table, "scale_table": scale_table}
    options |= {"shift_table": shift_table, "index": index, "norm": norm, "eps": eps, "rounding": rounding}
    y, r = scale_residual_norm_scale_shift(residual, x, gate, scale, shift, **options)
    return y, quantize(y, law), r


def gelu_quantize(x: Tensor, law: Law, beside: Tensor | None = None) -> Quantized:
    """:func:`quantize` of :func:`gelu`, rounded to the dtype of ``x``. Not differentiable."""
    rows = x if x.dim() <= 3 or beside is not None else x.flatten(0, -2)
    try:
        values, scale = _gelu_quantize(rows, beside, CODES[law])
    except _REJECTED:
        values, scale = _rejected("gelu_quantize", (rows, beside), (law,))
    return Quantized(values, scale, torch.Size((*x.shape[:-1], values.shape[-1])), x.dtype, law)


def swiglu_quantize(x: Tensor, value: Tensor, law: Law, beside: Tensor | None = None, *, rounding: str = "single") -> Quantized:
    """:func:`quantize` of :func:`swiglu`. Not differentiable."""
    try:
        values, scale = _swiglu_quantize(x, value, beside, _ROUNDING[rounding], CODES[law])
    except _REJECTED:
        values, scale = _rejected("swiglu_quantize", (x, value, beside), (rounding, law))
    return Quantized(values, scale, torch.Size((*x.shape[:-1], values.shape[-1])), x.dtype, law)


def dequantize_product(product: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What an int8 matrix product stands for: ``product`` [rows, N] int32, ``scale`` [rows, 1],
    ``weight_scale`` [N, 1] -> [rows, N].

    ``dtype``: float16 or bfloat16, as the bias [N]. Not differentiable. Errors: ``TypeError``,
    ``ValueError``, naming the argument.

    Source: the ``linear`` of torchao's ``Int8Tensor``.
    """
    try:
        return _dequantize_product(product, scale, weight_scale, bias, _HALF[dtype])
    except _REJECTED:
        return _rejected("dequantize_product", (product, scale, weight_scale, bias), (dtype,))


def _needs_pytorch(tensors: tuple[Tensor | None, ...], rounding: str) -> bool:
    """Whether PyTorch's operations are to make what is quantised."""
    return (torch.is_grad_enabled() or any_autocast_enabled() or forward_ad._current_level >= 0) and _in_pytorch(tensors, rounding)


def _in_pytorch(tensors: tuple[Tensor | None, ...], rounding: str = "single", qk_norm: str = "rms") -> bool:
    """Whether autograd needs a graph or a tangent of this call, or autocast must choose the dtypes
    of upstream's expression: it leaves all operations alone but torch's norms.
    """
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return rounding == "eager" and qk_norm == "rms" and any(t is not None and checks.autocasts(t) for t in tensors)


def _autocast(name: str, options: tuple[Any, ...]) -> bool:
    """Whether autocast is on for any device and chooses dtypes of upstream's expression: those of
    torch's norms.
    """
    left_alone = name == "scale_residual" or (name in ("qk_norm_rope", "joint_qk_norm_rope") and "rms" not in options)
    return options[-1] == "eager" and not left_alone and any_autocast_enabled()


def _differentiable(name: str, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...], codes: tuple[Any, ...]) -> Any:
    transformed, gradients = checks.transformed(), GRADIENTS.get(name)
    if gradients is not None and not _autocast(name, options):
        if not transformed and kernels.serves(tensors[0]):
            outputs = gradients.call(kernel_of(name), tensors, options, codes)
            if outputs is not None:
                return outputs
        # Sums over rows a compiler fuses itself, and chooses what to save for them.
        compiled = _traced_by_dynamo() and not torch.compiler.is_exporting()
        fits = compiled and kernels.may_serve(tensors[0]) and gradients.are_of_rows(tensors, options)
        if fits and not _unfused(name, tensors, options):
            return getattr(kernels.ops, name).under_grad(*tensors, *codes)
    op = OPS[name]
    call = op.call(*tensors, *options)
    op.check(call)
    if call.rounding == "eager" or transformed:
        return kernels.in_pytorch(op, call)
    return Recompute.apply(op, kernel_of(name), codes, options, *tensors)


def _unfused(name: str, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> bool:
    """Whether no kernel takes the call. Dynamo needs long for the whole question, and nearly always
    need not ask it.
    """
    first: Any = tensors[0]
    uniform = first.dtype in checks.FLOATS
    for t in tensors:
        if t is not None and (t.dtype is not first.dtype or (t.dim() > 1 and t.shape[0] != first.shape[0])):
            uniform = False
    return not uniform and OPS[name].unfused(OPS[name].call(*tensors, *options)) is not None


def _rejected(name: str, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> Any:
    """Where the kernel has rejected a call: the error that names what is wrong with it, or the
    results of PyTorch's operations.
    """
    op = OPS[name]
    call = op.call(*tensors, *options)
    op.check(call)
    if op.unfused(call) is None:
        raise  # the kernel's own error, which the caller is handling
    return kernels.in_pytorch(op, call)
