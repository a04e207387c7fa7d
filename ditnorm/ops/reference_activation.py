"""The activations of feed-forward layers in plain PyTorch, written behind what the next linear
layer reads beside them.

y = [beside, gelu(x)]                (``gelu``)
y = [beside, silu(x) * value]        (``swiglu``)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import Gelu, SwiGLU


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


def _behind(beside: Tensor | None, y: Tensor) -> Tensor:
    return y.contiguous() if beside is None else torch.cat([beside, y], dim=-1)
