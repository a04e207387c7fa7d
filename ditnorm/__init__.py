"""Diffusion transformers made faster without changing what they draw: see :func:`patch_pipeline`."""

from .functional import norm_scale_shift, scale_residual, scale_residual_norm_scale_shift
from .layers import LayerNormScaleShift, RMSNormScaleShift, ScaleResidualNormScaleShift

__all__ = [
    "LayerNormScaleShift",
    "RMSNormScaleShift",
    "ScaleResidualNormScaleShift",
    "norm_scale_shift",
    "scale_residual",
    "scale_residual_norm_scale_shift",
]
