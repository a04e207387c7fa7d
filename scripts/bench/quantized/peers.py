"""How other libraries' kernels quantise rows: what is given, one scale for each row. None does so
behind a norm with its modulations, or behind GELU.

sglang         the Triton kernels of its diffusion models (float8) and of its server (int8)
comfy-kitchen  its CUDA kernel, int8
"""

from functools import cache, partial

from ..cell import Inputs
from ..contestants import Binding, Call, Maker, nothing
from ..libraries import Found, comfy_kitchen, look_for, sglang_module
from .cells import QUANTIZE, QuantizedCell


@cache
def found() -> Found:
    """The peers that this process can import."""
    return look_for({("sglang", "sglang"): _sglang, ("comfy-kitchen", "comfy-kitchen"): _comfy_kitchen})


def _sglang() -> Binding:
    float8 = sglang_module("ops.diffusion.quantization.fp8_rowwise_triton").fp8_rowwise
    int8 = sglang_module("ops.quantization.int8_kernel").per_token_quant_int8

    def float8_call(inputs: Inputs) -> Call:
        rows = inputs["x"].flatten(0, 1)

        def call() -> object:
            values, scale = float8(rows)
            return values.view(inputs["x"].shape), scale[:, None]

        return call

    def bind(cell: QuantizedCell) -> Maker:
        if cell.op != QUANTIZE:
            return nothing
        makers: dict[str, Maker] = {"float8-row": float8_call, "int8-row": lambda inputs: partial(int8, inputs["x"])}
        return makers.get(cell.law, nothing)

    return bind


def _comfy_kitchen() -> Binding:
    int8 = comfy_kitchen().quantize_int8_rowwise

    def bind(cell: QuantizedCell) -> Maker:
        return (lambda inputs: partial(int8, inputs["x"])) if (cell.op, cell.law) == (QUANTIZE, "int8-row") else nothing

    return bind
