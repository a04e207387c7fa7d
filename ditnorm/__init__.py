"""Diffusion transformers made faster without changing what they draw: see :func:`patch_pipeline`."""

from .functional import joint_qk_norm_rope, norm_scale_shift, qk_norm_rope, scale_residual, scale_residual_norm_scale_shift
from .layers import LayerNormScaleShift, RMSNormScaleShift, ScaleResidualNormScaleShift
from .patching import patch_model, patch_pipeline, report, unpatch_model, unpatch_pipeline, verify

__all__ = [
    "LayerNormScaleShift",
    "RMSNormScaleShift",
    "ScaleResidualNormScaleShift",
    "joint_qk_norm_rope",
    "norm_scale_shift",
    "patch_model",
    "patch_pipeline",
    "qk_norm_rope",
    "report",
    "scale_residual",
    "scale_residual_norm_scale_shift",
    "unpatch_model",
    "unpatch_pipeline",
    "verify",
]
