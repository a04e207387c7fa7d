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
    (query, key), (d_query, d_key), head_dim = saved[:2], grads, codes[0]
    d_query, d_key = _or_zeros(d_query, query, query.shape[1], head_dim), _or_zeros(d_key, key, key.shape[1], head_dim)
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

    return sums_over_rows(through_qk, saved, range(2, len(saved)), needed)


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
    """The path of the norm of query or key, which isn't rotated again. Where somebody trains the
    rotary tables, the path of the rotation.
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
    own, encoder = _places_of_tokens(saved, codes)
    of_query, of_key, of_encoder_query, of_encoder_key = (None,) * 4
    of_value = of_encoder_value = None
    if needed[0] or needed[1] or needed[3] or needed[4]:  # all but the values
        query, joint, head_dim = saved[0], own[1] + encoder[1], codes[0]
        d_query, d_key = _or_zeros(d_query, query, joint, head_dim), _or_zeros(d_key, query, joint, head_dim)
        found = maker("joint_qk_norm_rope_backward")(d_query, d_key, *saved, *codes)
        of_query, of_key, of_encoder_query, of_encoder_key = found
    if d_value is not None:
        batch, tokens, heads, head_dim = d_value.shape
        joined = d_value.reshape(batch, tokens, heads * head_dim)
        of_value, of_encoder_value = joined.narrow(1, *own), joined.narrow(1, *encoder)
    return of_query, of_key, of_value, of_encoder_query, of_encoder_key, of_encoder_value


def _joint_qk_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    def through_qk(tensors: Tensors) -> Paths:
        paths: Paths = []
        for place, stream in ((own, tensors[:6]), (encoder, tensors[6:])):
            for d, x, weight in zip(grads, stream[:2], stream[2:4], strict=False):  # not those of the values
                paths += _through_qk(None if d is None else d.narrow(1, *place), x, weight, *stream[4:], *options)
        return paths

    saved = _by_stream(saved)
    own, encoder = _places_of_tokens(saved, codes)
    head_dim, norm, eps, _, rounding = codes
    options: Tensors = (head_dim, QK_NORMS[norm], eps, ROUNDINGS[rounding])
    return sums_over_rows(through_qk, saved, (2, 3, 4, 5, 8, 9, 10, 11), needed)  # all but query and key of either stream


def _places_of_tokens(by_stream: Tensors, codes: Tensors) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where the tokens of the first and of the second stream stand in the joint tensors: start and
    length.
    """
    tokens, encoder_tokens, encoder_first = by_stream[0].shape[1], by_stream[6].shape[1], codes[3]
    return ((encoder_tokens, tokens), (0, encoder_tokens)) if encoder_first else ((0, tokens), (tokens, encoder_tokens))


def _or_zeros(grad: Tensor | None, x: Tensor, tokens: int, head_dim: int) -> Tensor:
    return x.new_zeros(x.shape[0], tokens, x.shape[2] // head_dim, head_dim) if grad is None else grad


def _keep_queries_and_keys(tensors: Tensors, outputs: Any, sums: bool) -> tuple[Tensors, Tensors]:
    """All but the values, whose gradients need nothing."""
    return (*tensors[:2], *tensors[7:9]), (*tensors[3:7], *tensors[10:])


def _by_stream(saved: Tensors) -> Tensors:
    """What :func:`_keep_queries_and_keys` kept, one stream after the other: query, key, their
    weights, cos and sin.
    """
    return *saved[:2], *saved[4:8], *saved[2:4], *saved[8:]


def _rows_of_streams(tensors: Tensors, codes: Tensors) -> tuple[Tensors, Tensors]:
    """Query, key and value of both streams, and the rest."""
    return (*tensors[:3], *tensors[7:10]), (*tensors[3:7], *tensors[10:])


GRADIENTS: Mapping[str, Gradients] = {
    "qk_norm_rope": Gradients(first_two, keep_two, _qk_rows, _qk_rest),
    "joint_qk_norm_rope": Gradients(_rows_of_streams, _keep_queries_and_keys, _joint_qk_rows, _joint_qk_rest),
}
