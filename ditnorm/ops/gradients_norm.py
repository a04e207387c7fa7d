"""Gradients of the norm sites and of the gated residual."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import Gradients, Tensors
from .gradients_common import Paths, first_two, maker, sums_over_rows
from .options import NORMS, ROUNDINGS
from .reference import diffusers_rms_norm, modulation, normalize, upcast
from .table import OPS

_NONE = (None,) * 4
_DIFFUSERS_RMS, _EAGER = NORMS.index("diffusers_rms"), ROUNDINGS.index("eager")


def _through_norm(call: Any, dy: Tensor) -> Paths:
    """Of ``y = n * (1 + scale) + shift``, without computing it again."""
    law = upcast(call)
    v, dy = (call.x, dy) if law is None else (call.x.to(law), dy.to(law))
    scale, shift, n = modulation(call, "scale", law), modulation(call, "shift", law), normalize(v, call)
    paths = [] if shift is None else [(shift.expand(v.shape), dy)]
    if scale is not None and scale.requires_grad:
        paths.append((scale.expand(v.shape), dy * n))
    if n.requires_grad:
        paths.append((n, dy if scale is None else dy * (1 + scale)))
    return paths


def _through_gate(call: Any, dr: Tensor) -> Paths:
    """Of ``r = residual + gate * x``: in the dtype of the product."""
    gate: Any = modulation(call, "gate", upcast(call))
    return [(gate.expand(call.x.shape), dr.to(torch.result_type(gate, call.x)) * call.x)]


def _norm_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    twice = _uses_x_twice(codes)
    if not needed[0]:
        return (None, None) if twice else (None,)
    x, scale, shift, weight, _, *rest = saved
    if twice:
        index = None if scale is None else rest[-1]
        parts: Tensors = maker("norm_scale_shift_backward_parts")(grads[0], x, scale, weight, index, codes[1])
        return parts
    return (maker("norm_scale_shift_backward")(grads[0], None, x, scale, shift, weight, *rest, *codes),)


def _norm_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    op = OPS["norm_scale_shift"]
    return sums_over_rows(lambda tensors: _through_norm(op.named((*tensors, *codes)), grads[0]), saved, range(1, 8), needed)


def _residual_norm_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    dy, dr = grads
    r, _, gate, scale, shift, weight, _, gate_table, *rest = saved
    if dy is None:  # nobody used y
        return _residual_rows((dr,), (None, gate, gate_table, rest[-1]), codes[-1:], needed)
    if gate is None:
        total = maker("norm_scale_shift_backward")(dy, dr, r, scale, shift, weight, *rest, *codes)
        return total, total
    rows: Tensors = maker("scale_residual_norm_scale_shift_backward")(dy, dr, r, gate, scale, shift, weight, gate_table, *rest, *codes)
    return rows


def _residual_norm_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    op = OPS["scale_residual_norm_scale_shift"]
    r, _, *rest = saved

    def through_norm(tensors: Tensors) -> Paths:
        return _through_norm(op.named((r, *tensors[1:], *codes))._replace(x=tensors[0]), grads[0])

    of_gate = sums_over_rows(
        lambda tensors: _through_gate(op.named((*tensors, *codes)), rows[0]), saved, (2, *_NONE[:4], 7, *_NONE[:3]), needed
    )
    if grads[0] is None:
        return of_gate
    found = sums_over_rows(through_norm, (r, r, *rest), (None, 3, 4, 5, 6, None, 8, 9, None), needed)
    return tuple(a if b is None else b for a, b in zip(of_gate, found, strict=True))


def _residual_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    (dr,) = grads
    _, gate, gate_table, index = saved
    if gate is None or not needed[1]:
        return dr, dr
    return dr, maker("scale_residual_backward")(dr, gate, gate_table, index, *codes)


def _residual_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    op = OPS["scale_residual"]
    return sums_over_rows(lambda tensors: _through_gate(op.named((*tensors, *codes)), grads[0]), (grads[0], *saved), (2, 3, None), needed)


def _branch_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    (dr,) = grads
    return dr, maker("norm_scale_residual_backward")(dr, *saved, *codes) if needed[1] else None


def _branch_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    op, (dr,) = OPS["norm_scale_residual"], grads

    def through_branch(tensors: Tensors) -> Paths:
        call = op.named((dr, *tensors, *codes))
        law = upcast(call.site) if call.rounding == "single" else None
        x, weight = (t if t is None or law is None else t.to(law) for t in (call.x, call.x_weight))
        n, gate, d = diffusers_rms_norm(x, weight, None, call.eps), modulation(call.site, "gate", law), dr if law is None else dr.to(law)
        paths = [] if gate is None or not gate.requires_grad else [(gate.expand(n.shape), d * n)]
        return [*paths, (n, d if gate is None else d * gate)]

    return sums_over_rows(through_branch, saved, (1, 2, None), needed)


def _branch_norm_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    dy, dr = grads
    r, x, x_weight, gate, scale, shift, weight, index = saved
    if dy is not None:
        selecting = None if scale is None and shift is None else index
        dr = maker("norm_scale_shift_backward")(dy, dr, r, scale, shift, weight, None, None, selecting, _DIFFUSERS_RMS, *codes)
    selecting = None if gate is None else index
    return dr, maker("norm_scale_residual_backward")(dr, x, x_weight, gate, selecting, *codes) if needed[1] else None


def _branch_norm_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    op, (r, x, x_weight, gate, scale, shift, weight, index) = OPS["norm_scale_shift"], saved
    of_branch = _branch_rest(rows[:1], (), (x, x_weight, gate, None if gate is None else index), codes, (*needed[:2], False))[:2]
    if grads[0] is None:
        return *of_branch, *_NONE
    selecting = None if scale is None and shift is None else index

    def through_norm(tensors: Tensors) -> Paths:
        return _through_norm(op.named((*tensors, None, None, None, selecting, _DIFFUSERS_RMS, *codes)), grads[0])

    return *of_branch, *sums_over_rows(through_norm, (r, scale, shift, weight), (1, 2, 3), needed[2:5]), None


def _normed(tensors: Tensors, outputs: Any, sums: bool) -> tuple[Tensors, Tensors]:
    return tensors[:1], tensors[1:]


def _sum_and_branch(tensors: Tensors, outputs: Any, sums: bool) -> tuple[Tensors, Tensors]:
    """r, not what it is the sum of: the stream of residuals is alive anyway; for a gate's gradient
    x, too.
    """
    return (outputs[1], tensors[1] if sums and _wanted(tensors, 2, 7) else None), tensors[2:]


def _branch(tensors: Tensors, outputs: Any, sums: bool) -> tuple[Tensors, Tensors]:
    return (tensors[1] if sums and _wanted(tensors, 2, 3) else None,), tensors[2:]


def _normed_branch(tensors: Tensors, outputs: Any, sums: bool) -> tuple[Tensors, Tensors]:
    return tensors[1:2], tensors[2:]


def _sum_and_normed_branch(tensors: Tensors, outputs: Any, sums: bool) -> tuple[Tensors, Tensors]:
    """As :func:`_sum_and_branch`."""
    return (outputs[1], tensors[1]), tensors[2:]


def _wanted(tensors: Tensors, *places: int) -> bool:
    return any(tensors[place] is not None and tensors[place].requires_grad for place in places)


def _uses_x_twice(codes: Tensors) -> bool:
    """Whether a norm is diffusers' ``RMSNorm`` under ``"eager"``: what comes through each use is
    rounded, and what else comes back to ``x`` is added before it.
    """
    return bool(codes[0] == _DIFFUSERS_RMS and codes[2] == _EAGER)


def _one(tensors: Tensors, codes: Tensors) -> tuple[Tensors, Tensors]:
    if _uses_x_twice(codes):
        return (tensors[0], tensors[0]), tensors[1:]
    return tensors[:1], tensors[1:]


GRADIENTS: Mapping[str, Gradients] = {
    "norm_scale_shift": Gradients(_one, _normed, _norm_rows, _norm_rest),
    "scale_residual_norm_scale_shift": Gradients(first_two, _sum_and_branch, _residual_norm_rows, _residual_norm_rest),
    "scale_residual": Gradients(first_two, _branch, _residual_rows, _residual_rest),
    "norm_scale_residual": Gradients(first_two, _normed_branch, _branch_rows, _branch_rest),
    "norm_scale_residual_norm_scale_shift": Gradients(first_two, _sum_and_normed_branch, _branch_norm_rows, _branch_norm_rest),
}
