"""Host time of a call under grad together with its backward pass, beside ``F.layer_norm``'s."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditnorm import functional
from ditnorm.ops.table import OPS

from ..cell import EPS
from ..contestants import EAGER, Call
from ..host import LAYER_NORM, SIZE

UNFUSED = "PyTorch"
NO_KERNEL = "autograd.Function without a kernel"


class _Nothing(torch.autograd.Function):
    """What any ``autograd.Function`` costs: it keeps its input and allocates results."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.empty_like(x)


def calls(device: str = "cuda") -> dict[str, Call]:
    """Forward and backward in one, by ``"op: contestant"``, with the gradients that a LoRA wants:
    those of the rows.
    """

    def rows() -> Tensor:
        return torch.randn(1, *SIZE, device=device).bfloat16()

    scale, shift, gate = rows()[:, :1].repeat(1, 1, 3).chunk(3, dim=-1)
    dy, x, residual = rows(), *(rows().requires_grad_() for _ in range(2))
    modulated = {"scale": scale, "shift": shift, "eps": EPS, "norm": "layer"}
    given: dict[str, dict[str, Any]] = {
        "norm_scale_shift": {"x": x, **modulated},
        "scale_residual_norm_scale_shift": {"residual": residual, "x": x, "gate": gate, **modulated},
        "scale_residual": {"residual": residual, "x": x, "gate": gate},
    }

    def both(function: Callable[[], Any], *wanted: Tensor) -> Call:
        def call() -> Any:
            with torch.enable_grad():
                made = function()
                made = made if isinstance(made, tuple) else (made,)
                return torch.autograd.grad(made, wanted, (dy,) * len(made))

        return call

    timed = {
        LAYER_NORM: both(partial(F.layer_norm, x, SIZE[1:], None, None, EPS), x),
        NO_KERNEL: both(partial(_Nothing.apply, x), x),
    }
    for op, arguments in given.items():
        wanted = [t for t in (arguments.get("residual"), x) if t is not None]
        every = dict.fromkeys(OPS[op].call._fields) | arguments | {"rounding": "eager"}  # type: ignore[attr-defined]
        timed[f"{op}: {EAGER}"] = both(partial(getattr(functional, op), **arguments, rounding="eager"), *wanted)
        timed[f"{op}: {UNFUSED}"] = both(partial(OPS[op].expression, **every), *wanted)
    return timed
