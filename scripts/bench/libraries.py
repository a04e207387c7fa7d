"""Other libraries whose kernels do the same: found, never required. What can't be imported is named
with the reason.

How their kernels are called stands with the cells that they serve: ``norm/peers.py``,
``qk/peers.py`` and ``quantized/peers.py``.
"""

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from .contestants import Binding, Contestant

Makers = Mapping[tuple[str, str], Callable[[], Binding]]
"""For each peer, by its name and distribution, what imports its kernels and makes its ``bind``."""


@dataclass
class Found:
    """What this process has of the peers."""

    available: list[Contestant] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    """Of the distributions that the available ones come from."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why a peer can't be imported, by its name."""


def look_for(makers: Makers) -> Found:
    """Imports what can be imported."""
    result = Found()
    for (name, package), maker in makers.items():
        try:
            version = importlib.metadata.version(package)
            result.available.append(Contestant(name, maker()))
            result.versions[package] = version
        except Exception as error:
            # Whatever a package's import raises: it is absent, or broken here.
            result.missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return result


def enter(package: str, names: Iterable[str]) -> None:
    """Puts a package's own packages into ``sys.modules`` unexecuted, so that modules in them can be
    imported.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {package!r}")
    roots = list(spec.submodule_search_locations)
    for name in names:
        folder = importlib.machinery.ModuleSpec(f"{package}.{name}".rstrip("."), None, is_package=True)
        folder.origin = f"{roots[0]}/{name.replace('.', '/')}/__init__.py"
        folder.submodule_search_locations = [f"{root}/{name.replace('.', '/')}" for root in roots]
        sys.modules[folder.name] = importlib.util.module_from_spec(folder)


class _Elsewhere(types.ModuleType):
    """Stands in for modules of sglang's server that its kernels ask which platform this is, and to
    register their ops.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self if name == "current_platform" else lambda *_: name == "is_cuda"

    @staticmethod
    def direct_register_custom_op(op_name: str, op_func: Callable[..., Any], mutates_args: list[str], **_: Any) -> None:
        # Only torch.compile goes through the registered op: an eager call goes straight to its
        # function.
        torch.library.custom_op(f"sglang::{op_name}", op_func, mutates_args=mutates_args)


_SERVER = ("srt.utils", "srt.utils.common", "srt.utils.patch_torch", "multimodal_gen.runtime.platforms")
_PACKAGES = (
    *("", "kernels", "kernels.jit", "kernels.ops", "kernels.ops.diffusion", "kernels.ops.quantization"),
    *("multimodal_gen", "multimodal_gen.runtime", "srt"),
)


@cache
def _enter_sglang() -> None:
    """Makes ``sglang.kernels`` importable without the server around it.

    The packages' own ``__init__`` import some fifty distributions that no kernel needs: they are
    entered in ``sys.modules`` unexecuted.
    """
    enter("sglang", (*_PACKAGES, "srt.utils"))
    # How its kernels register ops; then the server's modules can go.
    importlib.import_module("sglang.srt.utils.custom_op")
    for name in _SERVER:
        sys.modules[f"sglang.{name}"] = _Elsewhere(f"sglang.{name}")


def sglang_module(name: str) -> types.ModuleType:
    """A module of ``sglang.kernels``."""
    _enter_sglang()
    return importlib.import_module(f"sglang.kernels.{name}")


def comfy_kitchen() -> types.ModuleType:
    return importlib.import_module("comfy_kitchen")


def liger(name: str) -> types.ModuleType:
    """A module of ``liger_kernel.ops``."""
    return importlib.import_module(f"liger_kernel.ops.{name}")
