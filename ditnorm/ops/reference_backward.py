"""The gradients of the rows of a norm site in plain PyTorch: the specification, the path where no
kernel runs, and what a second differentiation goes through.

    g  = dy * (1 + scale) * weight
    dv = (g - mean(g) - n * mean(g * n)) * rstd     n = norm(v), v being x or r; RMSNorm: no mean(g)
    d_residual = dr + dv,  dx = gate * (dr + dv)

Of a branch that is normed before it is added, ``dy * gate`` stands for ``dy * (1 + scale)``.

Under ``"eager"`` each gradient rounds where autograd of upstream's expression rounds it.
"""

from typing import Any

import torch
from torch import Tensor

from .calls import NormScaleShift, ScaleResidual, ScaleResidualNormScaleShift
from .calls_backward import (
    NormScaleResidualBackward,
    NormScaleShiftBackward,
    NormScaleShiftBackwardParts,
    ScaleResidualBackward,
    ScaleResidualNormScaleShiftBackward,
)
from .reference import modulation, upcast


def norm_scale_shift_backward(call: NormScaleShiftBackward) -> Tensor:
    """``dx``, contiguous, in the dtype of ``x``."""
    return _of_rows(call.site, call.x, call.dy, call.dr).to(call.x.dtype).contiguous()


def norm_scale_shift_backward_parts(call: NormScaleShiftBackwardParts) -> tuple[Tensor, Tensor]:
    """Two terms of the gradient of ``x``, contiguous, in its dtype: autograd adds them one after
    the other to what else comes back to ``x``.
    """
    scale = modulation(call.site, "scale", None)
    dn = call.dy if scale is None else call.dy * (1 + scale)
    direct, squared = diffusers_rms_norm_gradients(dn, call.x, call.weight, call.eps)
    return direct.contiguous(), squared.contiguous()


def scale_residual_norm_scale_shift_backward(call: ScaleResidualNormScaleShiftBackward) -> tuple[Tensor, Tensor]:
    """``(d_residual, dx)``, both contiguous, in the dtype of ``r``."""
    total = _of_rows(call.site, call.r, call.dy, call.dr)
    d_residual = total.to(call.r.dtype)
    d_branch = (d_residual if call.rounding == "eager" else total) * _gate(call.site)
    return d_residual.contiguous(), d_branch.to(call.r.dtype).contiguous()


def scale_residual_backward(call: ScaleResidualBackward) -> Tensor:
    """``dx``, contiguous, in the dtype of ``dr``."""
    return (call.dr * _gate(call.site)).to(call.dr.dtype).contiguous()


def norm_scale_residual_backward(call: NormScaleResidualBackward) -> Tensor:
    """``dx``, contiguous, in the dtype of ``x``."""
    gate = modulation(call.site, "gate", upcast(call.site))
    dn = call.dr if gate is None else call.dr * gate
    dv = _through_norm(dn, call.x, call.x_weight, call.eps, None, "diffusers_rms", call.rounding)
    return dv.to(call.x.dtype).contiguous()


def _gate(site: ScaleResidual | ScaleResidualNormScaleShift) -> Any:
    return modulation(site, "gate", upcast(site))


def _of_rows(site: NormScaleShift | ScaleResidualNormScaleShift, v: Tensor, dy: Tensor, dr: Tensor | None) -> Tensor:
    """What comes back to the rows ``v`` that were normed."""
    wide = upcast(site)
    scale = modulation(site, "scale", wide)
    dn = dy if wide is None else dy.to(wide)
    if scale is not None:
        dn = dn * (1 + scale)
    return _through_norm(dn, v, site.weight, site.eps, dr, site.norm, site.rounding)


def _through_norm(dn: Tensor, v: Tensor, weight: Tensor | None, eps: float, dr: Tensor | None, norm: str, rounding: str) -> Tensor:
    if rounding == "eager" and norm == "diffusers_rms":
        return diffusers_rms_norm_gradient(dn, v, weight, eps, dr)
    dv = norm_gradient(dn, v, weight, eps, centred=norm in ("layer", "fp32_layer"))
    if rounding == "eager":
        dv = dv.to(v.dtype)
    return dv if dr is None else dr + dv


def diffusers_rms_norm_gradient(dn: Tensor, v: Tensor, weight: Tensor | None, eps: float, dr: Tensor | None = None) -> Tensor:
    """The gradient of ``v`` through diffusers' ``RMSNorm``: what comes through its two uses of
    ``v`` is added to ``dr`` one after the other.
    """
    direct, squared = diffusers_rms_norm_gradients(dn, v, weight, eps)
    return (direct if dr is None else dr + direct) + squared


def diffusers_rms_norm_gradients(dn: Tensor, v: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """What comes through the product of ``v``, and through its mean of squares; each is rounded."""
    wide = torch.promote_types(v.dtype, torch.float32)
    x, dn = v.to(wide), (dn if weight is None else dn * weight).to(wide)
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    d_square = -0.5 * (dn * x).sum(-1, keepdim=True) * rstd.pow(3) / v.shape[-1]
    return (dn * rstd).to(v.dtype), (d_square * (2 * x)).to(v.dtype)


def norm_gradient(dn: Tensor, v: Tensor, weight: Tensor | None, eps: float, centred: bool) -> Tensor:
    """The gradient of ``v`` where ``dn`` is that of its LayerNorm or, if not ``centred``, RMSNorm,
    over the last dim; in float32 or wider.
    """
    dtype = torch.promote_types(torch.float32, v.dtype)
    v, g = v.to(dtype), dn.to(dtype)
    if weight is not None:
        g = g * weight.to(dtype)
    if centred:
        v = v - v.mean(-1, keepdim=True)
        g = g - g.mean(-1, keepdim=True)
    rstd = (v.square().mean(-1, keepdim=True) + eps).rsqrt()
    n = v * rstd
    return (g - n * (g * n).mean(-1, keepdim=True)) * rstd
