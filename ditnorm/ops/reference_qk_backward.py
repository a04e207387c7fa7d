"""The gradients of query and key through their rotation and norm in plain PyTorch: as
:mod:`ditnorm.ops.reference_backward`.

    (da, db) = (d_a * cos + d_b * sin, d_b * cos - d_a * sin)     for each pair of neighbours
    g = d * weight,  dx = (g - n * mean(g * n)) * rstd            n = x * rstd, over what is normed

``d`` may be a batch of gradients (``is_grads_batched``), for which PyTorch has rules of ``reshape``
and ``narrow``, and none of ``flatten``, ``unflatten`` and of an index that takes all.
"""

from typing import Any

import torch
from torch import Tensor

from .calls_backward import JointQKNormRopeBackward, QKNormRopeBackward
from .reference_backward import diffusers_rms_norm_gradient, norm_gradient
from .reference_qk import per_head, token_count


def qk_norm_rope_backward(call: QKNormRopeBackward) -> tuple[Tensor, Tensor]:
    """``(d_query, d_key)``, contiguous, in the shapes of query and key."""
    options: tuple[Any, ...] = (call.head_dim, call.norm, call.eps, call.rounding, call.pairs)
    d_query = _norm_rope_backward(call.d_query, call.query, call.query_weight, call.cos, call.sin, *options)
    d_key = _norm_rope_backward(call.d_key, call.key, call.key_weight, *call.forward.key_tables, *options)
    return d_query.contiguous(), d_key.contiguous()


def joint_qk_norm_rope_backward(call: JointQKNormRopeBackward) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(d_query, d_key, d_encoder_query, d_encoder_key)``, contiguous, in the shapes of those."""
    options: tuple[Any, ...] = (call.head_dim, call.norm, call.eps, call.rounding)
    tokens, encoder_tokens = call.query.shape[1], call.encoder_query.shape[1]
    first, encoder_first = (encoder_tokens, 0) if call.encoder_first else (0, tokens)
    own, encoder = (1, first, tokens), (1, encoder_first, encoder_tokens)
    tables: tuple[Any, ...] = (call.encoder_cos, call.encoder_sin, *options)
    gradients = (
        _norm_rope_backward(call.d_query.narrow(*own), call.query, call.query_weight, call.cos, call.sin, *options),
        _norm_rope_backward(call.d_key.narrow(*own), call.key, call.key_weight, call.cos, call.sin, *options),
        _norm_rope_backward(call.d_query.narrow(*encoder), call.encoder_query, call.encoder_query_weight, *tables),
        _norm_rope_backward(call.d_key.narrow(*encoder), call.encoder_key, call.encoder_key_weight, *tables),
    )
    d_query, d_key, d_encoder_query, d_encoder_key = (gradient.contiguous() for gradient in gradients)
    return d_query, d_key, d_encoder_query, d_encoder_key


def _norm_rope_backward(
    d: Tensor,
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
    """``d`` [B, S, H, d] -> the gradient of ``x`` [B, S, H * d]."""
    if rounding == "single":
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = _norm_rope_backward(
            d.to(dtype), x.to(dtype), None if weight is None else weight.to(dtype), cos, sin, head_dim, norm, eps, "eager", pairs
        )
        return wide.to(x.dtype)
    d = rope_backward(d, cos, sin, pairs)
    across = weight is not None and weight.shape[0] != head_dim
    rows = x if across else x.unflatten(-1, (-1, head_dim))
    d = d.reshape(x.shape) if across else d
    if norm == "rms":
        gradient = norm_gradient(d, rows, weight, eps, centred=False).to(x.dtype)
    else:
        gradient = diffusers_rms_norm_gradient(d, rows, weight, eps)
    return gradient.reshape(x.shape)


def rope_backward(d: Tensor, cos: Tensor | None, sin: Tensor | None, pairs: str = "neighbours") -> Tensor:
    """``d`` [B, S, H, d] -> the gradient of what was rotated: of as many tokens as ``cos`` has."""
    if cos is None:
        return d
    tokens = token_count(cos)
    turned = _rotate_backward(d.narrow(1, 0, tokens), cos, sin, pairs)
    rest = d.shape[1] - tokens
    return turned if rest == 0 else torch.cat([turned, d.narrow(1, tokens, rest)], dim=1)


def _rotate_backward(d: Tensor, cos: Tensor, sin: Tensor | None, pairs: str) -> Tensor:
    """The gradient of what :func:`ditnorm.ops.reference_qk.rotate` was given. With real tables each
    product is rounded before the sum, except of halves.
    """
    if sin is not None and pairs != "neighbours":
        cos, sin = per_head(cos), per_head(sin)
        a, b = d.float().chunk(2, dim=-1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).to(d.dtype)
    if sin is None:
        turned = torch.view_as_complex(_paired(d.float().contiguous())) * per_head(cos).conj()
        return torch.view_as_real(turned).reshape(d.shape).type_as(d)
    cos, sin = per_head(cos), per_head(sin)
    if cos.shape[-1] == d.shape[-1]:
        (cos_a, cos_b), (sin_a, sin_b) = (_paired(table).unbind(-1) for table in (cos, sin))
    else:
        cos_a = cos_b = cos
        sin_a = sin_b = sin
    a, b = _paired(d).unbind(-1)
    da = (a * cos_a).to(d.dtype) + (b * sin_b).to(d.dtype)
    db = (b * cos_b).to(d.dtype) - (a * sin_a).to(d.dtype)
    return torch.stack([da, db], dim=-1).reshape(d.shape)


def _paired(t: Tensor) -> Tensor:
    """The neighbours of the last dim: [..., n] -> [..., n / 2, 2]."""
    return t.reshape(*t.shape[:-1], t.shape[-1] // 2, 2)
