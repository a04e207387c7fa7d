"""Who computes such sites: ditnorm under both rounding laws, the unfused expression eager and
compiled.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ditnorm import functional
from ditnorm.ops.table import OPS

from ..cell import Inputs, tensors
from ..cell_run import Verdict
from ..contestants import COMPILE_MODES, EAGER, SINGLE, UNFUSED, Call, Contestant, Maker
from .cells import NSS, SRNSS, SandwichCell

EPS = 1e-5
LARGEST_ERROR = 4
"""Relative, in the L2 norm, in units in the last place: honest contestants round a few times, half
a unit each.
"""


def interpreted() -> list[Contestant]:
    """Ditnorm and the unfused expression."""
    return [Contestant(SINGLE, partial(_ditnorm, "single")), Contestant(EAGER, partial(_ditnorm, "eager")), Contestant(UNFUSED, _unfused)]


def compiled() -> list[Contestant]:
    """torch.compile of the unfused expression."""
    return [Contestant(name, partial(_compiled, name)) for name in COMPILE_MODES]


def _options(cell: SandwichCell, rounding: str) -> dict[str, Any]:
    norm = {"norm": "diffusers_rms"} if cell.op in (NSS, SRNSS) else {}
    return {"eps": EPS, "rounding": rounding, **norm}


def _ditnorm(rounding: str, cell: SandwichCell) -> Maker:
    return lambda inputs: partial(getattr(functional, cell.op), **inputs, **_options(cell, rounding))


def expression(cell: SandwichCell, function: Callable[..., Any], inputs: Inputs, rounding: str = "eager") -> Call:
    """What diffusers' blocks compute without ditnorm."""
    fields = OPS[cell.op].call._fields  # type: ignore[attr-defined]
    given = dict.fromkeys(fields) | _options(cell, rounding) | dict(inputs)
    return partial(function, *(given[name] for name in fields))


def _unfused(cell: SandwichCell) -> Maker:
    return partial(expression, cell, OPS[cell.op].expression)


def _compiled(name: str, cell: SandwichCell) -> Maker:
    return partial(expression, cell, torch.compile(OPS[cell.op].expression, fullgraph=True, dynamic=False, mode=COMPILE_MODES[name]))


def check(cell: SandwichCell, inputs: Inputs) -> Callable[[Any], Verdict]:
    """What raises unless each result is that of the expression, but for some roundings."""
    exact: Sequence[Tensor] = tensors(expression(cell, OPS[cell.op].expression, inputs, "single")())

    def judge(returned: Any) -> Verdict:
        results = tensors(returned)
        if [(t.shape, t.dtype) for t in results] != [(t.shape, t.dtype) for t in exact]:
            raise ValueError(f"the results are {[(t.dtype, list(t.shape)) for t in results]}")
        errors = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(results, exact, strict=True)]
        largest = LARGEST_ERROR * torch.finfo(exact[0].dtype).eps
        if not all(error <= largest for error in errors):  # NaN too
            raise ValueError(f"the result is wrong: its relative error is {max(errors):.3g}")
        return Verdict()

    return judge
