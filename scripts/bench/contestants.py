"""Who is measured: ditnorm under both rounding laws, the unfused expression eager and compiled, and every peer that can be imported."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ditnorm import functional
from ditnorm.ops.table import OPS as TABLE

from . import peers
from .cells import EPS, MODULATIONS, NSS, SR, SRNSS, Cell, Inputs

Binding = Callable[[Cell], Callable[[Inputs], Callable[[], Any] | None]]
"""For a cell, what makes a call without arguments of a set of inputs; None where the contestant doesn't serve the cell.
A call returns what the function of ``ditnorm.functional`` does: y, (y, r) or r."""

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    NSS: functional.norm_scale_shift,
    SRNSS: functional.scale_residual_norm_scale_shift,
    SR: functional.scale_residual,
}
EXPRESSIONS: Mapping[str, Callable[..., Any]] = {
    NSS: TABLE[NSS].expression,
    SRNSS: TABLE[SRNSS].expression,
    SR: TABLE[SR].expression,
}
TENSORS = {
    NSS: ("x", "scale", "shift", "weight", "bias", "scale_table", "shift_table", "index"),
    SRNSS: ("residual", "x", "gate", "scale", "shift", "weight", "bias", "gate_table", "scale_table", "shift_table", "index"),
    SR: ("residual", "x", "gate", "gate_table", "index"),
}

SINGLE, EAGER = "ditnorm single", "ditnorm eager"
UNFUSED, COMPILED, AUTOTUNED = "eager", "torch.compile", "max-autotune"
OURS = (SINGLE, EAGER)


@dataclass(frozen=True)
class Contestant:
    """One way of computing the ops."""

    name: str
    bind: Binding


def results(op: str, returned: Any) -> tuple[Tensor | None, Tensor | None]:
    """``(y, r)`` of what a call returned."""
    if op == SRNSS:
        y, r = returned
        return y, r
    return (None, returned) if op == SR else (returned, None)


def interpreted() -> list[Contestant]:
    """Ditnorm and the unfused expression."""
    return [Contestant(SINGLE, partial(_ditnorm, "single")), Contestant(EAGER, partial(_ditnorm, "eager")), Contestant(UNFUSED, _unfused)]


def compiled() -> list[Contestant]:
    """torch.compile of the unfused expression."""
    return [Contestant(COMPILED, _compiled), Contestant(AUTOTUNED, _autotuned)]


def importable() -> list[Contestant]:
    """The peers that this process can import."""
    return [Contestant(peer.name, peer.bind) for peer in peers.found().available]


def _ditnorm(rounding: str, cell: Cell) -> Callable[[Inputs], Callable[[], Any]]:
    options: dict[str, Any] = {"rounding": rounding}
    if cell.norm != "layer":
        options["norm"] = cell.norm
    leading = (*(("x",) if cell.op == NSS else ("residual", "x")), *MODULATIONS[cell.op])

    def make(inputs: Inputs) -> Callable[[], Any]:
        others = {name: t for name, t in inputs.items() if name not in leading}
        return partial(FUNCTIONS[cell.op], *(inputs[name] for name in leading), **others, **options)

    return make


def _positional(cell: Cell, inputs: Inputs) -> list[Any]:
    """The arguments of the unfused expression: what diffusers computes without ditnorm."""
    options = ["eager"] if cell.op == SR else [cell.norm, EPS, "eager"]
    return [*(inputs.get(name) for name in TENSORS[cell.op]), *options]


def _unfused(cell: Cell) -> Callable[[Inputs], Callable[[], Any]]:
    return lambda inputs: partial(EXPRESSIONS[cell.op], *_positional(cell, inputs))


def _compile(cell: Cell, mode: str | None) -> Callable[[Inputs], Callable[[], Any]]:
    compiled = torch.compile(EXPRESSIONS[cell.op], fullgraph=True, dynamic=False, mode=mode)
    return lambda inputs: partial(compiled, *_positional(cell, inputs))


def _compiled(cell: Cell) -> Callable[[Inputs], Callable[[], Any] | None]:
    return _compile(cell, None) if cell.group == "anchors" else _nothing


def _autotuned(cell: Cell) -> Callable[[Inputs], Callable[[], Any] | None]:
    # Not with its own CUDA graphs: every contestant is captured in ours.
    return _compile(cell, "max-autotune-no-cudagraphs") if cell.autotune else _nothing


def _nothing(inputs: Inputs) -> None:
    return None
