"""The fused ops of a diffusion transformer. Between two of its sub-layers a block computes

    r = residual + gate * x                 gated residual
    y = norm(r) * (1 + scale) + shift       adaptive LayerNorm or RMSNorm (adaLN, arXiv:2212.09748)

**Shapes**

- ``x``, ``residual``: [B, S, D], or [S, D], which means B = 1. Strides are free; a last dim that
  isn't dense is copied once. If one of them has batch 1 and the call batch B, it is broadcast,
  and the call runs unfused.
- ``scale``, ``shift``, ``gate``: each is None, or of one of these shapes, with a dense last dim and
  any other strides (views are read in place): [D]; per sample [B or 1, D] or [B or 1, 1, D];
  per token [B or 1, S, D]; per frame [B or 1, F, 1, D], where F divides S.
- ``index``: integer or bool, [S] or [B or 1, S]. With it the modulations are rows, [M, D] or
  [B or 1, M, D], with the same M for all of them, and token s takes row ``index[s]``.
- ``weight``, ``bias``: the norm's affine parameters, [D], together or either alone.
- ``*_table``: [D], added to its modulation in float32.
- ``y`` and ``r`` are contiguous.

**Dtypes.** float32, float16 and bfloat16, chosen for each tensor alone. ``y`` has the dtype of
``x``, ``r`` that of ``residual``. A call with a float64 tensor runs unfused.

**Norms.** ``norm`` is one of

- ``"layer"``: ``torch.nn.functional.layer_norm``;
- ``"rms"``: ``torch.nn.functional.rms_norm``;
- ``"fp32_layer"``: diffusers' ``FP32LayerNorm``;
- ``"diffusers_rms"``: diffusers' ``RMSNorm``. Under ``"eager"`` it is fused where everything has
  one dtype and there are no tables, and its bits are promised up to a width of 8160.

``eps`` defaults to that of PyTorch's function: 1e-5, or for ``"rms"`` the resolution of float32.

**Rounding.** ``"single"`` computes in float32, rounds ``r`` once, norms the rounded ``r`` and
rounds ``y`` once. ``"eager"`` equals, bit for bit, what diffusers computes without ditnorm: every
operation rounds to its own dtype. It is fused where ``x`` and ``residual`` have one dtype T and
each modulation has T or float32. Other mixtures run unfused, and their results have upstream's
dtypes.
On CUDA the bits are promised where D is a multiple of 4 and pointers are aligned, as ATen's
vectorised norms need them, and not for a bias without a weight. For the rest every rounding still
happens where upstream's does, but the statistics of a row may be added up in another order.

**Unfused** calls run upstream's expression in PyTorch's operations (:mod:`ditnorm.ops.reference`),
and :func:`ditnorm.report` counts them under ``reference``.

**Errors** name the argument: ``TypeError`` for a kind or a dtype, ``ValueError`` for a shape, a
device or a combination. An index out of range is an ``IndexError`` on the CPU, and a row of NaN
elsewhere.

**Gradients.** All ops but those that quantise are differentiable.

- Where the kernels run, the forward pass is fused under grad, too. So are the gradients of rows:
  of ``x``, ``residual``, query, key and value, and of what an activation takes. Under ``"eager"``
  they have the bits of eager autograd.
- The gradients of modulations, tables and weights are sums over rows. PyTorch's operations make
  them.
- Where only rows want a gradient, as in LoRA training, only the rows of the inputs are saved (``r``
  in place of the two that it is the sum of), and ``torch.compile`` meets the same ops, forward and
  backward.
- Where no kernel runs, gradients are those of the unfused expression: ``"single"`` saves its inputs
  and computes again, ``"eager"`` runs unfused. Both run unfused under forward-mode differentiation.
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
