"""Gradients of the ``"single"`` ops: inputs are saved, nothing else; the backward pass recomputes
the op in plain PyTorch.

The inference call never comes here: a Python autograd formula on the op itself would cost it
microseconds even under ``no_grad``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .table import Op


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
