"""Compares the fused ops with the unfused expression, bit for bit, on the user's own device and for
the sites of the user's own model.
"""

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from .. import kernels
from ..fused.sites import FusedCall
from ..ops.options import FLOATS
from ..swapping.hook_chains import group_offloading
from .targets import modules_of, targets
from .units import Unit


@dataclass(frozen=True)
class Verification:
    """``sites`` were compared on ``device``, ``differing`` of them had other bits; or nothing was
    compared, for a ``reason``.
    """

    device: str = ""
    sites: tuple[FusedCall, ...] = ()
    differing: tuple[FusedCall, ...] = ()
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"not verified: {self.reason}"
        if self.differing:
            return f"differs on {self.device}, torch {torch.__version__}: {'; '.join(map(str, self.differing))}"
        return f"bit-identical: verified on {self.device}, torch {torch.__version__}"


_identical: dict[tuple[FusedCall, str], bool] = {}
_warned_of: set[tuple[FusedCall, str]] = set()
_own_calls: Counter[tuple[str, str]] = Counter()


def calls() -> Counter[tuple[str, str]]:
    """``kernels.counts()`` without the calls that verification itself made."""
    return Counter(kernels.counts()) - _own_calls


class Verifications(dict[str, Verification]):
    """Results by the name of the component. Prints as a table."""

    def __repr__(self) -> str:
        return "\n".join(f"{name:<16}{result}" for name, result in self.items())


def verify(target: object, *, strict: bool = False) -> Verifications:
    """Runs each distinct fused call of a pipeline or model on 4096 random rows against the unfused
    expression, and compares the bits.

    It runs where the model computes, once a process, and never initialises CUDA. A difference
    warns.

    Args:
        target: a pipeline or a model, patched or not.
        strict: raise instead of warning.

    Returns:
        A dict of results by the name of the component (``"model"`` for a model), which prints as a
        table.

    Raises:
        TypeError: for anything but a pipeline or a ``torch.nn.Module``.
        ValueError: if nothing in it is of a family that is known.
        RuntimeError: under ``strict``, where bits differ.

    Examples:
        >>> ditnorm.verify(transformer)["model"].differing
        ()
    """
    found = targets(modules_of(target), target)
    return Verifications((name, verify_units(model, units, strict=strict)) for name, (model, units) in found.items())


def verify_units(model: nn.Module, units: Iterable[Unit], *, strict: bool = False) -> Verification:
    """Compares each distinct site of the ``units`` that aren't refused, once a process and device.
    Never initialises CUDA.

    A difference warns, or under ``strict`` raises ``RuntimeError``.
    """
    device, dtype = execution_device(model), stream_dtype(model)
    if device.type == "meta":
        return Verification(reason="the weights are on no device")
    if device.type == "cuda" and not torch.cuda.is_initialized():
        return Verification(reason="CUDA is not in use yet")
    if dtype is None:
        return Verification(reason="the model computes in none of float32, float16 and bfloat16")
    sites = tuple(dict.fromkeys(site for unit in units if unit.refusal is None for site in unit.calls(dtype) if site.fused))
    if not sites:
        return Verification(reason="nothing can be fused")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    for site in sites:
        if (site, name) not in _identical:
            _identical[site, name] = _compare_counted(site, device)
    result = Verification(name, sites, tuple(site for site in sites if not _identical[site, name]))
    if strict and result.differing:
        raise RuntimeError(_differs(result))
    unannounced = {(site, name) for site in result.differing} - _warned_of
    if unannounced:
        _warned_of.update(unannounced)
        warnings.warn(_differs(result), RuntimeWarning, stacklevel=4)
    return result


def _differs(result: Verification) -> str:
    return f"ditnorm: the fused ops are not bit-identical here: {result}. Please report it, with what `python -m ditnorm` prints"


def execution_device(model: nn.Module) -> torch.device:
    """Where the model computes: offloading hooks know better than the weights."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        offloading = group_offloading(module)
        if offloading is not None:
            device = getattr(getattr(offloading, "config", None), "onload_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next((p.device for p in model.parameters()), torch.device("meta"))


def stream_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of the model's activations. diffusers' ``dtype`` looks past weights kept in fp32,
    quantised or cast layer by layer.
    """
    dtype = getattr(model, "dtype", None) or next((p.dtype for p in model.parameters()), None)
    return dtype if dtype in FLOATS else None


def _compare_counted(site: FusedCall, device: torch.device) -> bool:
    before = Counter(kernels.counts())
    try:
        with torch.inference_mode():
            return site.same_bits(device)
    finally:
        _own_calls.update(Counter(kernels.counts()) - before)
