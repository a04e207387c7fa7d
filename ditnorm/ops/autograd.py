"""Gradients of the ops.

:class:`Fused` is a kernel with another that makes the gradients of its rows: ``x``, ``residual``,
query, key and value, which are all that LoRA training wants. :class:`Recompute` is a kernel with
the gradients of the reference, which is run again for them.

The inference call never comes here: a Python autograd formula on the op itself would cost it
microseconds even under ``no_grad``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
class RowGradients:
    """How the gradients of an op's rows are made, and what is kept for them."""

    rows: tuple[int, ...]
    """Their places among the op's tensors."""
    saved: Callable[[Tensors, Any], Tensors]
    """Of the op's tensors and results, what is kept."""
    gradients: Callable[[Tensors, Tensors, Tensors], Mapping[int, Tensor | None]]
    """Of the gradients of the results, what was kept and the op's numbers: those of the rows, by
    their places.
    """
    without: str | None = None
    """A norm whose gradients no kernel makes."""

    def serves(self, tensors: Tensors, options: Tensors) -> bool:
        """Whether a kernel makes all gradients that are wanted: those of rows, all of one dtype."""
        if self.without is not None and self.without in options:
            return False
        dtype = tensors[self.rows[0]].dtype
        for place, t in enumerate(tensors):
            if t is not None and (t.dtype is not dtype if place in self.rows else t.requires_grad):
                return False
        return True


class Fused(torch.autograd.Function):
    """``kernel(*tensors, *codes)`` with the gradients of ``ROWS[name]``."""

    @staticmethod
    def forward(ctx: Any, name: str, kernel: Callable[..., Any], codes: tuple[Any, ...], *tensors: Any) -> Any:
        outputs = kernel(*tensors, *codes)
        ctx.row_gradients, ctx.codes, ctx.count = ROWS[name], codes, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*ctx.row_gradients.saved(tensors, outputs))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        gradients = ctx.row_gradients.gradients(grad_outputs, ctx.saved_tensors, ctx.codes)
        return None, None, None, *map(gradients.get, range(ctx.count))


def _run(name: str, *arguments: Any) -> Any:
    """An op that makes gradients; where these are to be differentiated, its reference."""
    if torch.is_grad_enabled():
        op = OPS[name]
        return op.reference(op.named(arguments))
    return getattr(torch.ops.ditnorm, name).default(*arguments)


def _norm(grads: Tensors, saved: Tensors, codes: Tensors) -> Mapping[int, Tensor | None]:
    (dy,) = grads
    return {0: _run("norm_scale_shift_backward", dy, None, *saved, *codes)}


def _residual_norm(grads: Tensors, saved: Tensors, codes: Tensors) -> Mapping[int, Tensor | None]:
    dy, dr = grads
    r, gate, scale, shift, weight, gate_table, scale_table, shift_table, index = saved
    if dy is None:  # nobody used y
        return _residual((dr,), (gate, gate_table, index), codes[-1:])
    if gate is None:
        of_row = _run("norm_scale_shift_backward", dy, dr, r, scale, shift, weight, scale_table, shift_table, index, *codes)
        return {0: of_row, 1: of_row}
    of_residual, of_x = _run("scale_residual_norm_scale_shift_backward", dy, dr, *saved, *codes)
    return {0: of_residual, 1: of_x}


def _residual(grads: Tensors, saved: Tensors, codes: Tensors) -> Mapping[int, Tensor | None]:
    (dr,) = grads
    return {0: dr, 1: dr if saved[0] is None else _run("scale_residual_backward", dr, *saved, *codes)}


def _qk(grads: Tensors, saved: Tensors, codes: Tensors) -> Mapping[int, Tensor | None]:
    d_query, d_key = (_or_zeros(grad, x, x.shape[1], codes[0]) for grad, x in zip(grads, saved[:2], strict=True))
    return dict(enumerate(_run("qk_norm_rope_backward", d_query, d_key, *saved, *codes)))


def _joint_qk(grads: Tensors, saved: Tensors, codes: Tensors) -> Mapping[int, Tensor | None]:
    *_, d_value = grads
    query, encoder_query, encoder_first = saved[0], saved[6], codes[3]
    tokens, encoder_tokens = query.shape[1], encoder_query.shape[1]
    d_query, d_key = (_or_zeros(grad, query, tokens + encoder_tokens, codes[0]) for grad in grads[:2])
    found = _run("joint_qk_norm_rope_backward", d_query, d_key, *saved, *codes)
    gradients = dict(zip((0, 1, 7, 8), found, strict=True))
    if d_value is not None:
        start, encoder_start = (encoder_tokens, 0) if encoder_first else (0, tokens)
        gradients[2] = d_value[:, start : start + tokens].flatten(2)
        gradients[9] = d_value[:, encoder_start : encoder_start + encoder_tokens].flatten(2)
    return gradients


def _or_zeros(grad: Tensor | None, x: Tensor, tokens: int, head_dim: int) -> Tensor:
    return x.new_zeros(x.shape[0], tokens, x.shape[2] // head_dim, head_dim) if grad is None else grad


def _without(*places: int) -> Callable[[Tensors, Any], Tensors]:
    return lambda tensors, _: tuple(t for place, t in enumerate(tensors) if place not in places)


ROWS: Mapping[str, RowGradients] = {
    "norm_scale_shift": RowGradients((0,), _without(4), _norm, "diffusers_rms"),
    # r is kept, not what it is the sum of: the stream of residuals is alive anyway.
    "scale_residual_norm_scale_shift": RowGradients(
        (0, 1), lambda tensors, outputs: (outputs[1], *tensors[2:6], *tensors[7:]), _residual_norm, "diffusers_rms"
    ),
    "scale_residual": RowGradients((0, 1), _without(0, 1), _residual),
    "qk_norm_rope": RowGradients((0, 1), _without(), _qk),
    "joint_qk_norm_rope": RowGradients((0, 1, 2, 7, 8, 9), _without(2, 9), _joint_qk),
}
"""By the op's name."""
