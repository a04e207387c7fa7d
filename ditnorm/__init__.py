"""Diffusion transformers made faster without changing what they draw: see
:func:`patch_pipeline`.
"""

import importlib
from typing import Any

from .functional import joint_qk_norm_rope, norm_scale_shift, qk_norm_rope, scale_residual, scale_residual_norm_scale_shift
from .layers import LayerNormScaleShift, RMSNormScaleShift, ScaleResidualNormScaleShift
from .patching import (
    patch_model,
    patch_pipeline,
    precompute_modulation,
    report,
    restore_modulation,
    unpatch_model,
    unpatch_pipeline,
    verify,
)

__version__ = "0.2.0"

__all__ = [
    "LayerNormScaleShift",
    "RMSNormScaleShift",
    "ScaleResidualNormScaleShift",
    "__version__",
    "joint_qk_norm_rope",
    "norm_scale_shift",
    "patch_model",
    "patch_pipeline",
    "precompute_modulation",
    "qk_norm_rope",
    "report",
    "restore_modulation",
    "scale_residual",
    "scale_residual_norm_scale_shift",
    "unpatch_model",
    "unpatch_pipeline",
    "verify",
]

_MOVED = {"generated": ".swapping.generated", "verification": ".patching.verification"}
"""Modules by the names that they had before they moved into a room."""


def __getattr__(name: str) -> Any:
    if name in _MOVED:
        return importlib.import_module(_MOVED[name], __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
