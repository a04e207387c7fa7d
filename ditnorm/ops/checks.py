"""The contract of the arguments of a norm site's op, as named errors.

The compiled kernels reject what they can't serve in a few words (PyTorch's stable ABI knows only
``RuntimeError``); this module says what was wrong, or that nothing was and PyTorch's operations
serve the call (``unfused``). It runs when they have rejected, in the fakes (tracing) and in the
reference, never on a successful CUDA call.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import expect
from .calls import NormScaleShift, QKCall, SandwichCall, ScaleResidual, SiteCall, modulations
from .calls_backward import (
    NormScaleResidualBackward,
    NormScaleShiftBackward,
    NormScaleShiftBackwardParts,
    ScaleResidualBackward,
    ScaleResidualNormScaleShiftBackward,
)
from .context import transformed
from .expect import shape_of
from .options import FLOATS_AND_DOUBLE, NORMS, ROUNDINGS
from .reference import upcast

DOUBLES = (torch.float64, torch.complex128)
INDICES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class UnfusedError(TypeError):
    """Arguments that no kernel takes and upstream's expression does, which then serves the call."""


def check(call: SiteCall) -> None:
    """Raises ``TypeError`` (kinds and dtypes) or ``ValueError`` (shapes, devices, combinations);
    the message names the argument.
    """
    if not isinstance(call, ScaleResidual):
        expect.option("norm", call.norm, NORMS)
        expect.eps(call.eps)
    expect.option("rounding", call.rounding, ROUNDINGS)
    tensors = {name: t for name, t in zip(call._fields, call, strict=True) if name not in ("norm", "eps", "rounding")}
    for name, t in tensors.items():
        if t is not None or name in ("x", "residual"):
            expect.tensor(name, t, INDICES if name == "index" else FLOATS_AND_DOUBLE)
    x = call.x
    expect.rows(x)
    if not isinstance(call, NormScaleShift):
        _residual(call.residual, x)
    if not isinstance(call, ScaleResidual):
        _vector("weight", call.weight, x)
        _vector("bias", call.bias, x)
    for name, (m, table) in modulations(call).items():
        _vector(f"{name}_table", table, x)
        if table is not None and m is None:
            raise ValueError(f"{name}_table: given without {name}, the modulation it is added to")
    batch, rows = batch_of(call), None
    _index(call.index, x, batch)
    for name, (m, _) in modulations(call).items():
        if m is not None and call.index is None:
            _modulation(name, m, x, batch)
        elif m is not None:
            rows = _rows(name, m, x, batch, rows)
    if call.index is not None and rows is None:
        raise ValueError("index: given without a modulation to select rows of")
    expect.devices(tensors, x, "x")


def check_backward(call: NormScaleShiftBackward | ScaleResidualNormScaleShiftBackward | ScaleResidualBackward) -> None:
    """As :func:`check`, of an op that makes gradients."""
    check(call.site)
    expect.gradients({"dy": getattr(call, "dy", None), "dr": call.dr}, call.site.x)
    if not isinstance(call, NormScaleShiftBackward) and call.gate is None:
        raise ValueError("gate: missing; without one no other gradient is made")


def check_backward_parts(call: NormScaleShiftBackwardParts) -> None:
    """As :func:`check`, of an op that makes gradients."""
    check(call.site)
    expect.gradients({"dy": call.dy}, call.x)


def check_sandwich_backward(call: NormScaleResidualBackward) -> None:
    """As :func:`check`, of an op that makes gradients."""
    check_sandwich(call.forward)
    expect.gradients({"dr": call.dr}, call.x)


def unfused(call: SiteCall) -> str | None:
    """Why no kernel takes a call that ``check`` has passed, or None."""
    double = in_double(call)
    if double is not None:
        return double
    x, residual = call.x, call.x if isinstance(call, NormScaleShift) else call.residual
    batch = batch_of(call)
    if x.dim() == 3 and not (x.shape[0] == residual.shape[0] == batch):
        return f"x: broadcast to a batch of {batch}"
    if call.rounding == "single":
        return None
    dtype = x.dtype
    if residual.dtype is not dtype:
        return f'residual: rounding="eager" is fused in the dtype of x, {dtype}, got {residual.dtype}'
    if not isinstance(call, ScaleResidual) and call.norm == "diffusers_rms":
        return _of_one_dtype({name: getattr(call, name) for name in (*modulations(call), "weight", "bias")}, dtype) or _tabled(call)
    if upcast(call) is torch.float32:
        return None
    for name, (m, _) in modulations(call).items():
        if m is not None and m.dtype is not dtype:
            return f'{name}: rounding="eager" is fused in the dtype of x, {dtype}, or float32, got {m.dtype}'
    return None


def _of_one_dtype(tensors: Mapping[str, Tensor | None], dtype: torch.dtype) -> str | None:
    for name, t in tensors.items():
        if t is not None and t.dtype is not dtype:
            return f'{name}: rounding="eager" is fused in the dtype of x with diffusers\' RMSNorm, {dtype}, got {t.dtype}'
    return None


def _tabled(call: SiteCall) -> str | None:
    for name, (_, table) in modulations(call).items():
        if table is not None:
            return f'{name}_table: rounding="eager" is fused without tables with diffusers\' RMSNorm'
    return None


def check_sandwich(call: SandwichCall) -> None:
    """As :func:`check`."""
    check(call.site)
    if call.x_weight is not None:
        expect.tensor("x_weight", call.x_weight, FLOATS_AND_DOUBLE)
    _vector("x_weight", call.x_weight, call.x)
    expect.devices({"x_weight": call.x_weight}, call.x, "x")
    expect.eps(call.eps)


def unfused_sandwich(call: SandwichCall) -> str | None:
    """Why no kernel takes a call that :func:`check_sandwich` has passed, or None."""
    if call.x_weight is not None and call.x_weight.dtype in DOUBLES:
        return f"x_weight: no kernel takes {call.x_weight.dtype}"
    reason = unfused(call.site)
    if reason is not None or call.rounding == "single":
        return reason
    return _of_one_dtype({"x_weight": call.x_weight, **{name: m for name, (m, _) in modulations(call.site).items()}}, call.x.dtype)


def in_double(call: SiteCall | QKCall) -> str | None:
    """Why no kernel takes a call with a tensor of doubles in it, or None."""
    for name, t in zip(call._fields, call, strict=True):
        if isinstance(t, Tensor) and t.dtype in DOUBLES:
            return f"{name}: no kernel takes {t.dtype}"
    return None


def batch_of(call: SiteCall) -> int:
    """The batch to which those of 1 are broadcast; 1 where ``x`` is [S, D]."""
    if call.x.dim() == 2:
        return 1
    sized = [m for m, _ in modulations(call).values() if m is not None and m.dim() > (1 if call.index is None else 2)]
    if call.index is not None and call.index.dim() == 2:
        sized.append(call.index)
    for t in (call.x, *(() if isinstance(call, NormScaleShift) else (call.residual,)), *sized):
        if t.shape[0] != 1:
            return t.shape[0]
    return 1


def index_range(call: Any) -> None:
    """Raises ``IndexError`` where ``index`` selects no row. It reads the values, so it looks only
    at those that are on the CPU.
    """
    index = getattr(call, "index", None)
    if index is None or transformed() or type(index) is not Tensor or index.device.type != "cpu" or index.numel() == 0:
        return
    rows = next(m.shape[-2] for m, _ in modulations(getattr(call, "site", call)).values() if m is not None)
    first, last = (int(value) for value in index.aminmax()) if index.dtype is not torch.bool else (0, int(index.any()))
    if first < 0 or last >= rows:
        raise IndexError(f"index: values from {first} to {last}, but the modulation has {rows} rows")


def _vector(name: str, value: Tensor | None, x: Tensor) -> None:
    if value is not None and value.shape != x.shape[-1:]:
        raise ValueError(f"{name}: expected shape [{x.shape[-1]}] (the last dim of x), got {shape_of(value)}")


def _modulation(name: str, m: Tensor, x: Tensor, batch: int) -> None:
    tokens, width = x.shape[-2:]
    per = "1" if batch == 1 else f"{batch} or 1"
    match tuple(m.shape):
        case (d,):
            fits = d == width
        case (b, d):
            fits = _one_or(batch, b) and d == width
        case (b, s, d):
            fits = _one_or(batch, b) and _one_or(tokens, s) and d == width
        case (b, f, 1, d):
            fits = _one_or(batch, b) and f >= 1 and tokens % f == 0 and d == width
        case _:
            fits = False
    if not fits:
        raise ValueError(
            f"{name}: got {shape_of(m)} for x {shape_of(x)}; expected [{width}], [{per}, {width}] or [{per}, 1, {width}] (per sample), "
            f"[{per}, {tokens}, {width}] (per token) or [{per}, F, 1, {width}] (per frame, F dividing {tokens})"
        )


def _one_or(n: int, size: int) -> bool:
    # Not size in (1, n): Dynamo finds no number in a tuple where that stands as a symbolic size.
    return size == 1 or size == n


def _index(index: Tensor | None, x: Tensor, batch: int) -> None:
    if index is None:
        return
    tokens = x.shape[-2]
    if index.dim() not in (1, 2) or index.shape[-1] != tokens or (index.dim() == 2 and not _one_or(batch, index.shape[0])):
        per = "1" if batch == 1 else f"{batch} or 1"
        raise ValueError(f"index: expected shape [{tokens}] or [{per}, {tokens}] for x {shape_of(x)}, got {shape_of(index)}")


def _rows(name: str, m: Tensor, x: Tensor, batch: int, rows: int | None) -> int:
    """Checks a modulation that ``index`` selects from and returns its number of rows, M."""
    width = x.shape[-1]
    if m.dim() not in (2, 3) or m.shape[-1] != width or m.shape[-2] < 1 or (m.dim() == 3 and not _one_or(batch, m.shape[0])):
        raise ValueError(f"{name}: with index expected rows [M, {width}] or [{batch} or 1, M, {width}], got {shape_of(m)}")
    if rows is not None and m.shape[-2] != rows:
        raise ValueError(f"{name}: with index every modulation has the same number of rows; got {m.shape[-2]} after {rows}")
    return m.shape[-2]


def _residual(residual: Tensor, x: Tensor) -> None:
    broadcasts = residual.dim() == 3 and x.dim() == 3 and 1 in (residual.shape[0], x.shape[0])
    if residual.shape != x.shape and not (broadcasts and residual.shape[1:] == x.shape[1:]):
        raise ValueError(
            f"residual: expected the shape of x, {shape_of(x)}, or another batch where one of them is 1, got {shape_of(residual)}"
        )
