"""Gradients of the ops.

:class:`Fused` is a kernel with others that make the gradients of its rows: ``x``, ``residual``,
query, key and value, which are all that LoRA training wants. Gradients that are sums over rows, of
modulations, tables, gates and weights, are those of the expression that has the tensor in it, in
PyTorch's operations, whose order is fixed. :class:`Recompute` is a kernel with all gradients from
the reference, which is run again for them.

The inference call never comes here: a Python autograd formula on the op itself would cost it
microseconds even under ``no_grad``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .reference import modulated_norm, modulation, upcast
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

    rows: tuple[int, ...]
    """The places of its rows among the op's tensors."""
    saved: Callable[[Tensors, Any, Sequence[bool]], Tensors]
    """Of the op's tensors and results, given which tensors want gradients, what is kept."""
    of: Callable[[Tensors, Tensors, Tensors, Sequence[bool]], dict[int, Tensor | None]]
    """Of the gradients of the results, what was kept, the op's numbers, and which tensors want
    gradients: those gradients, by their places.
    """
    without: str | None = None
    """A norm whose gradients no kernel makes."""

    def serves(self, tensors: Tensors, options: Tensors) -> bool:
        """Whether the kernels do: all rows are of one dtype."""
        first, *others = (tensors[place].dtype for place in self.rows)
        return self.without not in options and all(dtype is first for dtype in others)


class Fused(torch.autograd.Function):
    """``kernel(*tensors, *codes)`` with the gradients of ``GRADIENTS[name]``."""

    @staticmethod
    def forward(ctx: Any, name: str, kernel: Callable[..., Any], codes: tuple[Any, ...], *tensors: Any) -> Any:
        outputs = kernel(*tensors, *codes)
        ctx.gradients, ctx.codes = GRADIENTS[name], codes
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*ctx.gradients.saved(tensors, outputs, ctx.needs_input_grad[3:]))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        needed = ctx.needs_input_grad[3:]
        gradients = ctx.gradients.of(grad_outputs, ctx.saved_tensors, ctx.codes, needed)
        return None, None, None, *(gradients.get(place) if need else None for place, need in enumerate(needed))


def _run(name: str, *arguments: Any) -> Any:
    """An op that makes gradients; where these are to be differentiated, its reference."""
    if torch.is_grad_enabled():
        op = OPS[name]
        return op.reference(op.named(arguments))
    return getattr(torch.ops.ditnorm, name).default(*arguments)


def _sums(
    expression: Callable[[Tensors], Tensors], grads: Tensors, tensors: Tensors, needed: Sequence[bool], places: Iterable[int]
) -> dict[int, Tensor | None]:
    """The gradients of the tensors at ``places`` that want one through ``expression`` of all: those
    that are sums over rows.
    """
    wanted = [place for place in places if needed[place] and tensors[place] is not None]
    if not wanted:
        return {}
    # Kept tensors have their history, which a second differentiation goes through.
    twice = torch.is_grad_enabled()
    inputs = [t if t is None or twice else t.detach().requires_grad_(place in wanted) for place, t in enumerate(tensors)]
    with torch.enable_grad():
        results = zip(expression(tuple(inputs)), grads, strict=True)
    reached = [(result, grad) for result, grad in results if grad is not None and result.requires_grad]
    outputs, cotangents = [result for result, _ in reached], [grad for _, grad in reached]
    found = torch.autograd.grad(outputs, [inputs[place] for place in wanted], cotangents, create_graph=twice, allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def _norm(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> dict[int, Tensor | None]:
    x, scale, shift, weight, _, scale_table, shift_table, index = saved
    op = OPS["norm_scale_shift"]
    found = _sums(lambda tensors: (op.reference(op.named((*tensors, *codes))),), grads, saved, needed, range(1, 7))
    if needed[0]:
        rest = (scale, shift, weight, scale_table, shift_table, index)
        found[0] = _run("norm_scale_shift_backward", *grads, None, x, *rest, *codes)
    return found


def _residual_norm(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> dict[int, Tensor | None]:
    dy, dr = grads
    r, x, gate, scale, shift, weight, _, gate_table, scale_table, shift_table, index = saved
    if dy is None:  # nobody used y
        places = {0: 0, 1: 1, 2: 2, 3: 7, 4: 10}
        of_residual = _residual((dr,), (x, gate, gate_table, index), codes[-1:], [needed[place] for place in places.values()])
        return {places[place]: gradient for place, gradient in of_residual.items()}
    op = OPS["scale_residual_norm_scale_shift"]

    def of_norm(tensors: Tensors) -> Tensors:
        call = op.named((r, *tensors[1:], *codes))._replace(x=tensors[0])
        return (modulated_norm(call, tensors[0], upcast(call), None),)

    found = _sums(of_norm, (dy,), (r, r, *saved[2:]), needed, (3, 4, 5, 6, 8, 9))
    rows = (r, scale, shift, weight)
    if gate is None:
        total = _run("norm_scale_shift_backward", dy, dr, *rows, scale_table, shift_table, index, *codes)
        return found | {0: total, 1: total}
    tables = (gate_table, scale_table, shift_table)
    total, of_x = _run("scale_residual_norm_scale_shift_backward", dy, dr, r, gate, *rows[1:], *tables, index, *codes)
    found |= {0: total, 1: of_x}

    return found | _sums(lambda tensors: (_gated(op.named((*tensors, *codes))),), (total,), saved, needed, (2, 7))


def _residual(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> dict[int, Tensor | None]:
    (dr,) = grads
    _, gate, gate_table, index = saved
    if gate is None:
        return {0: dr, 1: dr}
    op = OPS["scale_residual"]
    found = _sums(lambda tensors: (_gated(op.named((*tensors, *codes))),), grads, (dr, *saved), needed, (2, 3))
    if needed[1]:
        found[1] = _run("scale_residual_backward", dr, gate, gate_table, index, *codes)
    return found | {0: dr}


def _gated(call: Any) -> Tensor:
    """What a gate lets through, in the dtype of the sum that its gradient comes from."""
    gate: Any = modulation(call, "gate", upcast(call))
    return (gate * call.x).to(call.residual.dtype)


def _qk(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> dict[int, Tensor | None]:
    op = OPS["qk_norm_rope"]
    found = _sums(lambda tensors: op.reference(op.named((*tensors, *codes))), grads, saved, needed, range(2, 6))
    if needed[0] or needed[1]:
        d_query, d_key = (_or_zeros(grad, x, x.shape[1], codes[0]) for grad, x in zip(grads, saved[:2], strict=True))
        found |= dict(enumerate(_run("qk_norm_rope_backward", d_query, d_key, *saved, *codes)))
    return found


def _joint_qk(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> dict[int, Tensor | None]:
    *_, d_value = grads
    query, encoder_query, encoder_first = saved[0], saved[7], codes[3]
    op = OPS["joint_qk_norm_rope"]

    def of_query_and_key(tensors: Tensors) -> Tensors:
        own, encoder = tensors[:7], tensors[7:]
        # Of the values, which aren't kept, nothing is needed: keys have their shape.
        call = op.named((*own[:2], own[1], *own[3:], *encoder[:2], encoder[1], *encoder[3:], *codes))
        return op.reference(call)[:2]

    found = _sums(of_query_and_key, grads[:2], saved, needed, (3, 4, 5, 6, 10, 11, 12, 13))
    tokens, encoder_tokens = query.shape[1], encoder_query.shape[1]
    if any(needed[place] for place in (0, 1, 7, 8)):
        d_query, d_key = (_or_zeros(grad, query, tokens + encoder_tokens, codes[0]) for grad in grads[:2])
        rows = (*saved[:2], *saved[3:9], *saved[10:])
        found |= dict(zip((0, 1, 7, 8), _run("joint_qk_norm_rope_backward", d_query, d_key, *rows, *codes), strict=True))
    if d_value is not None:
        start, encoder_start = (encoder_tokens, 0) if encoder_first else (0, tokens)
        found[2] = d_value[:, start : start + tokens].flatten(2)
        found[9] = d_value[:, encoder_start : encoder_start + encoder_tokens].flatten(2)
    return found


def _or_zeros(grad: Tensor | None, x: Tensor, tokens: int, head_dim: int) -> Tensor:
    return x.new_zeros(x.shape[0], tokens, x.shape[2] // head_dim, head_dim) if grad is None else grad


def _all(tensors: Tensors, outputs: Any, needed: Sequence[bool]) -> Tensors:
    return tensors


def _sum_and_branch(tensors: Tensors, outputs: Any, needed: Sequence[bool]) -> Tensors:
    """r, not what it is the sum of: the stream of residuals is alive anyway; for a gate's gradient
    x, too.
    """
    return outputs[1], tensors[1] if needed[2] or needed[7] else None, *tensors[2:]


def _branch(tensors: Tensors, outputs: Any, needed: Sequence[bool]) -> Tensors:
    return tensors[1] if needed[2] or needed[3] else None, *tensors[2:]


def _queries_and_keys(tensors: Tensors, outputs: Any, needed: Sequence[bool]) -> Tensors:
    return *tensors[:2], None, *tensors[3:9], None, *tensors[10:]


GRADIENTS: Mapping[str, Gradients] = {
    "norm_scale_shift": Gradients((0,), _all, _norm, "diffusers_rms"),
    "scale_residual_norm_scale_shift": Gradients((0, 1), _sum_and_branch, _residual_norm, "diffusers_rms"),
    "scale_residual": Gradients((0, 1), _branch, _residual),
    "qk_norm_rope": Gradients((0, 1), _all, _qk),
    "joint_qk_norm_rope": Gradients((0, 1, 2, 7, 8, 9), _queries_and_keys, _joint_qk),
}
"""By the op's name."""
