"""The activations of feed-forward layers in plain PyTorch, written behind what the next linear
layer reads beside them.

y = [beside, gelu(x)]                (``gelu``)
y = [beside, silu(x) * value]        (``swiglu``)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import Gelu, SwiGLU
from .calls_backward import SwiGLUBackward


def gelu(call: Gelu) -> Tensor:
    """``y``, contiguous, with GELU in its tanh approximation (arXiv:1606.08415): one rounding under
    either law.
    """
    return _behind(call.beside, F.gelu(call.x, approximate="tanh"))


def swiglu(call: SwiGLU) -> Tensor:
    """``y``, contiguous (arXiv:2002.05202). ``"eager"`` rounds ``silu(x)`` to its dtype,
    ``"single"`` only the product.
    """
    x, value = call.x, call.value
    if call.rounding == "eager":
        return _behind(call.beside, F.silu(x) * value)
    wide = torch.promote_types(torch.float32, torch.promote_types(x.dtype, value.dtype))
    return _behind(call.beside, (F.silu(x.to(wide)) * value.to(wide)).to(x.dtype))


def swiglu_backward(call: SwiGLUBackward) -> tuple[Tensor, Tensor]:
    """``(dx, d_value)``, contiguous: ``silu'(x) * value * dy`` and ``silu(x) * dy``, rounded where
    autograd of the forward expression rounds.
    """
    dy, x, value, dtype = call.dy, call.x, call.value, call.x.dtype
    if call.rounding == "single":
        wide = torch.promote_types(torch.float32, dtype)
        dy, x, value = dy.to(wide), x.to(wide), value.to(wide)
    sigmoid: Tensor = torch.sigmoid(x.to(torch.promote_types(torch.float32, dtype)))
    dx = ((dy * value) * sigmoid * (1 + x * (1 - sigmoid))).to(dtype)
    return dx.contiguous(), (dy * F.silu(x)).to(dtype).contiguous()


def _behind(beside: Tensor | None, y: Tensor) -> Tensor:
    return y.contiguous() if beside is None else torch.cat([beside, y], dim=-1)
