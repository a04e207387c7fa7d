"""The contract of the arguments of the activations, as named errors. When it runs: see
:mod:`ditnorm.ops.checks`.
"""

from typing import Any

from torch import Tensor

from . import expect
from .calls import ActivationCall
from .calls_backward import SwiGLUBackward
from .expect import shape_of
from .options import FLOATS, FLOATS_AND_DOUBLE, ROUNDINGS


def check(call: ActivationCall) -> None:
    """Raises ``TypeError`` (kinds and dtypes) or ``ValueError`` (shapes, devices); the message
    names the argument.
    """
    expect.option("rounding", call.rounding, ROUNDINGS)
    tensors: dict[str, Any] = {name: t for name, t in zip(call._fields, call, strict=True) if name != "rounding"}
    for name, t in tensors.items():
        if t is not None or name != "beside":
            expect.tensor(name, t, FLOATS_AND_DOUBLE)
    x = call.x
    expect.rows(x)
    for name, t in tensors.items():
        if t is None or t is x:
            continue
        if name == "value" and t.shape != x.shape:
            raise ValueError(f"value: expected the shape of x, {shape_of(x)}, got {shape_of(t)}")
        if t.dim() != x.dim() or t.shape[:-1] != x.shape[:-1]:
            raise ValueError(f"{name}: expected the shape of x, {shape_of(x)}, but for the last dim, got {shape_of(t)}")
    expect.devices(tensors, x, "x")


def check_backward(call: SwiGLUBackward) -> None:
    """As :func:`check`, of the op that makes gradients."""
    check(call.forward)
    expect.tensor("value", call.value, (call.x.dtype,))
    expect.gradients({"dy": call.dy}, call.x)


def unfused(call: ActivationCall) -> str | None:
    """Why no kernel takes a call that :func:`check` has passed, or None."""
    for name, t in zip(call._fields, call, strict=True):
        if not isinstance(t, Tensor):
            continue
        if t.dtype not in FLOATS:
            return f"{name}: no kernel takes {t.dtype}"
        if t.dtype is not call.x.dtype:
            return f"{name}: fused in the dtype of x, {call.x.dtype}, got {t.dtype}"
    return None


def like(call: ActivationCall) -> Tensor:
    """An empty tensor like the result."""
    x, width = call.x, call.x.shape[-1]
    return x.new_empty((*x.shape[:-1], width if call.beside is None else call.beside.shape[-1] + width))
