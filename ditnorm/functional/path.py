"""Which path a call takes: the kernel, PyTorch's operations, or one with gradients.

The files beside this one look their ops up once: an overload packet costs a call half a
microsecond.
"""

from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..ops import context
from ..ops.autograd import Recompute
from ..ops.gradients import GRADIENTS
from ..ops.options import FLOATS, HALVES, HALVES_OF_CUDA, NORMS, PAIRS, QK_NORMS, ROUNDINGS
from ..ops.table import OPS
from ..swapping.torch_private import any_autocast_enabled, compiler, forward_ad, without_frame

NORM = {name: code for code, name in enumerate(NORMS)}
QK_NORM = {name: code for code, name in enumerate(QK_NORMS)}
PAIR = {"neighbours": 0, "halves": PAIRS.index(HALVES_OF_CUDA)}
ROUNDING = {name: code for code, name in enumerate(ROUNDINGS)}
HALF = {dtype: code for code, dtype in enumerate(HALVES)}
_KERNELS = {name: without_frame(getattr(kernels.ops, name).default) for name in OPS}
# What bad arguments raise on the way to the kernel.
REJECTED = (RuntimeError, TypeError, KeyError, AttributeError)

# Under Dynamo an op that rejects its arguments ends the trace, and nothing catches that.
# So what no kernel takes is found before.
traced_by_dynamo = torch.compiler.is_dynamo_compiling


def needs_pytorch(tensors: tuple[Tensor | None, ...], rounding: str) -> bool:
    """Whether PyTorch's operations are to make what is quantised."""
    return (torch.is_grad_enabled() or any_autocast_enabled() or forward_ad._current_level >= 0) and in_pytorch(tensors, rounding)


def in_pytorch(tensors: tuple[Tensor | None, ...], rounding: str = "single", norm: str = "rms") -> bool:
    """Whether autograd needs a graph or a tangent of this call, or autocast must choose the dtypes
    of upstream's expression: it leaves all operations alone but torch's norms.
    """
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return rounding == "eager" and norm != "diffusers_rms" and any(t is not None and context.autocasts(t) for t in tensors)


_WITHOUT_TORCHS_NORM = frozenset({"scale_residual", "norm_scale_residual", "norm_scale_residual_norm_scale_shift", "gelu", "swiglu"})


def _casts(name: str, options: tuple[Any, ...]) -> bool:
    """Whether autocast chooses dtypes of upstream's expression: those of torch's norms."""
    return options[-1] == "eager" and name not in _WITHOUT_TORCHS_NORM and "diffusers_rms" not in options


def differentiable(name: str, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...], codes: tuple[Any, ...]) -> Any:
    """The results of a call under autograd, forward-mode differentiation or autocast.

    ``options`` are those of its structure in :mod:`ditnorm.ops.calls`, ``codes`` the same as
    numbers. Raises the named error of the op's checks where something is wrong with the call.
    """
    transformed, gradients = context.transformed(), GRADIENTS.get(name)
    if gradients is not None and not (any_autocast_enabled() and _casts(name, options)):
        if not transformed and kernels.serves(tensors[0]):
            outputs = gradients.call(_KERNELS[name], tensors, codes)
            if outputs is not None:
                return outputs
        # Sums over rows a compiler fuses itself, and chooses what to save for them.
        compiled = traced_by_dynamo() and not compiler._is_exporting_flag
        fits = compiled and kernels.may_serve(tensors[0]) and gradients.are_of_rows(tensors, codes)
        if fits and not unfused(name, tensors, options):
            return getattr(kernels.ops, name).under_grad(*tensors, *codes)
    op = OPS[name]
    call = op.call(*tensors, *options)
    op.check(call)
    if call.rounding == "eager" or transformed:
        return kernels.run_reference(op, call)
    return Recompute.apply(op, _KERNELS[name], codes, options, *tensors)


def unfused(name: str, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> bool:
    """Whether no kernel takes the call. Dynamo needs long for the whole question, and nearly always
    need not ask it.
    """
    first: Any = tensors[0]
    uniform = first.dtype in FLOATS
    for t in tensors:
        if t is not None and (t.dtype is not first.dtype or (t.dim() > 1 and t.shape[0] != first.shape[0])):
            uniform = False
    return not uniform and OPS[name].unfused(OPS[name].call(*tensors, *options)) is not None


def rejected(name: str, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> Any:
    """Where the kernel has rejected a call: the error that names what is wrong with it, or the
    results of PyTorch's operations.
    """
    op = OPS[name]
    call = op.call(*tensors, *options)
    op.check(call)
    if op.unfused(call) is None:
        raise  # the kernel's own error, which the caller is handling
    return kernels.run_reference(op, call)
