"""Gradients of the norm sites and of the gated residual.

Of each op there are the functions that :class:`ditnorm.ops.autograd.Gradients` asks for: which of
its tensors are rows, what it keeps (``_keep_*``), the gradients of rows (``_*_rows``), and those of
the rest, sums over rows (``_*_rest``). What is kept stands in the order of the op's arguments.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import Gradients, Tensors
from .calls import ScaleResidual, ScaleResidualNormScaleShift
from .gradients_common import Paths, first_two, maker, sums_over_rows
from .options import NORMS, ROUNDINGS
from .reference import modulation, normalize, normed_branch, upcast, upcast_sandwich
from .table import OPS

_DIFFUSERS_RMS, _EAGER = NORMS.index("diffusers_rms"), ROUNDINGS.index("eager")
_GATE, _GATE_TABLE = map(ScaleResidualNormScaleShift._fields.index, ("gate", "gate_table"))
_RESIDUAL_GATE, _RESIDUAL_GATE_TABLE = map(ScaleResidual._fields.index, ("gate", "gate_table"))


def _places_behind_rows(op: str, *names: str) -> tuple[int | None, ...]:
    """For each tensor of an op with two rows that stands behind these: its place, if it is one of
    ``names``.
    """
    call: Any = OPS[op].call
    fields = call._fields[: OPS[op].tensors]
    return tuple(place if name in names else None for place, name in enumerate(fields) if place >= 2)


_BY_GATE = _places_behind_rows("scale_residual_norm_scale_shift", "gate", "gate_table")
_BY_NORM = _places_behind_rows("scale_residual_norm_scale_shift", "scale", "shift", "weight", "bias", "scale_table", "shift_table")
_BY_RESIDUAL_GATE = _places_behind_rows("scale_residual", "gate", "gate_table")


def _through_norm(call: Any, dy: Tensor) -> Paths:
    """The paths of ``y = n * (1 + scale) + shift``, for which ``y`` isn't computed again."""
    wide = upcast(call)
    v, dy = (call.x, dy) if wide is None else (call.x.to(wide), dy.to(wide))
    scale, shift, n = modulation(call, "scale", wide), modulation(call, "shift", wide), normalize(v, call)
    paths = [] if shift is None else [(shift.expand(v.shape), dy)]
    if scale is not None and scale.requires_grad:
        paths.append((scale.expand(v.shape), dy * n))
    if n.requires_grad:
        paths.append((n, dy if scale is None else dy * (1 + scale)))
    return paths


def _through_gate(call: Any, dr: Tensor) -> Paths:
    """The path of the gate in ``r = residual + gate * x``: in the dtype of the product."""
    gate: Any = modulation(call, "gate", upcast(call))
    return [(gate.expand(call.x.shape), dr.to(torch.result_type(gate, call.x)) * call.x)]


# norm_scale_shift


def _uses_x_twice(codes: Tensors) -> bool:
    """Whether the norm is diffusers' ``RMSNorm`` under ``"eager"``. What comes back through each of
    its two uses of ``x`` is rounded, and added after what else comes back to ``x``. So autograd is
    given both.
    """
    norm, _, rounding = codes
    return bool(norm == _DIFFUSERS_RMS and rounding == _EAGER)


def _x_and_rest(tensors: Tensors, codes: Tensors) -> tuple[Tensors, Tensors]:
    if _uses_x_twice(codes):
        return (tensors[0], tensors[0]), tensors[1:]
    return tensors[:1], tensors[1:]


def _keep_x(tensors: Tensors, outputs: Any, sums: bool) -> tuple[Tensors, Tensors]:
    return tensors[:1], tensors[1:]


def _norm_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    twice = _uses_x_twice(codes)
    if not needed[0]:
        return (None, None) if twice else (None,)
    x, scale, shift, weight, _, *tables_and_index = saved
    if twice:
        _, eps, _ = codes
        index = None if scale is None else tables_and_index[-1]
        parts: Tensors = maker("norm_scale_shift_backward_parts")(grads[0], x, scale, weight, index, eps)
        return parts
    return (maker("norm_scale_shift_backward")(grads[0], None, x, scale, shift, weight, *tables_and_index, *codes),)


def _norm_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    op = OPS["norm_scale_shift"]
    return sums_over_rows(lambda tensors: _through_norm(op.named((*tensors, *codes)), grads[0]), saved, range(1, len(saved)), needed)


# scale_residual_norm_scale_shift


def _keep_r_and_branch(tensors: Tensors, outputs: Any, sums: bool) -> tuple[Tensors, Tensors]:
    """``r`` in the place of ``residual``, since the stream of residuals is alive anyway, and ``x``
    where the gate's gradient needs it.
    """
    return (outputs[1], tensors[1] if sums and _want_gradients(tensors, _GATE, _GATE_TABLE) else None), tensors[2:]


def _residual_norm_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    dy, dr = grads
    r, _, gate, scale, shift, weight, _, gate_table, *tables_and_index = saved
    if dy is None:  # nobody used y
        return _residual_rows((dr,), (None, gate, gate_table, tables_and_index[-1]), codes[-1:], needed)
    if gate is None:
        total = maker("norm_scale_shift_backward")(dy, dr, r, scale, shift, weight, *tables_and_index, *codes)
        return total, total
    rows: Tensors = maker("scale_residual_norm_scale_shift_backward")(
        dy, dr, r, gate, scale, shift, weight, gate_table, *tables_and_index, *codes
    )
    return rows


def _residual_norm_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    op = OPS["scale_residual_norm_scale_shift"]
    r, _, *rest = saved

    def through_gate(tensors: Tensors) -> Paths:
        return _through_gate(op.named((*tensors, *codes)), rows[0])

    def through_norm(tensors: Tensors) -> Paths:
        return _through_norm(op.named((r, *tensors[1:], *codes))._replace(x=tensors[0]), grads[0])

    of_gate = sums_over_rows(through_gate, saved, _BY_GATE, needed)
    if grads[0] is None:
        return of_gate
    of_norm = sums_over_rows(through_norm, (r, r, *rest), _BY_NORM, needed)
    return tuple(a if b is None else b for a, b in zip(of_gate, of_norm, strict=True))


# scale_residual


def _keep_branch(tensors: Tensors, outputs: Any, sums: bool) -> tuple[Tensors, Tensors]:
    """``x`` where the gate's gradient needs it; nothing needs ``residual``."""
    return (tensors[1] if sums and _want_gradients(tensors, _RESIDUAL_GATE, _RESIDUAL_GATE_TABLE) else None,), tensors[2:]


def _residual_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    (dr,) = grads
    _, gate, gate_table, index = saved
    if gate is None or not needed[1]:
        return dr, dr
    return dr, maker("scale_residual_backward")(dr, gate, gate_table, index, *codes)


def _residual_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    op, (dr,) = OPS["scale_residual"], grads
    return sums_over_rows(lambda tensors: _through_gate(op.named((*tensors, *codes)), dr), (dr, *saved), _BY_RESIDUAL_GATE, needed)


# norm_scale_residual


def _keep_normed_branch(tensors: Tensors, outputs: Any, sums: bool) -> tuple[Tensors, Tensors]:
    return tensors[1:2], tensors[2:]


def _branch_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    (dr,) = grads
    return dr, maker("norm_scale_residual_backward")(dr, *saved, *codes) if needed[1] else None


def _branch_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    op, (dr,) = OPS["norm_scale_residual"], grads

    def through_branch(tensors: Tensors) -> Paths:
        call = op.named((dr, *tensors, *codes))
        wide = upcast_sandwich(call)
        n, gate, d = normed_branch(call, wide), modulation(call.site, "gate", wide), dr if wide is None else dr.to(wide)
        paths = [] if gate is None or not gate.requires_grad else [(gate.expand(n.shape), d * n)]
        return [*paths, (n, d if gate is None else d * gate)]

    return sums_over_rows(through_branch, saved, (1, 2, None), needed)  # saved: x, x_weight, gate, index


# norm_scale_residual_norm_scale_shift


def _keep_r_and_normed_branch(tensors: Tensors, outputs: Any, sums: bool) -> tuple[Tensors, Tensors]:
    """``r`` in the place of ``residual``, as :func:`_keep_r_and_branch`, and ``x``."""
    return (outputs[1], tensors[1]), tensors[2:]


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
        return *of_branch, None, None, None, None
    selecting = None if scale is None and shift is None else index

    def through_norm(tensors: Tensors) -> Paths:
        return _through_norm(op.named((*tensors, None, None, None, selecting, _DIFFUSERS_RMS, *codes)), grads[0])

    return *of_branch, *sums_over_rows(through_norm, (r, scale, shift, weight), (1, 2, 3), needed[2:5]), None


def _want_gradients(tensors: Tensors, *places: int) -> bool:
    return any(tensors[place] is not None and tensors[place].requires_grad for place in places)


GRADIENTS: Mapping[str, Gradients] = {
    "norm_scale_shift": Gradients(_x_and_rest, _keep_x, _norm_rows, _norm_rest),
    "scale_residual_norm_scale_shift": Gradients(first_two, _keep_r_and_branch, _residual_norm_rows, _residual_norm_rest),
    "scale_residual": Gradients(first_two, _keep_branch, _residual_rows, _residual_rest),
    "norm_scale_residual": Gradients(first_two, _keep_normed_branch, _branch_rows, _branch_rest),
    "norm_scale_residual_norm_scale_shift": Gradients(first_two, _keep_r_and_normed_branch, _branch_norm_rows, _branch_norm_rest),
}
