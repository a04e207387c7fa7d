"""How other libraries' kernels compute the ops of norm and residual."""

from functools import cache, partial
from typing import Any

from ..cell import EPS, Inputs
from ..contestants import Binding, Call, Maker, nothing
from ..libraries import Found, comfy_kitchen, liger, look_for, sglang_module
from .cells import NSS, SR, Cell


@cache
def found() -> Found:
    """The peers that this process can import."""
    return look_for(
        {
            ("sglang", "sglang"): _sglang_cutedsl,
            ("sglang triton", "sglang"): _sglang_triton,
            ("comfy-kitchen", "comfy-kitchen"): _comfy_kitchen,
            ("liger", "liger-kernel"): _liger,
        }
    )


def _plain(cell: Cell) -> bool:
    """Whether the cell's modulations are what the peers know: neither indexed nor with tables."""
    return cell.layout != "index" and not cell.tables


def _tokens(inputs: Inputs, name: str) -> Any:
    """A modulation as the peers take it: per sample [1, 1, D], else as it is."""
    m = inputs[name]
    return m[:, None] if m.dim() == 2 else m


def _sglang_cutedsl() -> Binding:
    kernels = sglang_module("ops.diffusion.norm.scale_residual_norm_cutedsl")
    # What its functions import at their first call.
    sglang_module("kda_kernels.norm_scale_shift_jit")

    def bind(cell: Cell) -> Maker:
        if not _plain(cell) or cell.op == SR or cell.width % 256 or cell.width > 8192:
            return nothing

        def make(inputs: Inputs) -> Call:
            after = (inputs.get("weight"), inputs.get("bias"), _tokens(inputs, "scale"), _tokens(inputs, "shift"), cell.norm, EPS)
            if cell.op == NSS:
                return partial(kernels.fused_norm_scale_shift, inputs["x"], *after)
            return partial(kernels.fused_scale_residual_norm_scale_shift, inputs["residual"], inputs["x"], _tokens(inputs, "gate"), *after)

        return make

    return bind


def _sglang_triton() -> Binding:
    modulate = sglang_module("kda_kernels.layernorm_modulate_triton").fused_layernorm_modulate_raw
    gated = sglang_module("ops.diffusion.modulate.residual_gate_fp32").residual_gate_fp32

    def bind(cell: Cell) -> Maker:
        plain = _plain(cell) and cell.layout == "sample" and not cell.views
        if plain and cell.op == SR:
            return lambda inputs: partial(gated, inputs["residual"], inputs["x"], _tokens(inputs, "gate"))
        if (
            plain
            and cell.op == NSS
            and cell.norm == "layer"
            and not cell.affine
            and (cell.dtype, cell.modulation_dtype) == ("bf16", "bf16")
        ):
            return lambda inputs: partial(modulate, inputs["x"], inputs["scale"], inputs["shift"], EPS)
        return nothing

    return bind


def _comfy_kitchen() -> Binding:
    library = comfy_kitchen()

    def bind(cell: Cell) -> Maker:
        if cell.op != NSS or not _plain(cell) or cell.affine or cell.layout == "frame":
            return nothing
        function = library.adaln if cell.norm == "layer" else library.rms_adaln
        return lambda inputs: partial(function, inputs["x"], _tokens(inputs, "scale"), _tokens(inputs, "shift"), EPS)

    return bind


def _liger() -> Binding:
    function = liger("modulated_rms_norm").LigerModulatedRMSNormFunction

    def bind(cell: Cell) -> Maker:
        if cell.op != NSS or cell.norm != "rms" or not _plain(cell):
            return nothing
        options = (EPS, 0.0, "llama", False)  # eps, offset, casting mode, in place
        return lambda inputs: partial(function.apply, inputs["x"], inputs.get("weight"), inputs["scale"], inputs["shift"], *options)

    return bind
