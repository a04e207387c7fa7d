"""The ops of norm sites in plain PyTorch: the specification, the path of every device without
kernels, and the fallback.

    r = residual + gate * x                      (``scale_residual``)
    y = norm(r) * (1 + scale) + shift            (``norm_scale_shift``)

A call rounds in one of two ways, between which :func:`upcast` decides:

- Everything is cast to one wide dtype first, and each stored result is rounded once.
  ``rounding="single"`` always does this, ``"eager"`` where ``WanTransformerBlock`` does it. That
  dtype is called ``wide`` here.
- Every operation runs, and rounds, in the dtype of its operands, as in
  ``QwenImageTransformerBlock``. Operands of several dtypes are promoted as upstream promotes them,
  and so are the results. ``wide`` is None then.

Either way ``rounding="eager"`` is what diffusers computes, rounding for rounding.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import (
    NormScaleResidual,
    NormScaleResidualNormScaleShift,
    NormScaleShift,
    SandwichCall,
    ScaleResidual,
    ScaleResidualNormScaleShift,
    SiteCall,
    modulations,
)
from .options import HALVES


def norm_scale_shift(call: NormScaleShift, norm: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """``y``, contiguous, in the dtype of ``x``, or where dtypes are mixed in the one that
    upstream's has. ``norm`` runs in place of the call's own.
    """
    return modulated_norm(call, call.x, upcast(call), norm)


def scale_residual_norm_scale_shift(
    call: ScaleResidualNormScaleShift, norm: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """``(y, r)``, both contiguous: ``r`` in the dtype of ``residual``, ``y`` in that of ``x``. The
    norm reads the rounded ``r``.

    Where dtypes are mixed under ``"eager"``, both have the dtypes of upstream's. ``norm`` runs in
    place of the call's own.
    """
    wide = upcast(call)
    r = _gated_residual(call, wide)
    return modulated_norm(call, r, wide, norm), r


def scale_residual(call: ScaleResidual) -> Tensor:
    """``r``, contiguous, in the dtype of ``residual``, or where dtypes are mixed in the one that
    upstream's has.
    """
    wide = upcast(call)
    # At the end of a block Wan casts x too, in the middle it doesn't. Only float64 shows it.
    gated = call if wide is None or call.gate is None else call._replace(x=call.x.to(wide))
    return _gated_residual(gated, wide)


def norm_scale_residual(call: NormScaleResidual) -> Tensor:
    """``r``, as of :func:`scale_residual`."""
    wide = upcast_sandwich(call)
    return _gated_residual(call.site._replace(x=normed_branch(call, wide)), wide)


def norm_scale_residual_norm_scale_shift(call: NormScaleResidualNormScaleShift) -> tuple[Tensor, Tensor]:
    """``(y, r)``, as of :func:`scale_residual_norm_scale_shift`."""
    wide = upcast_sandwich(call)
    r = _gated_residual(call.site._replace(x=normed_branch(call, wide)), wide)
    return modulated_norm(call.site, r, wide, None), r


def upcast_sandwich(call: SandwichCall) -> torch.dtype | None:
    """:func:`upcast` of such a call: under ``"eager"`` None, as diffusers' ``RMSNorm`` has it."""
    return upcast(call.site) if call.rounding == "single" else None


def normed_branch(call: SandwichCall, wide: torch.dtype | None) -> Tensor:
    """``norm(x)``, in ``wide`` if that is a dtype."""
    x, weight = call.x, call.x_weight
    if wide is None:
        return diffusers_rms_norm(x, weight, None, call.eps)
    return diffusers_rms_norm(x.to(wide), None if weight is None else weight.to(wide), None, call.eps)


def _gated_residual(call: ScaleResidual | ScaleResidualNormScaleShift, wide: torch.dtype | None) -> Tensor:
    residual, x, gate = call.residual, call.x, modulation(call, "gate", wide)
    # Without a gate upstream adds the two as they are.
    if wide is None or (gate is None and call.rounding == "eager"):
        return (residual + x if gate is None else residual + gate * x).contiguous()
    r = residual.to(wide) + (x.to(wide) if gate is None else gate * x)
    return r.to(residual.dtype).contiguous()


def modulated_norm(
    call: NormScaleShift | ScaleResidualNormScaleShift, x: Tensor, wide: torch.dtype | None, norm: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """``y``, where ``x`` is what is normed, ``wide`` the dtype of :func:`upcast`, and ``norm`` what
    runs in place of the call's own norm.
    """
    scale, shift = modulation(call, "scale", wide), modulation(call, "shift", wide)
    v = x if wide is None else x.to(wide)
    y = normalize(v, call) if norm is None else norm(v)
    if scale is not None:
        y = y * (1 + scale)
    if shift is not None:
        y = y + shift
    if wide is not None:
        y = y.to(call.x.dtype if call.rounding == "single" else x.dtype)
    return y.contiguous()


def normalize(x: Tensor, call: NormScaleShift | ScaleResidualNormScaleShift) -> Tensor:
    """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467) over the last dim, computed in a
    wider dtype than that of ``x`` if the norm or its affine has one.
    """
    weight, bias, dtype = call.weight, call.bias, x.dtype
    if call.norm == "diffusers_rms":
        if call.rounding == "single":
            weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
        return diffusers_rms_norm(x, weight, bias, call.eps)
    inside = dtype
    if call.norm == "fp32_layer":
        inside = torch.float32
    elif any(t is not None and t.dtype is not dtype for t in (weight, bias)):
        inside = torch.promote_types(torch.float32, dtype)
    x, weight, bias = x.to(inside), None if weight is None else weight.to(inside), None if bias is None else bias.to(inside)
    if call.norm == "rms":
        n = F.rms_norm(x, x.shape[-1:], weight, call.eps)
        n = n if bias is None else n + bias
    else:
        n = F.layer_norm(x, x.shape[-1:], weight, bias, call.eps)
    # Autocast makes some norms float32, and nothing makes them narrow again.
    return n if inside is dtype else n.to(dtype)


def diffusers_rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The ``RMSNorm`` of diffusers, which rounds to the dtype of its weight, where that is a narrow
    one, before it multiplies by it.
    """
    n = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return n.to(x.dtype)
    n = (n.to(weight.dtype) if weight.dtype in HALVES else n) * weight
    return n if bias is None else n + bias


def upcast(call: SiteCall) -> torch.dtype | None:
    """The dtype that a call casts everything to first, or None where every operation runs in the
    dtype of its operands.
    """
    given = [(m, table) for m, table in modulations(call).values() if m is not None]
    if call.rounding == "single":
        return torch.float64 if any(t.dtype is torch.float64 for t in call if isinstance(t, Tensor)) else torch.float32
    if not isinstance(call, ScaleResidual) and call.norm == "diffusers_rms":
        return None
    if any(table is not None for _, table in given):
        return torch.float32
    if call.x.dtype is torch.float64 or (not isinstance(call, NormScaleShift) and call.residual.dtype is not call.x.dtype):
        return None
    if given:
        return torch.float32 if any(m.dtype is torch.float32 for m, _ in given) else None
    return torch.float32 if not isinstance(call, ScaleResidual) and call.norm == "fp32_layer" else None


def modulation(call: SiteCall, name: str, wide: torch.dtype | None) -> Tensor | None:
    """A modulation as one row per sample or per token of ``x``, in ``wide`` if that is a dtype, its
    table added.
    """
    m: Tensor | None
    table: Tensor | None
    m, table = getattr(call, name), getattr(call, f"{name}_table")
    if m is None:
        return None
    # Before rows are selected, so that the gradients of a row are summed in the wide dtype.
    if wide is not None:
        m = m.to(wide)
    if call.index is not None:
        m = _select(m, call.index)
    elif m.dim() == 2:  # [B or 1, D]: per sample
        m = m[:, None]
    elif m.dim() == 4:  # [B or 1, F, 1, D]: per frame
        m = m[:, :, 0].repeat_interleave(call.x.shape[-2] // m.shape[1], dim=1)
    if m.dim() == 3 and call.x.dim() == 2:
        m = m[0]
    return m if table is None else m + table


def _select(rows: Tensor, index: Tensor) -> Tensor:
    """``rows`` [M, D] or [B or 1, M, D] at ``index`` [S] or [B or 1, S] -> [B or 1, S, D]; out of
    range an index gives a row of NaN.
    """
    rows = rows if rows.dim() == 3 else rows[None]
    index = (index if index.dim() == 2 else index[None])[..., None].long()
    inside = (index >= 0) & (index < rows.shape[1])
    # Two rows are selected as upstream does: the gradient of each is summed without rounding in
    # between.
    if rows.shape[1] == 2:
        taken = torch.where(index == 0, rows[:, :1], rows[:, 1:])
    else:
        batch = torch.arange(max(rows.shape[0], index.shape[0]), device=rows.device)[:, None]
        index = index.where(inside, 0).expand(batch.shape[0], -1, -1)[..., 0]
        taken = rows.expand(batch.shape[0], -1, -1).to(torch.promote_types(torch.float32, rows.dtype))[batch, index].to(rows.dtype)
    return taken.masked_fill(~inside, float("nan"))
