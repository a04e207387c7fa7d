"""Gradients of query and key, normed and rotated."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import Gradients, Tensors
from .gradients_common import Paths, first_two, keep_two, maker, sums_over_rows
from .options import QK_NORMS, ROUNDINGS
from .reference_qk import norm_rope, normalize
from .reference_qk_backward import rope_backward
from .table import OPS


def _qk_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    if not (needed[0] or needed[1]):
        return None, None
    query, key = saved[:2]
    d_query, d_key = _or_zeros(grads[0], query, query.shape[1], codes[0]), _or_zeros(grads[1], key, key.shape[1], codes[0])
    rows: Tensors = maker("qk_norm_rope_backward")(d_query, d_key, *saved, *codes)
    return rows


def _qk_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    op = OPS["qk_norm_rope"]

    def through_qk(tensors: Tensors) -> Paths:
        call = op.named((*tensors, *codes))
        options: Tensors = (call.head_dim, call.norm, call.eps, call.rounding, call.pairs)
        return [
            *_through_qk(grads[0], call.query, call.query_weight, call.cos, call.sin, *options),
            *_through_qk(grads[1], call.key, call.key_weight, *call.key_tables, *options),
        ]

    return sums_over_rows(through_qk, saved, range(2, 8), needed)


def _through_qk(
    d: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    head_dim: int,
    norm: str,
    eps: float,
    rounding: str,
    pairs: str = "neighbours",
) -> Paths:
    """Of the norm of query or key, without rotating it again; of the rotation where somebody trains
    that.
    """
    if d is None:
        return []
    if any(table is not None and table.requires_grad for table in (cos, sin)):
        return [(norm_rope(x, weight, cos, sin, head_dim, norm, eps, rounding, pairs), d)]
    if weight is None:
        return []
    if rounding == "single":
        wide = torch.promote_types(x.dtype, torch.float32)
        d, x, weight = d.to(wide), x.to(wide), weight.to(wide)
    return [(normalize(x, weight, head_dim, norm, eps), rope_backward(d, cos, sin, pairs))]


def _joint_qk_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    d_query, d_key, d_value = grads
    saved = _by_stream(saved)
    query, tokens, encoder_tokens = saved[0], saved[0].shape[1], saved[6].shape[1]
    own: Tensors = (None,) * 4
    values: Tensors = None, None
    if needed[0] or needed[1] or needed[3] or needed[4]:
        joint = tokens + encoder_tokens
        d_query, d_key = _or_zeros(d_query, query, joint, codes[0]), _or_zeros(d_key, query, joint, codes[0])
        own = maker("joint_qk_norm_rope_backward")(d_query, d_key, *saved, *codes)
    if d_value is not None:
        batch, joint, heads, head_dim = d_value.shape
        joined = d_value.reshape(batch, joint, heads * head_dim)
        start, encoder_start = (encoder_tokens, 0) if codes[3] else (0, tokens)
        values = joined.narrow(1, start, tokens), joined.narrow(1, encoder_start, encoder_tokens)
    return own[0], own[1], values[0], own[2], own[3], values[1]


def _joint_qk_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    def through_qk(tensors: Tensors) -> Paths:
        paths: Paths = []
        for place, stream in ((own, tensors[:6]), (encoder, tensors[6:])):
            for d, x, weight in zip(grads, stream[:2], stream[2:4], strict=False):  # not those of the values
                paths += _through_qk(None if d is None else d.narrow(1, *place), x, weight, *stream[4:], *options)
        return paths

    saved = _by_stream(saved)
    options: Tensors = (codes[0], QK_NORMS[codes[1]], codes[2], ROUNDINGS[codes[4]])
    tokens, encoder_tokens = saved[0].shape[1], saved[6].shape[1]
    first, encoder_first = (encoder_tokens, 0) if codes[3] else (0, tokens)
    own, encoder = (first, tokens), (encoder_first, encoder_tokens)
    return sums_over_rows(through_qk, saved, (2, 3, 4, 5, 8, 9, 10, 11), needed)


def _or_zeros(grad: Tensor | None, x: Tensor, tokens: int, head_dim: int) -> Tensor:
    return x.new_zeros(x.shape[0], tokens, x.shape[2] // head_dim, head_dim) if grad is None else grad


def _queries_and_keys(tensors: Tensors, outputs: Any, sums: bool) -> tuple[Tensors, Tensors]:
    return (*tensors[:2], *tensors[7:9]), (*tensors[3:7], *tensors[10:])


def _by_stream(saved: Tensors) -> Tensors:
    """What :func:`_queries_and_keys` kept: of each stream query, key, their weights and tables."""
    return *saved[:2], *saved[4:8], *saved[2:4], *saved[8:]


def _two_streams(tensors: Tensors, codes: Tensors) -> tuple[Tensors, Tensors]:
    return (*tensors[:3], *tensors[7:10]), (*tensors[3:7], *tensors[10:])


GRADIENTS: Mapping[str, Gradients] = {
    "qk_norm_rope": Gradients(first_two, keep_two, _qk_rows, _qk_rest),
    "joint_qk_norm_rope": Gradients(_two_streams, _queries_and_keys, _joint_qk_rows, _joint_qk_rest),
}
