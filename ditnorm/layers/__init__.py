"""Norm layers that take their modulation, for drop-in use in place of ``nn.LayerNorm``,
``nn.RMSNorm`` and diffusers' norms.

Called with ``x`` alone each is the plain norm. Parameters and state-dict keys are those of the norm
that it derives from. Shapes, dtypes, rounding laws and errors of the modulation: see
:mod:`ditnorm.functional`.

A layer runs unfused where others see, or change, what a norm takes and returns, such as a hook:
they see what they would see on the norm, and PyTorch modulates the result.
"""

from .identity import ScaleResidualIdentity
from .modulated import LayerNormScaleShift, NormScaleShiftLayer, RMSNormScaleShift
from .residual import ScaleResidualLayerNormScaleShift, ScaleResidualNormScaleShift, ScaleResidualRMSNormScaleShift

__all__ = [
    "LayerNormScaleShift",
    "NormScaleShiftLayer",
    "RMSNormScaleShift",
    "ScaleResidualIdentity",
    "ScaleResidualLayerNormScaleShift",
    "ScaleResidualNormScaleShift",
    "ScaleResidualRMSNormScaleShift",
]

for _name in __all__:
    globals()[_name].__module__ = __name__  # pickles name a class by it: as users import it, wherever it is defined
