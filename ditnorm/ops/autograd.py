"""Gradients of the ops.

:class:`Fused` is a kernel with others that make the gradients of its rows: ``x``, ``residual``,
query, key and value, and what an activation takes, which are all that LoRA training wants.
Gradients that are sums over rows, of modulations, tables, gates and weights, are those of the
expression that has the tensor in it, in PyTorch's operations, whose order is fixed.
:class:`Recompute` is a kernel with all gradients from the reference, which is run again for them.

The inference call never comes here: a Python autograd formula on the op itself would cost it
microseconds even under ``no_grad``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..swapping.torch_private import outlived_transform, without_transforms
from .options import NORMS, QK_NORMS, ROUNDINGS
from .reference import diffusers_rms_norm, modulation, normalize, upcast
from .reference_qk import norm_rope
from .reference_qk import normalize as normalize_heads
from .reference_qk_backward import rope_backward
from .table import OPS, Op

Tensors = tuple[Any, ...]


class Recompute(torch.autograd.Function):
    """``kernel(*tensors, *codes)`` with the gradients of the reference of ``op``, called with
    ``(*tensors, *options)``.
    """

    @staticmethod
    def forward(ctx: Any, op: Op, kernel: Callable[..., Any], codes: tuple[Any, ...], options: tuple[Any, ...], *tensors: Any) -> Any:
        ctx.op, ctx.options = op, options
        ctx.save_for_backward(*tensors)
        return kernel(*tensors, *codes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        needed = ctx.needs_input_grad[4:]
        with torch.enable_grad():
            tensors = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
            outputs = ctx.op.expression(*tensors, *ctx.options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # r depends on none of the norm's arguments. Where only those need gradients, it has none.
        reached = [(output, grad) for output, grad in zip(outputs, grad_outputs, strict=True) if output.requires_grad]
        wanted = [t for t, need in zip(tensors, needed, strict=True) if need and t is not None]
        grads = iter(torch.autograd.grad([output for output, _ in reached], wanted, [grad for _, grad in reached]))
        return None, None, None, None, *(next(grads) if need else None for need in needed)


@dataclass(frozen=True)
class Gradients:
    """How the gradients of an op are made, and what is kept for them."""

    parts: Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]
    """Of the op's tensors and numbers: its rows, and the rest. A row of which autograd is to add
    two gradients stands there twice.
    """
    saved: Callable[[Tensors, Any, bool], Tensors]
    """Of the op's tensors and results, what is kept, and whether for sums, too."""
    of_rows: Callable[[Tensors, Tensors, Tensors, Sequence[bool]], Tensors]
    """Of the gradients of the results, what was kept, the op's numbers, and which of its rows want
    gradients: those gradients.
    """
    of_rest: Callable[[Tensors, Tensors, Tensors, Tensors, Sequence[bool]], Tensors]
    """The same with the gradients of the rows in the second place, of the rest."""

    def call(self, kernel: Callable[..., Any], tensors: Tensors, codes: Tensors) -> Any:
        """``kernel(*tensors, *codes)`` as a function of its tensors; None where kernels don't make
        its gradients.
        """
        inputs, rest = self.parts(tensors, codes)
        apply, dtype = _apply, inputs[0].dtype
        for row in inputs:
            if row is not None:
                if row.dtype is not dtype:
                    return None
                if outlived_transform(row):
                    apply = Fused.apply
        for t in rest:
            if t is not None and t.requires_grad:
                inputs, apply = (*inputs, *rest), Fused.apply
                break
        return apply((self, kernel, tensors, codes), *inputs)

    def are_of_rows(self, tensors: Tensors, codes: Tensors) -> bool:
        """Whether nothing but rows wants one, and kernels make them."""
        rows, rest = self.parts(tensors, codes)
        dtypes = {row.dtype for row in rows if row is not None}
        return len(dtypes) == 1 and not any(t is not None and t.requires_grad for t in rest)


class Fused(torch.autograd.Function):
    """``kernel(*tensors, *codes)`` with the gradients of ``gradients``: the four are ``call``.
    ``inputs``: its rows, and where something else wants a gradient, the rest. All that isn't among
    them costs nothing.
    """

    @staticmethod
    def forward(ctx: Any, call: Tensors, *inputs: Any) -> Any:
        gradients, kernel, tensors, codes = call
        outputs = kernel(*tensors, *codes)
        ctx.gradients, ctx.codes = gradients, codes
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gradients.saved(tensors, outputs, len(inputs) >= len(tensors)))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gradients, codes, saved, needed = ctx.gradients, ctx.codes, ctx.saved_tensors, ctx.needs_input_grad[1:]
        rows = gradients.of_rows(grads, saved, codes, needed)
        if len(needed) == len(rows):
            return None, *rows
        return None, *rows, *gradients.of_rest(grads, rows, saved, codes, needed[len(rows) :])


_apply = without_transforms(Fused)


def _maker(name: str) -> Callable[..., Any]:
    """An op that makes gradients; where these are to be differentiated, its reference."""
    return _expression(name) if torch.is_grad_enabled() else kernel_of(name)


def kernel_of(name: str) -> Callable[..., Any]:
    """The op of a name, which looking up costs half a microsecond."""
    kernel = _kernels.get(name)  # no functools.cache, of which Dynamo warns where it traces a backward pass
    if kernel is None:
        kernel = _kernels[name] = getattr(torch.ops.ditnorm, name).default
    return kernel


_kernels: dict[str, Callable[..., Any]] = {}


def _expression(name: str) -> Callable[..., Any]:
    op = OPS[name]
    return lambda *arguments: op.reference(op.named(arguments))


Paths = list[tuple[Tensor, Tensor]]
"""Tensors that a result is made of, as wide as it, each with its gradient."""


def _sums(paths: Callable[[Tensors], Paths], tensors: Tensors, places: Sequence[int | None], needed: Sequence[bool]) -> Tensors:
    """The gradients of the tensors at ``places`` that want one: those that are sums over rows of
    what comes through ``paths``. None at the place None.
    """
    wanted = [place for place, need in zip(places, needed, strict=True) if need and place is not None and tensors[place] is not None]
    if not wanted:
        return (None,) * len(places)
    # Kept tensors have their history, which a second differentiation goes through.
    twice = torch.is_grad_enabled()
    inputs: Tensors = tuple(
        t if t is None else t.view_as(t) if twice else _leaf(t, place in wanted)  # one tensor may stand at two places
        for place, t in enumerate(tensors)
    )
    with torch.enable_grad():
        reached = [(result, grad) for result, grad in paths(inputs) if result.requires_grad]
    outputs, cotangents = [result for result, _ in reached], [grad for _, grad in reached]
    found = torch.autograd.grad(outputs, [inputs[place] for place in wanted], cotangents, create_graph=twice, allow_unused=True)
    of = dict(zip(wanted, found, strict=True))
    return tuple(None if place is None else of.get(place) for place in places)


def _leaf(t: Tensor, wanted: bool) -> Tensor:
    """``t`` without its history. What has none is left alone: no view is made of a gradient that is
    one of a batch (``is_grads_batched``).
    """
    return t.detach().requires_grad_(wanted) if wanted or t.requires_grad else t


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
        parts: Tensors = _maker("norm_scale_shift_backward_parts")(grads[0], x, scale, weight, index, codes[1])
        return parts
    return (_maker("norm_scale_shift_backward")(grads[0], None, x, scale, shift, weight, *rest, *codes),)


def _norm_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    op = OPS["norm_scale_shift"]
    return _sums(lambda tensors: _through_norm(op.named((*tensors, *codes)), grads[0]), saved, range(1, 8), needed)


def _residual_norm_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    dy, dr = grads
    r, _, gate, scale, shift, weight, _, gate_table, *rest = saved
    if dy is None:  # nobody used y
        return _residual_rows((dr,), (None, gate, gate_table, rest[-1]), codes[-1:], needed)
    if gate is None:
        total = _maker("norm_scale_shift_backward")(dy, dr, r, scale, shift, weight, *rest, *codes)
        return total, total
    rows: Tensors = _maker("scale_residual_norm_scale_shift_backward")(dy, dr, r, gate, scale, shift, weight, gate_table, *rest, *codes)
    return rows


def _residual_norm_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    op = OPS["scale_residual_norm_scale_shift"]
    r, _, *rest = saved

    def through_norm(tensors: Tensors) -> Paths:
        return _through_norm(op.named((r, *tensors[1:], *codes))._replace(x=tensors[0]), grads[0])

    of_gate = _sums(lambda tensors: _through_gate(op.named((*tensors, *codes)), rows[0]), saved, (2, *_NONE[:4], 7, *_NONE[:3]), needed)
    if grads[0] is None:
        return of_gate
    found = _sums(through_norm, (r, r, *rest), (None, 3, 4, 5, 6, None, 8, 9, None), needed)
    return tuple(a if b is None else b for a, b in zip(of_gate, found, strict=True))


def _residual_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    (dr,) = grads
    _, gate, gate_table, index = saved
    if gate is None or not needed[1]:
        return dr, dr
    return dr, _maker("scale_residual_backward")(dr, gate, gate_table, index, *codes)


def _residual_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    op = OPS["scale_residual"]
    return _sums(lambda tensors: _through_gate(op.named((*tensors, *codes)), grads[0]), (grads[0], *saved), (2, 3, None), needed)


def _branch_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    (dr,) = grads
    return dr, _maker("norm_scale_residual_backward")(dr, *saved, *codes) if needed[1] else None


def _branch_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    op, (dr,) = OPS["norm_scale_residual"], grads

    def through_branch(tensors: Tensors) -> Paths:
        call = op.named((dr, *tensors, *codes))
        law = upcast(call.site) if call.rounding == "single" else None
        x, weight = (t if t is None or law is None else t.to(law) for t in (call.x, call.x_weight))
        n, gate, d = diffusers_rms_norm(x, weight, None, call.eps), modulation(call.site, "gate", law), dr if law is None else dr.to(law)
        paths = [] if gate is None or not gate.requires_grad else [(gate.expand(n.shape), d * n)]
        return [*paths, (n, d if gate is None else d * gate)]

    return _sums(through_branch, saved, (1, 2, None), needed)


def _branch_norm_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    dy, dr = grads
    r, x, x_weight, gate, scale, shift, weight, index = saved
    if dy is not None:
        selecting = None if scale is None and shift is None else index
        dr = _maker("norm_scale_shift_backward")(dy, dr, r, scale, shift, weight, None, None, selecting, _DIFFUSERS_RMS, *codes)
    selecting = None if gate is None else index
    return dr, _maker("norm_scale_residual_backward")(dr, x, x_weight, gate, selecting, *codes) if needed[1] else None


def _branch_norm_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    op, (r, x, x_weight, gate, scale, shift, weight, index) = OPS["norm_scale_shift"], saved
    of_branch = _branch_rest(rows[:1], (), (x, x_weight, gate, None if gate is None else index), codes, (*needed[:2], False))[:2]
    if grads[0] is None:
        return *of_branch, *_NONE
    selecting = None if scale is None and shift is None else index

    def through_norm(tensors: Tensors) -> Paths:
        return _through_norm(op.named((*tensors, None, None, None, selecting, _DIFFUSERS_RMS, *codes)), grads[0])

    return *of_branch, *_sums(through_norm, (r, scale, shift, weight), (1, 2, 3), needed[2:5]), None


def _gelu_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    """PyTorch's own is one kernel."""
    (x,) = saved
    d_beside, dy = _parted(grads[0], x)
    return torch.ops.aten.gelu_backward.default(dy, x, approximate="tanh") if needed[0] else None, d_beside


def _swiglu_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    d_beside, dy = _parted(grads[0], saved[0])
    return *(_maker("swiglu_backward")(dy, *saved, *codes) if needed[0] or needed[1] else (None, None)), d_beside


def _parted(d: Tensor, x: Tensor) -> tuple[Tensor | None, Tensor]:
    """Of the gradient of what was written: that of what stands beside the activation of ``x``, and
    that of the activation.
    """
    width, beside = x.shape[-1], d.shape[-1] - x.shape[-1]
    return (d.narrow(-1, 0, beside), d.narrow(-1, beside, width)) if beside else (None, d)


def _no_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    return ()


def _qk_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    if not (needed[0] or needed[1]):
        return None, None
    query, key = saved[:2]
    d_query, d_key = _or_zeros(grads[0], query, query.shape[1], codes[0]), _or_zeros(grads[1], key, key.shape[1], codes[0])
    rows: Tensors = _maker("qk_norm_rope_backward")(d_query, d_key, *saved, *codes)
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

    return _sums(through_qk, saved, range(2, 8), needed)


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
    return [(normalize_heads(x, weight, head_dim, norm, eps), rope_backward(d, cos, sin, pairs))]


def _joint_qk_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    d_query, d_key, d_value = grads
    query, tokens, encoder_tokens = saved[0], saved[0].shape[1], saved[6].shape[1]
    own: Tensors = (None,) * 4
    values: Tensors = None, None
    if needed[0] or needed[1] or needed[3] or needed[4]:
        joint = tokens + encoder_tokens
        d_query, d_key = _or_zeros(d_query, query, joint, codes[0]), _or_zeros(d_key, query, joint, codes[0])
        own = _maker("joint_qk_norm_rope_backward")(d_query, d_key, *saved, *codes)
    if d_value is not None:
        joined = d_value.reshape(*d_value.shape[:2], -1)
        start, encoder_start = (encoder_tokens, 0) if codes[3] else (0, tokens)
        values = joined.narrow(1, start, tokens), joined.narrow(1, encoder_start, encoder_tokens)
    return own[0], own[1], values[0], own[2], own[3], values[1]


def _joint_qk_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    def through_qk(tensors: Tensors) -> Paths:
        paths: Paths = []
        for place, stream in ((own, tensors[:6]), (encoder, tensors[6:])):
            for d, x, weight in zip(grads, stream[:2], stream[2:4], strict=False):  # not those of the values
                paths += _through_qk(None if d is None else d[:, place], x, weight, *stream[4:], *options)
        return paths

    options: Tensors = (codes[0], QK_NORMS[codes[1]], codes[2], ROUNDINGS[codes[4]])
    tokens, encoder_tokens = saved[0].shape[1], saved[6].shape[1]
    first, encoder_first = (encoder_tokens, 0) if codes[3] else (0, tokens)
    own, encoder = slice(first, first + tokens), slice(encoder_first, encoder_first + encoder_tokens)
    return _sums(through_qk, saved, (2, 3, 4, 5, 8, 9, 10, 11), needed)


def _or_zeros(grad: Tensor | None, x: Tensor, tokens: int, head_dim: int) -> Tensor:
    return x.new_zeros(x.shape[0], tokens, x.shape[2] // head_dim, head_dim) if grad is None else grad


def _all(tensors: Tensors, outputs: Any, sums: bool) -> Tensors:
    return tensors


def _sum_and_branch(tensors: Tensors, outputs: Any, sums: bool) -> Tensors:
    """r, not what it is the sum of: the stream of residuals is alive anyway; for a gate's gradient
    x, too.
    """
    return outputs[1], tensors[1] if sums and _wanted(tensors, 2, 7) else None, *tensors[2:]


def _branch(tensors: Tensors, outputs: Any, sums: bool) -> Tensors:
    return tensors[1] if sums and _wanted(tensors, 2, 3) else None, *tensors[2:]


def _normed_branch(tensors: Tensors, outputs: Any, sums: bool) -> Tensors:
    return tensors[1:]


def _sum_and_normed_branch(tensors: Tensors, outputs: Any, sums: bool) -> Tensors:
    """As :func:`_sum_and_branch`."""
    return outputs[1], *tensors[1:]


def _activated(tensors: Tensors, outputs: Any, sums: bool) -> Tensors:
    return tensors[:-1]


def _wanted(tensors: Tensors, *places: int) -> bool:
    return any(tensors[place] is not None and tensors[place].requires_grad for place in places)


def _queries_and_keys(tensors: Tensors, outputs: Any, sums: bool) -> Tensors:
    return *tensors[:2], *tensors[3:9], *tensors[10:]


def _uses_x_twice(codes: Tensors) -> bool:
    """Whether a norm is diffusers' ``RMSNorm`` under ``"eager"``: what comes through each use is
    rounded, and what else comes back to ``x`` is added before it.
    """
    return bool(codes[0] == _DIFFUSERS_RMS and codes[2] == _EAGER)


def _one(tensors: Tensors, codes: Tensors) -> tuple[Tensors, Tensors]:
    if _uses_x_twice(codes):
        return (tensors[0], tensors[0]), tensors[1:]
    return tensors[:1], tensors[1:]


def _two(tensors: Tensors, codes: Tensors) -> tuple[Tensors, Tensors]:
    return tensors[:2], tensors[2:]


def _every(tensors: Tensors, codes: Tensors) -> tuple[Tensors, Tensors]:
    return tensors, ()


def _two_streams(tensors: Tensors, codes: Tensors) -> tuple[Tensors, Tensors]:
    return (*tensors[:3], *tensors[7:10]), (*tensors[3:7], *tensors[10:])


_NONE = (None,) * 4
_DIFFUSERS_RMS, _EAGER = NORMS.index("diffusers_rms"), ROUNDINGS.index("eager")

GRADIENTS: Mapping[str, Gradients] = {
    "norm_scale_shift": Gradients(_one, _all, _norm_rows, _norm_rest),
    "scale_residual_norm_scale_shift": Gradients(_two, _sum_and_branch, _residual_norm_rows, _residual_norm_rest),
    "scale_residual": Gradients(_two, _branch, _residual_rows, _residual_rest),
    "norm_scale_residual": Gradients(_two, _normed_branch, _branch_rows, _branch_rest),
    "norm_scale_residual_norm_scale_shift": Gradients(_two, _sum_and_normed_branch, _branch_norm_rows, _branch_norm_rest),
    "gelu": Gradients(_every, _activated, _gelu_rows, _no_rest),
    "swiglu": Gradients(_every, _activated, _swiglu_rows, _no_rest),
    "qk_norm_rope": Gradients(_two, _all, _qk_rows, _qk_rest),
    "joint_qk_norm_rope": Gradients(_two_streams, _queries_and_keys, _joint_qk_rows, _joint_qk_rest),
}
"""By the op's name."""
