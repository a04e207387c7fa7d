"""The ops in plain PyTorch: the specification, the path of every device without kernels, and the fallback.

    r = residual + gate * x                      (``scale_residual``)
    y = norm(r) * (1 + scale) + shift            (``norm_scale_shift``)

``rounding="eager"`` is what diffusers computes, rounding for rounding. Its law has one dtype L (``law_dtype``): with L = float32
everything is upcast first and each stored result is rounded once, as in ``WanTransformerBlock``; otherwise every operation runs,
and rounds, in the dtype of its operands, as in ``QwenImageTransformerBlock``. Operands of several dtypes are promoted there as
upstream promotes them, and so are the results. ``rounding="single"`` is the float32 law for all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Modulation = tuple[Tensor | None, Tensor | None]
"""A modulation and the table that is added to it in float32; either may be missing (a table alone is an error)."""


def norm_scale_shift(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_table: Tensor | None,
    shift_table: Tensor | None,
    index: Tensor | None,
    norm: str,
    eps: float,
    rounding: str,
) -> Tensor:
    """``y``, contiguous, in the dtype of ``x``, or where dtypes are mixed in the one that upstream's has."""
    law = law_dtype(x, ((scale, scale_table), (shift, shift_table)), norm, rounding)
    scale, shift = broadcast(scale, scale_table, index, x, law), broadcast(shift, shift_table, index, x, law)
    y = modulate(normalize(x, weight, bias, norm, eps, law), scale, shift)
    return stored(y, x, x, law, rounding).contiguous()


def scale_residual_norm_scale_shift(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate_table: Tensor | None,
    scale_table: Tensor | None,
    shift_table: Tensor | None,
    index: Tensor | None,
    norm: str,
    eps: float,
    rounding: str,
) -> tuple[Tensor, Tensor]:
    """``(y, r)``, both contiguous: ``r`` in the dtype of ``residual``, ``y`` in that of ``x``. The norm reads the rounded ``r``.

    Where dtypes are mixed under ``"eager"``, both have the dtypes of upstream's.
    """
    law = law_dtype(x, ((gate, gate_table), (scale, scale_table), (shift, shift_table)), norm, rounding, residual)
    r = add_gated(residual, x, broadcast(gate, gate_table, index, x, law), law, rounding)
    scale, shift = broadcast(scale, scale_table, index, x, law), broadcast(shift, shift_table, index, x, law)
    y = modulate(normalize(r, weight, bias, norm, eps, law), scale, shift)
    return stored(y, x, r, law, rounding).contiguous(), r


def scale_residual(
    residual: Tensor, x: Tensor, gate: Tensor | None, gate_table: Tensor | None, index: Tensor | None, rounding: str
) -> Tensor:
    """``r``, contiguous, in the dtype of ``residual``, or where dtypes are mixed in the one that upstream's has."""
    law = law_dtype(x, ((gate, gate_table),), "layer", rounding, residual)
    return add_gated(residual, x, broadcast(gate, gate_table, index, x, law), law, rounding)


def law_dtype(
    x: Tensor, modulations: tuple[Modulation, ...], norm: str, rounding: str, residual: Tensor | None = None
) -> torch.dtype | None:
    """L, the dtype of the law: one for a whole call. None where ``x`` and ``residual`` differ and PyTorch promotes them."""
    dtypes = [m.dtype for m, _ in modulations if m is not None]
    if rounding == "single" or any(table is not None for _, table in modulations):
        return torch.float32
    if residual is not None and residual.dtype is not x.dtype:
        return None
    if torch.float32 in dtypes or (not dtypes and norm == "fp32_layer"):
        return torch.float32
    return dtypes[0] if dtypes else x.dtype


def add_gated(residual: Tensor, x: Tensor, gate: Tensor | None, law: torch.dtype | None, rounding: str) -> Tensor:
    # Without a gate upstream adds the two as they are, under either law; of two equal dtypes that is the same.
    if law is not torch.float32 or (gate is None and rounding == "eager"):
        return (residual + x if gate is None else residual + gate * x).contiguous()
    r = residual.float() + (x.float() if gate is None else gate * x.float())
    return r.to(residual.dtype).contiguous()


def stored(y: Tensor, x: Tensor, r: Tensor, law: torch.dtype | None, rounding: str) -> Tensor:
    """``y`` in the dtype in which it leaves the op: upstream casts under the float32 law only, to that of ``r``."""
    if rounding == "single":
        return y.to(x.dtype)
    return y.to(r.dtype) if law is torch.float32 else y


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float, law: torch.dtype | None) -> Tensor:
    """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467) over the last dim, in float32 if the law or the affine asks for it."""
    dtype = x.dtype
    wide = law is torch.float32 or norm == "fp32_layer" or any(t is not None and t.dtype is not dtype for t in (weight, bias))
    if wide:
        x, weight, bias = x.float(), None if weight is None else weight.float(), None if bias is None else bias.float()
    if norm == "rms":
        n = F.rms_norm(x, x.shape[-1:], weight, eps)
        n = n if bias is None else n + bias
    else:
        n = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return n.to(dtype) if wide and law is not torch.float32 else n


def modulate(n: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is not None:
        n = n * (1 + scale)
    return n if shift is None else n + shift


def broadcast(m: Tensor | None, table: Tensor | None, index: Tensor | None, x: Tensor, law: torch.dtype | None) -> Tensor | None:
    """The modulation as one row per sample or per token of ``x``, its table added, in the dtype in which the law reads it."""
    if m is None:
        return None
    if index is not None:
        m = _take(m, index)
    elif m.dim() == 2:  # [B or 1, D]: per sample
        m = m[:, None]
    elif m.dim() == 4:  # [B or 1, F, 1, D]: per frame
        m = m[:, :, 0].repeat_interleave(x.shape[-2] // m.shape[1], dim=1)
    if m.dim() == 3 and x.dim() == 2:
        m = m[0]
    if law is torch.float32:
        m = m.float()
    return m if table is None else m + table.float()


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """``rows`` [M, D] or [B or 1, M, D] at ``index`` [S] or [B, S] -> [B or 1, S, D]; an index out of range gives a row of NaN."""
    rows = rows if rows.dim() == 3 else rows[None]
    index = (index if index.dim() == 2 else index[None]).long()
    inside = (index >= 0) & (index < rows.shape[1])
    batch = torch.arange(max(rows.shape[0], index.shape[0]), device=rows.device)[:, None]
    taken = rows.expand(batch.shape[0], -1, -1)[batch, index.where(inside, 0).expand(batch.shape[0], -1)]
    return taken.masked_fill(~inside[..., None], float("nan"))
