"""Modulations of another dtype than the stream: made under autocast, by quantised Linears, or by
some that are kept in float32.

Upstream's blocks, but for Wan's, cast nothing: PyTorch promotes, so a float32 gate makes a bfloat16
stream a float32 one. The ops cast everything to float32 and the results back where a modulation is
float32, as Wan's blocks do.
"""

from typing import Any

import torch
from torch import Tensor

from ..ops import reference
from ..ops.calls import NormScaleShift
from ..ops.quantization import Wanted


def modulated(norm: Any, x: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None = None, law: Wanted | None = None) -> Any:
    """``norm(x) * (1 + scale) + shift`` with a norm layer: x [B, S, D] -> [B, S, D], in the dtype
    that upstream's has.

    Quantised by ``law`` only where that is the dtype of x: the law has been asked for by it.
    """
    if scale.dtype is x.dtype or norm.rounding == "single":
        return norm(x, scale=scale, shift=shift, index=index, law=law)
    return modulate(norm(x), scale, shift, index)


def modulate(n: Tensor, scale: Tensor, shift: Tensor, index: Tensor | None = None) -> Tensor:
    """``n * (1 + scale) + shift`` as upstream's expression: n [B, S, D] -> [B, S, D]."""
    n = n.to(torch.promote_types(n.dtype, scale.dtype))
    return reference.norm_scale_shift(NormScaleShift(n, scale, shift, None, None, None, None, index, "layer", 0.0, "eager"), _unchanged)


def promoted(residual: Tensor, gate: Tensor, rounding: str) -> Tensor:
    """``residual`` in the dtype that upstream's has once ``gate * x`` was added to it."""
    if residual.dtype is gate.dtype or rounding == "single":
        return residual
    return residual.to(torch.promote_types(residual.dtype, gate.dtype))


def no_shift(scale: Tensor) -> Tensor:
    """A shift that changes no bit, not even of -0, for norms that have none: the fast kernels of a
    LayerNorm take scale and shift together.
    """
    return torch.full_like(scale, -0.0)


def _unchanged(x: Tensor) -> Tensor:
    return x
