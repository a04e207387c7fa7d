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

All but the quantising ones are differentiable. Where the kernels run the forward pass is fused
under grad, too, and so are the gradients of ``x``, ``residual``, query, key and value, and of what
an activation takes; where no others are wanted, as in LoRA training, the rows of the inputs (``r``
in place of what it is the sum of) are all that is saved, and ``torch.compile`` meets the same ops,
forward and backward. Gradients of modulations, tables and weights, which are sums over rows, are
those of PyTorch's operations. Under ``"eager"`` those of rows have the bits of eager autograd.
Where no kernel runs gradients are those of the expression: ``"single"`` saves its inputs only and
recomputes, ``"eager"`` runs unfused; so do both under forward-mode differentiation.
"""

from .activations import gelu, swiglu
from .norms import norm_scale_shift, scale_residual, scale_residual_norm_scale_shift
from .qk import joint_qk_norm_rope, qk_norm_rope
from .quantised import (
    dequantize_product,
    gelu_quantize,
    norm_scale_shift_and_quantize,
    norm_scale_shift_quantize,
    quantize,
    scale_residual_norm_scale_shift_and_quantize,
    scale_residual_norm_scale_shift_quantize,
    swiglu_quantize,
)
from .sandwich import norm_scale_residual, norm_scale_residual_norm_scale_shift

__all__ = [
    "dequantize_product",
    "gelu",
    "gelu_quantize",
    "joint_qk_norm_rope",
    "norm_scale_residual",
    "norm_scale_residual_norm_scale_shift",
    "norm_scale_shift",
    "norm_scale_shift_and_quantize",
    "norm_scale_shift_quantize",
    "qk_norm_rope",
    "quantize",
    "scale_residual",
    "scale_residual_norm_scale_shift",
    "scale_residual_norm_scale_shift_and_quantize",
    "scale_residual_norm_scale_shift_quantize",
    "swiglu",
    "swiglu_quantize",
]
