"""QK normalisation and rotary embedding in plain PyTorch: the specification, the path of every
device without kernels, and the fallback.

    n = rms_norm(x) * weight                            over each head, or across all heads
    (a, b) -> (a * cos - b * sin, b * cos + a * sin)    for each pair of neighbours of n, or of its
                                                        halves (RoPE, arXiv:2104.09864)

``rounding="eager"`` is what diffusers' attention processors compute, rounding for rounding: the
norm as its module computes it, the rotation in float32 from the rounded norm. ``rounding="single"``
is float32 throughout with one rounding of the result.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import JointQKNormRope, QKNormRope
from .reference import diffusers_rms_norm


def qk_norm_rope(call: QKNormRope) -> tuple[Tensor, Tensor]:
    """``(query, key)``, each [B, S, H, d], contiguous."""
    options: tuple[Any, ...] = (call.head_dim, call.norm, call.eps, call.rounding, call.pairs)
    q = norm_rope(call.query, call.query_weight, call.cos, call.sin, *options)
    k = norm_rope(call.key, call.key_weight, *call.key_tables, *options)
    return q.contiguous(), k.contiguous()


def joint_qk_norm_rope(call: JointQKNormRope) -> tuple[Tensor, Tensor, Tensor]:
    """``(query, key, value)`` of both streams, one after the other along the tokens, each [B, S, H,
    d], contiguous.
    """
    options = (call.head_dim, call.norm, call.eps, call.rounding)
    own = (
        norm_rope(call.query, call.query_weight, call.cos, call.sin, *options),
        norm_rope(call.key, call.key_weight, call.cos, call.sin, *options),
        call.value.unflatten(-1, (-1, call.head_dim)),
    )
    encoder = (
        norm_rope(call.encoder_query, call.encoder_query_weight, call.encoder_cos, call.encoder_sin, *options),
        norm_rope(call.encoder_key, call.encoder_key_weight, call.encoder_cos, call.encoder_sin, *options),
        call.encoder_value.unflatten(-1, (-1, call.head_dim)),
    )
    first, second = (encoder, own) if call.encoder_first else (own, encoder)
    q, k, v = (torch.cat(pair, dim=1) for pair in zip(first, second, strict=True))
    return q, k, v


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    head_dim: int,
    norm: str,
    eps: float,
    rounding: str,
    pairs: str = "neighbours",
) -> Tensor:
    """``x`` [B, S, H * d] normed, its leading tokens rotated, as many as ``cos`` has -> [B, S, H,
    d].
    """
    if rounding == "single":
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = None if weight is None else weight.to(dtype)
        cos, sin = (t if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in (cos, sin))
        return norm_rope(x.to(dtype), weight, cos, sin, head_dim, norm, eps, "eager", pairs).to(x.dtype)
    n = normalize(x, weight, head_dim, norm, eps)
    if cos is None:
        return n
    rotated = rotate(n[:, : token_count(cos)], cos, sin, pairs)
    return rotated if rotated.shape[1] == n.shape[1] else torch.cat([rotated, n[:, rotated.shape[1] :]], dim=1)


def normalize(x: Tensor, weight: Tensor | None, head_dim: int, norm: str, eps: float) -> Tensor:
    """RMSNorm (arXiv:1910.07467) of ``x`` [B, S, H * d], across all heads if ``weight`` is as long,
    else of each -> [B, S, H, d].
    """
    across = weight is not None and weight.shape[0] != head_dim
    if x.stride(-1) != 1:
        x = x.contiguous()
    if not across:
        x = x.unflatten(-1, (-1, head_dim))
    n = F.rms_norm(x, x.shape[-1:], weight, eps) if norm == "rms" else diffusers_rms_norm(x, weight, None, eps)
    return n.unflatten(-1, (-1, head_dim)) if across else n


def rotate(x: Tensor, cos: Tensor, sin: Tensor | None, pairs: str = "neighbours") -> Tensor:
    """``x`` [B, S, H, d] rotated, pair by pair, by tables as of the op."""
    if sin is not None and pairs != "neighbours":
        return rotate_halves(x, per_head(cos), per_head(sin))
    if sin is None:  # complex: diffusers' apply_rotary_emb_qwen
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * per_head(cos)
        return torch.view_as_real(turned).flatten(3).type_as(x)
    cos, sin = per_head(cos), per_head(sin)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    if cos.shape[-1] == x.shape[-1]:  # a value for each element: diffusers' apply_rotary_emb
        turned = torch.stack([-b, a], dim=-1).flatten(3)
        return (x.float() * cos + turned.float() * sin).to(x.dtype)
    out = torch.empty_like(x)  # a value for each pair: WanAttnProcessor
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [B, S, H, d] with the two halves of each head rotated against each other: LTX-2's
    ``apply_split_rotary_emb``, operation for operation.
    """
    cos, sin = (table if table.dim() == 4 else table[None] for table in (cos, sin))
    cos, sin = (table.transpose(1, 2).unsqueeze(-2) for table in (cos, sin))
    halves = x.transpose(1, 2).unflatten(-1, (2, -1)).float()
    out = halves * cos
    out[..., :1, :].addcmul_(-sin, halves[..., 1:, :])
    out[..., 1:, :].addcmul_(sin, halves[..., :1, :])
    return out.flatten(-2).transpose(1, 2).to(x.dtype)


def token_count(table: Tensor) -> int:
    """The tokens of a rotary table [S, n], [B, S, n], [B, S, 1, n] or [B, S, H, n]."""
    return table.shape[0] if table.dim() == 2 else table.shape[1]


def per_head(table: Tensor) -> Tensor:
    return table if table.dim() == 4 else table.unsqueeze(-2)
