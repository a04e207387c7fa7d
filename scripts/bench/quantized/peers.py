"""How other libraries' kernels quantise rows: what is given, one scale for each row. None does so
behind a norm with its modulations, or behind GELU.

sglang         the Triton kernels of its diffusion models (float8) and of its server (int8)
comfy-kitchen  its CUDA kernel, int8
"""

from collections.abc import Callable, Mapping
from functools import cache, partial

from torch import Tensor

from ..contestants import Binding, Maker, nothing
from ..libraries import Found, comfy_kitchen, look_for, sglang_module
from .cells import QUANTIZE, QuantizedCell


@cache
def found() -> Found:
    """The peers that this process can import."""
    return look_for({("sglang", "sglang"): _sglang, ("comfy-kitchen", "comfy-kitchen"): _comfy_kitchen})


def _sglang() -> Binding:
    float8 = sglang_module("ops.diffusion.quantization.fp8_rowwise_triton").fp8_rowwise
    int8 = sglang_module("ops.quantization.int8_kernel").per_token_quant_int8

    def float8_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
        values, scale = float8(rows)
        return values, scale[:, None]

    return lambda cell: _of_rows({"float8-row": float8_rows, "int8-row": int8}, cell)


def _comfy_kitchen() -> Binding:
    library = comfy_kitchen()
    return lambda cell: _of_rows({"int8-row": library.quantize_int8_rowwise}, cell)


def _of_rows(quantisers: Mapping[str, Callable[[Tensor], object]], cell: QuantizedCell) -> Maker:
    """By law what quantises a matrix: values and a column of scales."""
    if cell.op != QUANTIZE or cell.law not in quantisers:
        return nothing
    return lambda inputs: partial(quantisers[cell.law], inputs["x"].flatten(0, -2))
