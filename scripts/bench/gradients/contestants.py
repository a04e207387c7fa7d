"""Who makes gradients: ditnorm, and the formulas in PyTorch's operations, plain and compiled."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ditnorm import kernels
from ditnorm.ops.options import NORMS, PAIRS, QK_NORMS, ROUNDINGS
from ditnorm.ops.table import OPS

from ..cell import Inputs, tensors
from ..cell_run import Verdict
from ..contestants import COMPILED, EAGER, SINGLE, Contestant, Maker
from .cells import QK, GradientCell

FORMULA = "PyTorch"
LARGEST_ERROR = 2.0**-7
"""Relative, in the L2 norm: two roundings to bfloat16."""


def interpreted() -> list[Contestant]:
    """Ditnorm under both laws, and the formula in PyTorch's operations."""
    return [Contestant(SINGLE, partial(_ditnorm, "single")), Contestant(EAGER, partial(_ditnorm, "eager")), Contestant(FORMULA, _formula)]


def compiled() -> list[Contestant]:
    """torch.compile of the formula."""
    return [Contestant(COMPILED, _compiled)]


def _ditnorm(rounding: str, cell: GradientCell) -> Maker:
    op, options = OPS[cell.op], cell.options(rounding)
    numbers = {"norm": QK_NORMS if cell.op == QK else NORMS, "pairs": PAIRS, "rounding": ROUNDINGS}
    codes = {name: numbers[name].index(value) if name in numbers else value for name, value in options.items()}
    kernel = getattr(kernels.ops, cell.op).default
    fields = op.call._fields  # type: ignore[attr-defined]
    return lambda inputs: partial(kernel, *(codes[name] if name in codes else inputs.get(name) for name in fields))


def formula(cell: GradientCell, inputs: Inputs) -> Any:
    """The gradients in PyTorch's operations, rounded once."""
    op = OPS[cell.op]
    fields = dict.fromkeys(op.call._fields)  # type: ignore[attr-defined]
    return op.expression(**{**fields, **cell.options("single"), **inputs})


def _formula(cell: GradientCell) -> Maker:
    return lambda inputs: partial(formula, cell, inputs)


def _compiled(cell: GradientCell) -> Maker:
    function = torch.compile(partial(formula, cell), fullgraph=True, dynamic=False)
    return lambda inputs: partial(function, inputs)


def check(cell: GradientCell, inputs: Inputs) -> Callable[[Any], Verdict]:
    """What raises unless the gradients are those of the formula in float32."""
    wide = {name: t if t.is_complex() else t.float() for name, t in inputs.items()}
    exact = tensors(formula(cell, wide))

    def judge(returned: Any) -> Verdict:
        found = tensors(returned)
        error = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))
        if not error <= LARGEST_ERROR:  # NaN too
            raise ValueError(f"the result is wrong: its relative error is {error:.3g}")
        return Verdict(error)

    return judge
