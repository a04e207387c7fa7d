"""Gradients of the ops: how autograd is given them.

:class:`Fused` is a kernel with others that make the gradients of its rows: ``x``, ``residual``,
query, key and value, and what an activation takes, which are all that LoRA training wants.
Gradients that are sums over rows, of modulations, tables, gates and weights, are those of the
expression that has the tensor in it, in PyTorch's operations, whose order is fixed
(:mod:`ditnorm.ops.gradients` has both for each op).
:class:`Recompute` is a kernel with all gradients from the reference, which is run again for them.

The inference call never comes here: a Python autograd formula on the op itself would cost it
microseconds even under ``no_grad``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..swapping.torch_private import outlived_transform, without_transforms
from .table import Op

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
    """(tensors, codes) -> (rows, rest): which of the op's tensors are rows. A row for which
    autograd is to add two gradients stands there twice.
    """
    saved: Callable[[Tensors, Any, bool], tuple[Tensors, Tensors]]
    """(tensors, outputs, sums) -> (rows, rest) to keep for the backward pass. ``sums``: whether
    tensors of the rest want gradients, too.
    """
    of_rows: Callable[[Tensors, Tensors, Tensors, Sequence[bool]], Tensors]
    """(gradients of the outputs, what was kept, codes, which rows want one) -> the gradients of the
    rows.
    """
    of_rest: Callable[[Tensors, Tensors, Tensors, Tensors, Sequence[bool]], Tensors]
    """(gradients of the outputs, those of the rows, what was kept, codes, which of the rest want
    one) -> the gradients of the rest, sums over rows.
    """

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

    Hooks on saved tensors, as checkpointing has, cost several microseconds for each tensor. So what
    is no row and wants no gradient is kept here, if little memory is.
    """

    @staticmethod
    def forward(ctx: Any, call: Tensors, *inputs: Any) -> Any:
        gradients, kernel, tensors, codes = call
        outputs = kernel(*tensors, *codes)
        ctx.gradients, ctx.codes = gradients, codes
        ctx.set_materialize_grads(False)
        sums = len(inputs) >= len(tensors)
        rows, rest = gradients.saved(tensors, outputs, sums)
        ctx.versions = None if sums else _versions(rest)
        if ctx.versions is None:
            ctx.save_for_backward(*rows, *rest)
            ctx.rest = ()
        else:
            ctx.save_for_backward(*rows)
            ctx.rest = rest
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gradients, codes, needed, saved = ctx.gradients, ctx.codes, ctx.needs_input_grad[1:], kept_by(ctx)
        rows = gradients.of_rows(grads, saved, codes, needed)
        if len(needed) == len(rows):
            return None, *rows
        return None, *rows, *gradients.of_rest(grads, rows, saved, codes, needed[len(rows) :])


def kept_by(ctx: Any) -> Tensors:
    """What the function of ``ctx`` has saved, rows first.

    Raises:
        RuntimeError: where something of it has changed since.
    """
    rest = ctx.rest
    if rest and _versions(rest) != ctx.versions:
        raise changed_in_place()
    return *ctx.saved_tensors, *rest


def changed_in_place() -> RuntimeError:
    """What autograd raises where a tensor that it keeps has changed."""
    return RuntimeError("one of the variables needed for gradient computation has been modified by an inplace operation")


def _versions(tensors: Tensors) -> int | None:
    """A number that changes with every change of ``tensors`` in place. None where a tensor of
    three or more dimensions has values for each token, or one can't be asked.
    """
    versions = 0
    try:
        for t in tensors:
            if t is not None:
                if t.dim() > 2 and t.shape[-2] != 1:
                    return None
                versions += t._version
    except RuntimeError:  # a tensor of inference mode, as autograd will say
        return None
    return versions


_apply = without_transforms(Fused)


def kernel_of(name: str) -> Callable[..., Any]:
    """The op of a name, which looking up costs half a microsecond."""
    kernel = _kernels.get(name)  # no functools.cache, of which Dynamo warns where it traces a backward pass
    if kernel is None:
        kernel = _kernels[name] = getattr(torch.ops.ditnorm, name).default
    return kernel


_kernels: dict[str, Callable[..., Any]] = {}
