"""The activation of a block's MLP, written by one kernel behind attention's result where the last
linear layer reads both, and SwiGLU alone.

Upstream's expression runs where there is no kernel, where that has other bits, and where somebody
wants to see it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..functional import gelu, swiglu
from ..ops.checks import FLOATS, same_bits
from ..swapping.originals import replaced, replaced_functional
from .gelu import activated, activation_of, called_as_module, fits_epilogue, is_torchs_gelu

_SILU_FORWARD = nn.SiLU.forward if replaced(nn.SiLU, "forward") is None else None
_SILU = F.silu if replaced_functional("silu") is None else None


def begun(activation: nn.Module, linear: nn.Module, x: Any, rounding: str) -> tuple[Tensor, bool]:
    """Of ``activation(linear(x))``, GELU for a block that joins it with attention's result later:
    ``linear(x)`` and True where :func:`joined` does the rest, else the whole and False.
    """
    if (
        not is_torchs_gelu(activation)
        or activation.approximate != "tanh"
        or (rounding == "single" and fits_epilogue(linear, x, activation.approximate))
    ):
        return activated(activation, linear, x, rounding), False
    inner = linear(x)
    if served("gelu", inner):
        return inner, True
    return activation_of(activation, linear, inner), False


def joined(beside: Tensor, inner: Tensor, pending: bool, rounding: str) -> Tensor:
    """Attention's result and the MLP's side by side: [B, S, D], what :func:`begun` returned ->
    [B, S, D + inner dim].
    """
    return gelu(inner, beside, rounding=rounding) if pending else torch.cat([beside, inner], dim=-1)


def is_torchs_silu(activation: nn.Module) -> bool:
    """Whether a call of a module is PyTorch's SiLU, and nobody looks at it."""
    return type(activation).forward is _SILU_FORWARD and called_as_module(activation)


def silu_gated(x: Tensor, value: Tensor, beside: Tensor | None = None, *, rounding: str) -> Tensor:
    """``F.silu(x) * value``, behind ``beside`` if that is given: x and value of one shape."""
    if F.silu is _SILU and served("swiglu", x):
        return swiglu(x, value, beside, rounding=rounding)
    y = F.silu(x) * value
    return y if beside is None else torch.cat([beside, y], dim=-1)


_known: dict[tuple[str, torch.device, torch.dtype], bool] = {}


def served(op: str, x: Tensor) -> bool:
    """Whether a kernel computes ``gelu`` or ``swiglu`` of ``x``, with the bits of PyTorch's for all
    numbers of its dtype.

    Both call CUDA's functions, of which their toolkits may have different ones. Tried once a
    process, for which the host waits.
    """
    if not x.is_cuda or x.requires_grad or x.dim() not in (2, 3):
        return False
    if torch.compiler.is_compiling():
        return x.dtype in FLOATS
    key = op, x.device, x.dtype
    if key not in _known:
        if torch.cuda.is_current_stream_capturing():
            return False
        with torch.inference_mode():
            _known[key] = x.dtype in FLOATS and _compared(*key) and kernels.unavailable_on(x.device) is None
    return _known[key]


def _compared(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """All numbers of a half-precision dtype, some millions of float32's."""
    ours, pytorchs = _EXPRESSIONS[op]
    if dtype.itemsize == 2:
        numbers = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype)
    else:
        numbers = torch.arange(-(2**31), 2**31, 1021, device=device).to(torch.int32).view(torch.float32).to(dtype)
        numbers = torch.cat([numbers, torch.linspace(-12, 12, 1 << 20, device=device, dtype=dtype)])
    rows = numbers[: numbers.numel() // 64 * 64].view(-1, 64)
    return same_bits(*(f(rows).nan_to_num(-1.0) for f in (ours, pytorchs)))


_EXPRESSIONS: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (lambda x: gelu(x, rounding="eager"), lambda x: F.gelu(x, approximate="tanh")),
    "swiglu": (lambda x: swiglu(x, x, rounding="eager"), lambda x: F.silu(x) * x),
}
