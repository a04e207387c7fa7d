"""The contract of the ops' arguments, as named errors.

The compiled kernels reject what they can't serve in a few words (PyTorch's stable ABI knows only ``RuntimeError``); this module
says what was wrong. It runs when they have rejected, in the fakes (tracing) and in the reference, never on a successful CUDA call.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .reference import Modulation, law_dtype

NORMS = ("layer", "rms", "fp32_layer")
ROUNDINGS = ("single", "eager")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INDICES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class UnfusedDtypesError(TypeError):
    """``rounding="eager"`` with mixed dtypes, which no kernel takes and which PyTorch promotes in upstream's expression."""


def norm_scale_shift(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale_table: Tensor | None,
    shift_table: Tensor | None,
    index: Tensor | None,
    norm: str,
    eps: float,
    rounding: str,
) -> None:
    """Arguments as of the op; see ``_check``."""
    modulations = {"scale": (scale, scale_table), "shift": (shift, shift_table)}
    _check(x, None, modulations, {"weight": weight, "bias": bias}, index, norm, eps, rounding)


def scale_residual_norm_scale_shift(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    gate_table: Tensor | None,
    scale_table: Tensor | None,
    shift_table: Tensor | None,
    index: Tensor | None,
    norm: str,
    eps: float,
    rounding: str,
) -> None:
    """Arguments as of the op; see ``_check``."""
    modulations = {"gate": (gate, gate_table), "scale": (scale, scale_table), "shift": (shift, shift_table)}
    _residual(residual, x)
    _check(x, residual, modulations, {"weight": weight, "bias": bias}, index, norm, eps, rounding)


def scale_residual(
    residual: Tensor, x: Tensor, gate: Tensor | None, gate_table: Tensor | None, index: Tensor | None, rounding: str
) -> None:
    """Arguments as of the op; see ``_check``."""
    _residual(residual, x)
    _check(x, residual, {"gate": (gate, gate_table)}, {}, index, "layer", 0.0, rounding)


def _check(
    x: Tensor,
    residual: Tensor | None,
    modulations: Mapping[str, Modulation],
    affine: Mapping[str, Tensor | None],
    index: Tensor | None,
    norm: str,
    eps: float,
    rounding: str,
) -> None:
    """Raises ``TypeError`` (kinds and dtypes) or ``ValueError`` (shapes, devices, combinations); the message names the argument.

    ``UnfusedDtypesError`` says that nothing else is wrong.
    """
    _option("norm", norm, NORMS)
    _option("rounding", rounding, ROUNDINGS)
    _tensor("x", x, FLOATS)
    if x.dim() not in (2, 3) or x.shape[-1] < 1:
        raise ValueError(f"x: expected shape [B, S, D] or [S, D] with D >= 1, got {_shape(x)}")
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a float, got {type(eps).__name__}")
    for name, vector in affine.items():
        if vector is not None:
            _tensor(name, vector, FLOATS)
            _vector(name, vector, x)
    _index(index, x)
    rows = None
    for name, (m, table) in modulations.items():
        if table is not None:
            _tensor(f"{name}_table", table, FLOATS)
            _vector(f"{name}_table", table, x)
            if m is None:
                raise ValueError(f"{name}_table: given without {name}, the modulation it is added to")
        if m is None:
            continue
        _tensor(name, m, FLOATS)
        if index is None:
            _modulation(name, m, x)
        else:
            rows = _rows(name, m, x, rows)
    if index is not None and rows is None:
        raise ValueError("index: given without a modulation to select rows of")
    _devices(x, {"residual": residual, "index": index, **affine}, modulations)
    if rounding == "eager" and not autocasts(x):  # autocast chooses the dtypes itself
        fused_dtypes(x, residual, modulations, norm)


def fused_dtypes(x: Tensor, residual: Tensor | None, modulations: Mapping[str, Modulation], norm: str) -> None:
    """Raises ``UnfusedDtypesError`` where ``rounding="eager"`` with these dtypes isn't fused."""
    if residual is not None and residual.dtype is not x.dtype:
        raise UnfusedDtypesError(f'residual: rounding="eager" is fused in the dtype of x, {x.dtype}, got {residual.dtype}')
    law = law_dtype(x, tuple(modulations.values()), norm, "eager")
    for name, (m, _) in modulations.items():
        if m is not None and law is not torch.float32 and m.dtype is not x.dtype:
            raise UnfusedDtypesError(f'{name}: rounding="eager" is fused in the dtype of x, {x.dtype}, or float32, got {m.dtype}')


def index_range(index: Tensor, *modulations: Tensor | None) -> None:
    """Raises ``IndexError`` where ``index`` selects no row. Reads the values, so only for the CPU."""
    rows = next(m.shape[-2] for m in modulations if m is not None)
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= rows):
        raise IndexError(f"index: values from {int(index.min())} to {int(index.max())}, but the modulation has {rows} rows")


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where ``tensor`` is. Of the meta device, which has none, PyTorch mustn't be asked."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def transformed() -> bool:
    """Whether other code than eager PyTorch's stands behind a call: a compiler, a tracer, a function transform, forward-mode gradients."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
        or forward_ad._current_level >= 0
    )


def same_bits(got: Any, expected: Any) -> bool:
    """Whether the results of two calls are equal bit for bit, NaN and signs of zero included."""
    pairs = [(got, expected)] if isinstance(got, Tensor) else list(zip(got, expected, strict=True))
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def _option(name: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, accepted))}, got {value!r}")


def _tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {value.dtype}")


def _vector(name: str, value: Tensor, x: Tensor) -> None:
    if value.shape != x.shape[-1:]:
        raise ValueError(f"{name}: expected shape [{x.shape[-1]}] (the last dim of x), got {_shape(value)}")


def _modulation(name: str, m: Tensor, x: Tensor) -> None:
    batch, tokens, width = (1, *x.shape) if x.dim() == 2 else x.shape
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
            f"{name}: got {_shape(m)} for x {_shape(x)}; expected [{width}], [{per}, {width}] or [{per}, 1, {width}] (per sample), "
            f"[{per}, {tokens}, {width}] (per token) or [{per}, F, 1, {width}] (per frame, F dividing {tokens})"
        )


def _one_or(n: int, size: int) -> bool:
    # Not size in (1, n): Dynamo finds no number in a tuple where that stands as a symbolic size.
    return size == 1 or size == n


def _index(index: Tensor | None, x: Tensor) -> None:
    if index is None:
        return
    _tensor("index", index, INDICES)
    batch, tokens = (1, x.shape[0]) if x.dim() == 2 else x.shape[:2]
    if index.dim() not in (1, 2) or index.shape[-1] != tokens or (index.dim() == 2 and index.shape[0] != batch):
        raise ValueError(f"index: expected shape [{tokens}] or [{batch}, {tokens}] for x {_shape(x)}, got {_shape(index)}")


def _rows(name: str, m: Tensor, x: Tensor, rows: int | None) -> int:
    """Checks a modulation that ``index`` selects from and returns its number of rows, M."""
    batch, width = (1 if x.dim() == 2 else x.shape[0]), x.shape[-1]
    if m.dim() not in (2, 3) or m.shape[-1] != width or m.shape[-2] < 1 or (m.dim() == 3 and not _one_or(batch, m.shape[0])):
        raise ValueError(f"{name}: with index expected rows [M, {width}] or [{batch} or 1, M, {width}], got {_shape(m)}")
    if rows is not None and m.shape[-2] != rows:
        raise ValueError(f"{name}: with index every modulation has the same number of rows; got {m.shape[-2]} after {rows}")
    return m.shape[-2]


def _residual(residual: Tensor, x: Tensor) -> None:
    _tensor("residual", residual, FLOATS)
    _tensor("x", x, FLOATS)
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x, {_shape(x)}, got {_shape(residual)}")


def _devices(x: Tensor, others: Mapping[str, Tensor | None], modulations: Mapping[str, Modulation]) -> None:
    # Without this, one meta tensor sends a CPU call to the fake kernel, which returns uninitialised memory.
    named = dict(others)
    for name, (m, table) in modulations.items():
        named |= {name: m, f"{name}_table": table}
    for name, t in named.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {t.device}")


def _shape(t: Tensor) -> str:
    return str(list(t.shape))
