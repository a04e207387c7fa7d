"""Who computes the ops of query and key: ditnorm under both rounding laws, the unfused expression
eager and compiled, and peers.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ditnorm import functional
from ditnorm.ops.table import OPS

from ..cell import EPS, Inputs
from ..cell_run import Verdict
from ..contestants import COMPILE_MODES, EAGER, SINGLE, UNFUSED, Call, Contestant, Maker
from .cells import QKCell

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "qk_norm_rope": functional.qk_norm_rope,
    "joint_qk_norm_rope": functional.joint_qk_norm_rope,
}
MOST_ULPS, MOST_ULPS_FP32 = 4, 16
"""Honest half-precision contestants round four times, half a unit each; float32 ones differ in how
they sum and take the root.
"""


def interpreted() -> list[Contestant]:
    """Ditnorm and the unfused expression."""
    return [Contestant(SINGLE, partial(_ditnorm, "single")), Contestant(EAGER, partial(_ditnorm, "eager")), Contestant(UNFUSED, _unfused)]


def compiled() -> list[Contestant]:
    """torch.compile of the unfused expression."""
    return [Contestant(name, partial(_compiled, name)) for name in COMPILE_MODES]


def _ditnorm(rounding: str, cell: QKCell) -> Maker:
    options: dict[str, Any] = {"head_dim": cell.head_dim, "norm": cell.norm, "eps": EPS, "rounding": rounding}
    if cell.halves:
        options["pairs"] = "halves"
    return lambda inputs: partial(FUNCTIONS[cell.op], **inputs, **options)


def expression(cell: QKCell, function: Callable[..., Any], inputs: Inputs, rounding: str = "eager") -> Call:
    """What diffusers' attention processors compute without ditnorm."""
    options = {"head_dim": cell.head_dim, "norm": cell.norm, "eps": EPS, "encoder_first": False, "rounding": rounding}
    given = options | {"pairs": "halves" if cell.halves else "neighbours"} | dict(inputs)
    for prefix in ("", "key_", "encoder_"):
        rotary = given.pop(f"{prefix}rotary", None)
        given[f"{prefix}cos"], given[f"{prefix}sin"] = rotary if isinstance(rotary, tuple) else (rotary, None)
    return partial(function, *(given[name] for name in signature(OPS[cell.op].call).parameters))


def _unfused(cell: QKCell) -> Maker:
    return partial(expression, cell, OPS[cell.op].expression)


def _compiled(name: str, cell: QKCell) -> Maker:
    return partial(expression, cell, torch.compile(OPS[cell.op].expression, fullgraph=True, dynamic=False, mode=COMPILE_MODES[name]))


def check(cell: QKCell, inputs: Inputs) -> Callable[[Sequence[Tensor]], Verdict]:
    """What raises unless each result is within a few units in the last place of the expression
    rounded once.

    Units at the length of the rotated pair: what a rotation adds up may cancel.
    """
    exact: Sequence[Tensor] = expression(cell, OPS[cell.op].expression, inputs, "single")()

    def judge(returned: Sequence[Tensor]) -> Verdict:
        if len(returned) != len(exact):
            raise ValueError(f"{len(returned)} results, not {len(exact)}")
        for name, result, wanted in zip(("query", "key", "value"), returned, exact, strict=False):
            if (result.shape, result.dtype) != (wanted.shape, wanted.dtype):
                raise ValueError(f"the {name} is {result.dtype} {list(result.shape)}, not {wanted.dtype} {list(wanted.shape)}")
            ulps = (
                torch.stack([_ulps(*some, cell.halves) for some in zip(result.split(4096, 1), wanted.split(4096, 1), strict=True)])
                .max()
                .item()
            )
            most = MOST_ULPS_FP32 if wanted.dtype is torch.float32 else MOST_ULPS
            if not ulps <= most:  # NaN too
                raise ValueError(f"the result is wrong: the {name} is off by {ulps:.3g} units in the last place")
        return Verdict()

    return judge


def _ulps(result: Tensor, exact: Tensor, halves: bool) -> Tensor:
    pair = -2 if halves else -1
    a, b = (t.double().unflatten(-1, (2, -1) if halves else (-1, 2)) for t in (result, exact))
    return ((a - b).norm(dim=pair) / b.norm(dim=pair).clamp_min(1e-9)).max() / torch.finfo(exact.dtype).eps
