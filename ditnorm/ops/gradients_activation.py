"""Gradients of the activations."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import Gradients, Tensors
from .gradients_common import maker


def _gelu_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    """PyTorch's own gradient is one kernel already."""
    (x,) = saved
    d_beside, dy = _parted(grads[0], x)
    return torch.ops.aten.gelu_backward.default(dy, x, approximate="tanh") if needed[0] else None, d_beside


def _swiglu_rows(grads: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    d_beside, dy = _parted(grads[0], saved[0])
    return *(maker("swiglu_backward")(dy, *saved, *codes) if needed[0] or needed[1] else (None, None)), d_beside


def _parted(d: Tensor, x: Tensor) -> tuple[Tensor | None, Tensor]:
    """Splits the gradient of an op's result: that of ``beside``, and that of the activation of
    ``x``, which stands behind it.
    """
    width, beside = x.shape[-1], d.shape[-1] - x.shape[-1]
    return (d.narrow(-1, 0, beside), d.narrow(-1, beside, width)) if beside else (None, d)


def _no_rest(grads: Tensors, rows: Tensors, saved: Tensors, codes: Tensors, needed: Sequence[bool]) -> Tensors:
    return ()


def _keep_rows(tensors: Tensors, outputs: Any, sums: bool) -> tuple[Tensors, Tensors]:
    return tensors[:-1], ()


def _all_are_rows(tensors: Tensors, codes: Tensors) -> tuple[Tensors, Tensors]:
    return tensors, ()


GRADIENTS: Mapping[str, Gradients] = {
    "gelu": Gradients(_all_are_rows, _keep_rows, _gelu_rows, _no_rest),
    "swiglu": Gradients(_all_are_rows, _keep_rows, _swiglu_rows, _no_rest),
}
