"""Which layer stands in for a norm at a site of a fused body, and the call that it makes there."""

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import (
    LayerNormScaleShift,
    NormScaleShiftLayer,
    ScaleResidualIdentity,
    ScaleResidualLayerNormScaleShift,
    ScaleResidualNormScaleShift,
)
from ..swapping.hook_chains import wrapped
from ..swapping.norm_kinds import norm_kind, unknown_norm
from ..swapping.originals import full_name
from .sites import Site


class FP32LayerNormScaleShift(LayerNormScaleShift):
    """:class:`LayerNormScaleShift` of diffusers' ``FP32LayerNorm``."""

    norm = "fp32_layer"


class ScaleResidualFP32LayerNormScaleShift(ScaleResidualLayerNormScaleShift):
    """:class:`ScaleResidualNormScaleShift` of diffusers' ``FP32LayerNorm``."""

    norm = "fp32_layer"


class LendsWeight:
    """A norm that an op may compute together with what stands around it. Called without a tensor it
    returns a copy of its weight.

    Hooks of offloading and layerwise casting put the right weight in place for the time of the call
    only. After it they swap it out, and a transfer on another stream may overwrite its memory
    before an op has read it.
    """

    weight: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return None if self.weight is None else self.weight.clone()


def weight_of(norm: Any) -> Tensor | None:
    """The weight of a norm that lends it: through a call where a hook wraps its forward."""
    weight: Tensor | None = norm() if "forward" in norm.__dict__ and wrapped(norm) else norm.weight
    return weight


class _DiffusersRMSNorm(LendsWeight):
    """What the layers over diffusers' ``RMSNorm`` share."""

    norm = "diffusers_rms"
    rounding: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        return nn.Module.__call__(self)

    def extra_repr(self) -> str:
        return f"rounding={self.rounding!r}"


class DiffusersRMSNormScaleShift(_DiffusersRMSNorm, NormScaleShiftLayer):
    """``RMSNorm(x) * (1 + scale) + shift`` of diffusers' ``RMSNorm``."""


class ScaleResidualDiffusersRMSNormScaleShift(_DiffusersRMSNorm, ScaleResidualNormScaleShift):
    """:class:`ScaleResidualNormScaleShift` of diffusers' ``RMSNorm``."""


_LAYERS: dict[tuple[type, str | None], type] = {
    (LayerNormScaleShift, "layer"): LayerNormScaleShift,
    (LayerNormScaleShift, "fp32_layer"): FP32LayerNormScaleShift,
    (ScaleResidualNormScaleShift, "layer"): ScaleResidualLayerNormScaleShift,
    (ScaleResidualNormScaleShift, "fp32_layer"): ScaleResidualFP32LayerNormScaleShift,
    (ScaleResidualNormScaleShift, "identity"): ScaleResidualIdentity,
    (DiffusersRMSNormScaleShift, "diffusers_rms"): DiffusersRMSNormScaleShift,
    (ScaleResidualDiffusersRMSNormScaleShift, "diffusers_rms"): ScaleResidualDiffusersRMSNormScaleShift,
}


def layer_for(expected: type, norm: nn.Module, upstream: type, modulated: bool) -> tuple[type | None, str | None]:
    """The layer that a site that expects ``expected`` needs for ``norm``, of the class
    ``upstream``; or None and why there is none.
    """
    kind = norm_kind(upstream)
    if kind is None:
        return None, unknown_norm(upstream)
    layer = _LAYERS.get((expected, kind))
    if layer is None or (layer is ScaleResidualIdentity and modulated):
        return None, f"no fused layer stands in for {full_name(upstream)} here"
    if len(shape_of(norm) or (1,)) != 1:
        return None, "it norms over more than the last dim"
    return layer, None


def layers_at(expected: type, modulated: bool) -> tuple[type, ...]:
    """The layers that a site that expects ``expected`` can call."""
    return (expected,) if modulated else (expected, ScaleResidualIdentity)


def norm_call(layer: Any, norm: Any, width: int, dtype: torch.dtype, table: torch.dtype | None, modulated: bool) -> Site:
    """The call that ``layer`` makes in the place of ``norm``, on a stream of ``width``."""
    if layer is ScaleResidualIdentity:
        return Site("scale_residual", width, dtype, table=table)
    op = "scale_residual_norm_scale_shift" if issubclass(layer, ScaleResidualNormScaleShift) else "norm_scale_shift"
    return Site(op, width, dtype, layer.norm, norm.eps, dtype_of(norm.weight), dtype_of(norm.bias), table, modulated)


def shape_of(norm: Any) -> tuple[int, ...] | None:
    """The shape that a norm goes over. None for a module that doesn't say one."""
    shape = getattr(norm, "normalized_shape", getattr(norm, "dim", None))
    return shape if isinstance(shape, tuple) else None


def dtype_of(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype
