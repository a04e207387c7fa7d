"""Errors against the exact result in float64, a few thousand rows at a time so that large cells
fit.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..cell import EPS, Inputs
from ..cell_run import Verdict
from .cells import NSS, SR, SRNSS, Cell

ELEMENTS_AT_ONCE = 1 << 25


# Relative error: ten times that of the coarsest honest contestant, bfloat16 rounded after every
# step.
WRONG = 0.05


def check(cell: Cell, inputs: Inputs) -> Callable[[Any], Verdict]:
    """What measures a result and raises if it is far off."""

    def judge(returned: Any) -> Verdict:
        found = errors(cell, inputs, *results(cell.op, returned))
        if found.error is None or not found.error < WRONG:  # NaN too
            raise ValueError(f"the result is wrong: its error against float64 is {found.error:.2g}")
        return found

    return judge


def results(op: str, returned: Any) -> tuple[Tensor | None, Tensor | None]:
    """``(y, r)`` of what a call returned."""
    if op == SRNSS:
        y, r = returned
        return y, r
    return (None, returned) if op == SR else (returned, None)


class _Distance:
    def __init__(self) -> None:
        self.squares = [0.0, 0.0]

    def add(self, result: Tensor, exact: Tensor) -> None:
        self.squares[0] += (result.double() - exact).square().sum().item()
        self.squares[1] += exact.square().sum().item()

    @property
    def relative(self) -> float:
        return math.sqrt(self.squares[0] / self.squares[1])


def errors(cell: Cell, inputs: Inputs, y: Tensor | None, r: Tensor | None) -> Verdict:
    """Compares the results of one call, [1, S, D], with the formulas of ``ditnorm.functional`` in
    float64.
    """
    total, given_r, once = _Distance(), _Distance(), _Distance()
    for rows in _chunks(cell):
        v = inputs["x"][0, rows].double()
        if cell.op != NSS:
            assert r is not None
            v = inputs["residual"][0, rows].double() + _modulation(cell, inputs, "gate", rows) * v
            if cell.op == SR:
                stored, exact = r[0, rows], v
                total.add(stored, exact)
                given_r.add(stored, exact)
                once.add(exact.to(stored.dtype), exact)
                continue
        assert y is not None
        stored = y[0, rows]
        total.add(stored, _norm(cell, inputs, v, rows))
        exact = _norm(cell, inputs, v if r is None else r[0, rows].double(), rows)
        given_r.add(stored, exact)
        once.add(exact.to(stored.dtype), exact)
    return Verdict(total.relative, given_r.relative / once.relative)


def _chunks(cell: Cell) -> Iterator[slice]:
    step = max(1, ELEMENTS_AT_ONCE // cell.width)
    for start in range(0, cell.rows, step):
        yield slice(start, min(start + step, cell.rows))


def _modulation(cell: Cell, inputs: Inputs, name: str, rows: slice) -> Tensor:
    m = inputs[name]
    if "index" in inputs:
        m = m[inputs["index"][rows]]
    elif m.dim() == 4:
        tokens = torch.arange(rows.start, rows.stop, device=m.device)
        m = m[0, tokens // (cell.rows // cell.frames), 0]
    elif m.dim() == 3:
        m = m[0, rows]
    m = m.double()
    return m + inputs[f"{name}_table"].double() if f"{name}_table" in inputs else m


def _norm(cell: Cell, inputs: Inputs, v: Tensor, rows: slice) -> Tensor:
    if cell.norm == "layer":
        v = v - v.mean(-1, keepdim=True)
    n = v * (v.square().mean(-1, keepdim=True) + EPS).rsqrt()
    if "weight" in inputs:
        n = n * inputs["weight"].double()
    if "bias" in inputs:
        n = n + inputs["bias"].double()
    return n * (1 + _modulation(cell, inputs, "scale", rows)) + _modulation(cell, inputs, "shift", rows)
