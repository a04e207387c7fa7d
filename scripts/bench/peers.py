"""Other libraries' kernels for the same sites. They are called, never required: what can't be imported is named with the reason."""

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch

from .cells import EPS, NSS, SR, Cell, Inputs

Maker = Callable[[Inputs], Callable[[], Any] | None]
Makers = Mapping[tuple[str, str], Callable[[], Callable[..., Any]]]


@dataclass(frozen=True)
class Peer:
    """A peer as found in this process."""

    name: str
    package: str
    bind: Callable[..., Any]


@dataclass(frozen=True)
class Missing:
    """A peer that can't be imported, and why."""

    name: str
    reason: str


@dataclass
class Found:
    """What this process has of the peers."""

    available: list[Peer] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)


@cache
def found() -> Found:
    makers: Makers = {
        ("sglang", "sglang"): _sglang_cutedsl,
        ("sglang triton", "sglang"): _sglang_triton,
        ("comfy-kitchen", "comfy-kitchen"): _comfy_kitchen,
        ("liger", "liger-kernel"): _liger,
    }
    return look_for(makers)


def look_for(makers: Makers) -> Found:
    """Each peer, by its name and distribution, is available if what makes its ``bind`` can import it."""
    result = Found()
    for (name, package), maker in makers.items():
        try:
            importlib.metadata.version(package)
            result.available.append(Peer(name, package, maker()))
        except Exception as error:  # whatever a package's import raises: it is absent, or broken here
            result.missing.append(Missing(name, _one_line(error)))
    return result


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _nothing(inputs: Inputs) -> None:
    return None


def _plain(cell: Cell) -> bool:
    """Whether the cell's modulations are what the peers know: neither indexed nor with tables."""
    return cell.layout != "index" and not cell.tables


def _tokens(inputs: Inputs, name: str) -> Any:
    """A modulation as the peers take it: per sample [1, 1, D], else as it is."""
    m = inputs[name]
    return m[:, None] if m.dim() == 2 else m


def enter(package: str, names: Iterable[str]) -> None:
    """Puts a package's own packages into ``sys.modules`` unexecuted, so that modules in them can be imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {package!r}")
    roots = list(spec.submodule_search_locations)
    for name in names:
        folder = importlib.machinery.ModuleSpec(f"{package}.{name}".rstrip("."), None, is_package=True)
        folder.origin = f"{roots[0]}/{name.replace('.', '/')}/__init__.py"
        folder.submodule_search_locations = [f"{root}/{name.replace('.', '/')}" for root in roots]
        sys.modules[folder.name] = importlib.util.module_from_spec(folder)


# sglang


class _Elsewhere(types.ModuleType):
    """Stands in for modules of sglang's server that its kernels ask which platform this is, and to register their ops."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self if name == "current_platform" else lambda *_: name == "is_cuda"

    @staticmethod
    def direct_register_custom_op(op_name: str, op_func: Callable[..., Any], mutates_args: list[str], **_: Any) -> None:
        # Only torch.compile goes through the registered op: an eager call goes straight to its function.
        torch.library.custom_op(f"sglang::{op_name}", op_func, mutates_args=mutates_args)


_SERVER = ("srt.utils", "srt.utils.common", "srt.utils.patch_torch", "multimodal_gen.runtime.platforms")
_PACKAGES = ("", "kernels", "kernels.jit", "kernels.ops", "kernels.ops.diffusion", "multimodal_gen", "multimodal_gen.runtime", "srt")


@cache
def _enter_sglang() -> None:
    """Makes ``sglang.kernels`` importable without the server around it.

    The packages' own ``__init__`` import some fifty distributions that no kernel needs: they are entered in ``sys.modules`` unexecuted.
    """
    enter("sglang", (*_PACKAGES, "srt.utils"))
    importlib.import_module("sglang.srt.utils.custom_op")  # how its kernels register ops; then the server's modules can go
    for name in _SERVER:
        sys.modules[f"sglang.{name}"] = _Elsewhere(f"sglang.{name}")


def sglang_module(name: str) -> types.ModuleType:
    """A module of ``sglang.kernels``."""
    _enter_sglang()
    return importlib.import_module(f"sglang.kernels.{name}")


def _sglang_cutedsl() -> Callable[[Cell], Maker]:
    kernels = sglang_module("ops.diffusion.norm.scale_residual_norm_cutedsl")
    sglang_module("kda_kernels.norm_scale_shift_jit")  # what its functions import at their first call

    def bind(cell: Cell) -> Maker:
        if not _plain(cell) or cell.op == SR or cell.width % 256 or cell.width > 8192:
            return _nothing

        def make(inputs: Inputs) -> Callable[[], Any]:
            after = (inputs.get("weight"), inputs.get("bias"), _tokens(inputs, "scale"), _tokens(inputs, "shift"), cell.norm, EPS)
            if cell.op == NSS:
                return partial(kernels.fused_norm_scale_shift, inputs["x"], *after)
            return partial(kernels.fused_scale_residual_norm_scale_shift, inputs["residual"], inputs["x"], _tokens(inputs, "gate"), *after)

        return make

    return bind


def _sglang_triton() -> Callable[[Cell], Maker]:
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
        return _nothing

    return bind


# others


def _comfy_kitchen() -> Callable[[Cell], Maker]:
    library = importlib.import_module("comfy_kitchen")

    def bind(cell: Cell) -> Maker:
        if cell.op != NSS or not _plain(cell) or cell.affine or cell.layout == "frame":
            return _nothing
        function = library.adaln if cell.norm == "layer" else library.rms_adaln
        return lambda inputs: partial(function, inputs["x"], _tokens(inputs, "scale"), _tokens(inputs, "shift"), EPS)

    return bind


def _liger() -> Callable[[Cell], Maker]:
    function = importlib.import_module("liger_kernel.ops.modulated_rms_norm").LigerModulatedRMSNormFunction

    def bind(cell: Cell) -> Maker:
        if cell.op != NSS or cell.norm != "rms" or not _plain(cell):
            return _nothing
        options = (EPS, 0.0, "llama", False)  # eps, offset, casting mode, in place
        return lambda inputs: partial(function.apply, inputs["x"], inputs.get("weight"), inputs["scale"], inputs["shift"], *options)

    return bind
