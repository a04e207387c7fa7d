"""Who quantises: ditnorm, and the unfused expression with torchao's quantiser, eager and
compiled.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditnorm import functional
from ditnorm.ops import quantization
from ditnorm.ops.table import OPS

from ..cell import EPS, Inputs, tensors
from ..cell_run import Verdict
from ..contestants import COMPILED, EAGER, UNFUSED, Contestant, Maker
from .cells import GELU, NSS, SRNSS, QuantizedCell

LARGEST_ERROR = 2.0**-4
"""Relative, in the L2 norm: half a unit in the last place of e4m3, which has three digits behind
the first.
"""
TWO_KERNELS = "ditnorm, two kernels"


def interpreted() -> list[Contestant]:
    """Ditnorm, also with the quantiser in a kernel of its own, and the unfused expression."""
    return [Contestant(EAGER, _ditnorm), Contestant(TWO_KERNELS, _two_kernels), Contestant(UNFUSED, _unfused)]


def compiled() -> list[Contestant]:
    """torch.compile of the unfused expression."""
    return [Contestant(COMPILED, _compiled)]


def _options(cell: QuantizedCell) -> dict[str, Any]:
    return {"eps": EPS, "rounding": "eager"} if cell.op in (NSS, SRNSS) else {}


def _ditnorm(cell: QuantizedCell) -> Maker:
    return lambda inputs: partial(getattr(functional, cell.op), **inputs, law=cell.quantiser, **_options(cell))


def _two_kernels(cell: QuantizedCell) -> Maker:
    if cell.op not in (NSS, SRNSS, GELU):
        return lambda inputs: None

    def call(**inputs: Any) -> Any:
        if cell.op == GELU:
            return functional.quantize(F.gelu(inputs["x"], approximate="tanh"), cell.quantiser)
        result = getattr(functional, cell.op.removesuffix("_quantize"))(**inputs, **_options(cell))
        if cell.op == NSS:
            return functional.quantize(result, cell.quantiser)
        return functional.quantize(result[0], cell.quantiser), result[1]

    return lambda inputs: partial(call, **inputs)


def expression(cell: QuantizedCell, inputs: Inputs) -> Any:
    """What diffusers and torchao compute without ditnorm: values, scale, and the residual where
    there is one.
    """
    x = inputs["x"]
    if cell.op == GELU:
        x = F.gelu(x, approximate="tanh")
    if cell.op not in (NSS, SRNSS):
        return quantization.quantize(x, cell.quantiser)
    op = OPS[cell.op.removesuffix("_quantize")]
    given = dict.fromkeys(op.call._fields) | {"norm": "layer"} | _options(cell) | dict(inputs)  # type: ignore[attr-defined]
    result = op.expression(**given)
    return (
        quantization.quantize(result, cell.quantiser) if cell.op == NSS else (*quantization.quantize(result[0], cell.quantiser), result[1])
    )


def _unfused(cell: QuantizedCell) -> Maker:
    return lambda inputs: partial(expression, cell, inputs)


def _compiled(cell: QuantizedCell) -> Maker:
    function = torch.compile(partial(expression, cell), fullgraph=True, dynamic=False)
    return lambda inputs: partial(function, inputs)


def check(cell: QuantizedCell, inputs: Inputs) -> Callable[[Any], Verdict]:
    """What raises unless the values stand for what is quantised, as exactly as they can."""
    exact = _dequantised(expression(cell, inputs))

    def judge(returned: Any) -> Verdict:
        found = _dequantised(returned)
        if found.shape != exact.shape:
            raise ValueError(f"the result is {list(found.shape)}, not {list(exact.shape)}")
        error = ((found - exact).norm() / exact.norm()).item()
        if not error <= LARGEST_ERROR:  # NaN too
            raise ValueError(f"the result is wrong: its relative error is {error:.3g}")
        return Verdict(error)

    return judge


def _dequantised(returned: Any) -> Tensor:
    values, scale, *_ = _results(returned)
    return values.float() * scale


def _results(returned: Any) -> Sequence[Tensor]:
    return tensors(returned)
