"""Who computes the ops of norm and residual: ditnorm under both rounding laws, the unfused
expression eager and compiled, and peers.
"""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any

import torch

from ditnorm import functional
from ditnorm.ops.table import OPS

from ..cell import EPS, Inputs
from ..contestants import AUTOTUNED, COMPILE_MODES, COMPILED, EAGER, SINGLE, UNFUSED, Call, Contestant, Maker, nothing
from .cells import MODULATIONS, NSS, SR, SRNSS, Cell

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    NSS: functional.norm_scale_shift,
    SRNSS: functional.scale_residual_norm_scale_shift,
    SR: functional.scale_residual,
}


def interpreted() -> list[Contestant]:
    """Ditnorm and the unfused expression."""
    return [Contestant(SINGLE, partial(_ditnorm, "single")), Contestant(EAGER, partial(_ditnorm, "eager")), Contestant(UNFUSED, _unfused)]


def compiled() -> list[Contestant]:
    """torch.compile of the unfused expression."""
    return [Contestant(COMPILED, _compiled), Contestant(AUTOTUNED, _autotuned)]


def _ditnorm(rounding: str, cell: Cell) -> Maker:
    options: dict[str, Any] = {"rounding": rounding} if cell.op == SR else {"norm": cell.norm, "eps": EPS, "rounding": rounding}
    leading = (*(("x",) if cell.op == NSS else ("residual", "x")), *MODULATIONS[cell.op])

    def make(inputs: Inputs) -> Call:
        others = {name: t for name, t in inputs.items() if name not in leading}
        return partial(FUNCTIONS[cell.op], *(inputs[name] for name in leading), **others, **options)

    return make


def _expression(cell: Cell, function: Callable[..., Any], inputs: Inputs) -> Call:
    """What diffusers computes without ditnorm."""
    options = {"norm": cell.norm, "eps": EPS, "rounding": "eager"}
    return partial(function, *(inputs.get(name, options.get(name)) for name in signature(OPS[cell.op].call).parameters))


def _unfused(cell: Cell) -> Maker:
    return partial(_expression, cell, OPS[cell.op].expression)


def _compile(cell: Cell, name: str) -> Maker:
    function = torch.compile(OPS[cell.op].expression, fullgraph=True, dynamic=False, mode=COMPILE_MODES[name])
    return partial(_expression, cell, function)


def _compiled(cell: Cell) -> Maker:
    return _compile(cell, COMPILED) if cell.compiled else nothing


def _autotuned(cell: Cell) -> Maker:
    return _compile(cell, AUTOTUNED) if cell.autotune else nothing
