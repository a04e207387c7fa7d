"""Who computes the activations: ditnorm under both rounding laws, the unfused expression eager and
compiled.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditnorm import functional
from ditnorm.ops.table import OPS

from ..cell import Inputs
from ..cell_run import Verdict
from ..contestants import COMPILE_MODES, EAGER, SINGLE, UNFUSED, Call, Contestant, Maker
from .cells import ActivationCell

MOST_ULPS, MOST_ULPS_FP32 = 2, 64
"""Honest half-precision contestants round twice, half a unit each; float32 ones have their own tanh
and exponential.
"""


def interpreted() -> list[Contestant]:
    """Ditnorm and the unfused expression."""
    return [Contestant(SINGLE, partial(_ditnorm, "single")), Contestant(EAGER, partial(_ditnorm, "eager")), Contestant(UNFUSED, _unfused)]


def compiled() -> list[Contestant]:
    """torch.compile of the unfused expression."""
    return [Contestant(name, partial(_compiled, name)) for name in COMPILE_MODES]


def _ditnorm(rounding: str, cell: ActivationCell) -> Maker:
    return lambda inputs: partial(getattr(functional, cell.op), **inputs, rounding=rounding)


def expression(cell: ActivationCell, function: Callable[..., Any], inputs: Inputs) -> Call:
    """What diffusers' blocks compute without ditnorm."""
    given = {"beside": None, "rounding": "eager"} | dict(inputs)
    return partial(function, *(given[name] for name in OPS[cell.op].call._fields))  # type: ignore[attr-defined]


def _unfused(cell: ActivationCell) -> Maker:
    return partial(expression, cell, OPS[cell.op].expression)


def _compiled(name: str, cell: ActivationCell) -> Maker:
    return partial(expression, cell, torch.compile(OPS[cell.op].expression, fullgraph=True, dynamic=False, mode=COMPILE_MODES[name]))


def check(cell: ActivationCell, inputs: Inputs) -> Callable[[Tensor], Verdict]:
    """What raises unless each element is within a few units in the last place of the exact one.

    Where GELU vanishes, units of what it is made of: a tanh near -1, which cancels.
    """
    most = (MOST_ULPS_FP32 if cell.dtype == "fp32" else MOST_ULPS) * torch.finfo(inputs["x"].dtype).eps

    def judge(returned: Tensor) -> Verdict:
        x, beside = inputs["x"], inputs.get("beside")
        if returned.shape != (*x.shape[:-1], cell.beside + cell.width) or returned.dtype is not x.dtype:
            raise ValueError(f"the result is {returned.dtype} {list(returned.shape)}")
        if beside is not None and not torch.equal(returned[..., : cell.beside], beside):
            raise ValueError("what stands beside it is wrong")
        for first in range(0, cell.tokens, 1024):
            rows = slice(first, first + 1024)
            wide, result = x[:, rows].double(), returned[:, rows, cell.beside :].double()
            if cell.op == "gelu":
                subnormal = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
                exact, slack = F.gelu(wide, approximate="tanh"), wide.abs() * torch.finfo(torch.float32).eps * 4 + subnormal
            else:
                exact = F.silu(wide) * inputs["value"][:, rows].double()
                slack = torch.full_like(exact, torch.finfo(x.dtype).smallest_normal * 64)
            worst = ((result - exact).abs() - slack).div(exact.abs().clamp_min(1e-30)).max().item()
            if not worst <= most:  # NaN too
                raise ValueError(f"the result is wrong: off by {worst / torch.finfo(x.dtype).eps:.3g} units in the last place")
        return Verdict()

    return judge
