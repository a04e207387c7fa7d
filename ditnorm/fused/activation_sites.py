"""The activations between the linear layers of a fused body: what the report says of each, and the
fused call of those that have one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..functional import gelu, swiglu
from ..ops.bits import same_bits
from ..ops.options import FLOATS, ROUNDINGS
from .sites import random_numbers

WATCHED = "watched by a hook, which is shown upstream's own values"


@dataclass(frozen=True)
class Activation:
    """What becomes of an activation in a call of a body."""

    path: str
    """Where its module is inside the body. Where it has none, the path of the body itself."""
    how: str
    """What patching makes of it, for users."""
    op: str | None = None
    """The op of ours that computes it. None: PyTorch's own does."""
    reason: str | None = None
    """Why it stays upstream's."""

    @property
    def announced(self) -> bool:
        """Whether patching warns that an op of ours is missing. It doesn't where a hook is why,
        since whoever set that knows.
        """
        return self.op is not None and self.reason not in (None, WATCHED)

    def site(self, dtype: torch.dtype) -> "ActivationSite | None":
        """Its fused call on a stream of ``dtype``."""
        return None if self.op is None or self.reason is not None else ActivationSite(self.op, dtype)


@dataclass(frozen=True)
class ActivationSite:
    """An activation. Its bits depend on nothing but the number."""

    op: str
    dtype: torch.dtype
    fused: bool = True
    quantised: None = None

    def __str__(self) -> str:
        return f"{self.op} ({self.dtype})".replace("torch.", "")

    def same_bits(self, device: torch.device) -> bool:
        """Compares all numbers of a half-precision dtype. A kernel that has other bits counts as
        equal here: it never runs, and the report says so.
        """
        return other_bits(self.op, device, self.dtype) is not None or _compared(self.op, device, self.dtype)


_known: dict[tuple[str, torch.device, torch.dtype], bool] = {}


def served(op: str, x: Tensor) -> bool:
    """Whether kernels serve ``gelu`` or ``swiglu`` of ``x``, and its gradients where these may be
    wanted, with PyTorch's bits for all numbers of the dtype. If not, PyTorch is to compute it, and
    the call is counted as one of PyTorch's path.

    The kernels and PyTorch are built with CUDA toolkits of their own, whose ``tanhf`` and ``expf``
    may differ. So they are compared once a process, for which the host waits.
    """
    fits = x.dim() in (2, 3)
    if torch.compiler.is_compiling():  # Dynamo would guard a graph that counts by the count
        return fits and not x.requires_grad and x.dtype in FLOATS  # a compiler fuses gradients itself
    if fits and x.is_cuda:
        what = _UNDER_GRAD[op] if torch.is_grad_enabled() else op
        if _known.get((what, x.device, x.dtype)) or _tried(what, x.device, x.dtype):
            return True
    kernels.count_reference(op)
    return False


def other_bits(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel of ours serves an op on a GPU that has kernels. Must not initialise CUDA."""
    if device.type != "cuda" or not torch.cuda.is_initialized() or kernels.unavailable_on(device) is not None:
        return None
    return None if dtype not in FLOATS or _tried(op, device, dtype) else f"the kernel has other bits than this PyTorch's {op} on this GPU"


def _tried(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    key = op, torch.device("cuda", torch.cuda.current_device()) if device.index is None else device, dtype
    if key not in _known:
        if torch.cuda.is_current_stream_capturing():
            return False
        with torch.inference_mode():
            _known[key] = dtype in FLOATS and _compared(*key) and kernels.unavailable_on(key[1]) is None
    return _known[key]


def _compared(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernel and PyTorch agree on all numbers of a half-precision dtype, or on some
    millions of float32.
    """
    ours, pytorchs = _EXPRESSIONS[op]
    if dtype.itemsize == 2:
        numbers = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype)
    else:
        numbers = torch.arange(-(2**31), 2**31, 1021, device=device).to(torch.int32).view(torch.float32).to(dtype)
        numbers = torch.cat([numbers, torch.linspace(-12, 12, 1 << 20, device=device, dtype=dtype)])
    rows = numbers[: numbers.numel() // 64 * 64].view(-1, 64)
    return all(same_bits(a.nan_to_num(-1.0), b.nan_to_num(-1.0)) for a, b in zip(ours(rows), pytorchs(rows), strict=True))


def _factors(x: Tensor) -> tuple[Tensor, Tensor]:
    """``dy`` and ``value`` of ``swiglu``: random, the same for each shape of ``x``."""
    dy, value = random_numbers(x.device)(2, *x.shape).to(x.dtype)
    return dy, value


def _our_gradients(x: Tensor) -> Sequence[Tensor]:
    dy, value = _factors(x)
    found: Sequence[Tensor] = kernels.ops.swiglu_backward.default(dy, x, value, ROUNDINGS.index("eager"))
    return found


def _autograds(x: Tensor) -> Sequence[Tensor]:
    dy, value = _factors(x)
    return torch.ops.aten.silu_backward.default(dy * value, x), dy * F.silu(x)


_UNDER_GRAD: Mapping[str, str] = {"gelu": "gelu", "swiglu": "swiglu and its gradients"}
"""What has to be equal where gradients may be wanted: those of GELU are PyTorch's own."""

_EXPRESSIONS: Mapping[str, tuple[Callable[[Tensor], Sequence[Tensor]], Callable[[Tensor], Sequence[Tensor]]]] = {
    "gelu": (lambda x: [gelu(x, rounding="eager")], lambda x: [F.gelu(x, approximate="tanh")]),
    "swiglu": (lambda x: [swiglu(x, x, rounding="eager")], lambda x: [F.silu(x) * x]),
    "swiglu and its gradients": (
        lambda x: [swiglu(x, x, rounding="eager"), *_our_gradients(x)],
        lambda x: [F.silu(x) * x, *_autograds(x)],
    ),
}
