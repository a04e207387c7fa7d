"""Finds what can be fused in a model: units, each swapped as a whole or refused as a whole with a reason. Changes nothing."""

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from .. import layers
from ..fused.attention import FusedAttention, QKNorm
from ..fused.gelu import FusedGELU
from ..fused.module import FusedBlock, matches
from ..models import body_for, near_miss
from ..swapping import generated
from ..swapping.fingerprint import fingerprint
from ..swapping.hook_chains import Untraceable, captured

# Wrappers that shard or replicate the parameters of the modules inside (DDP, FSDP).
_PARALLEL = ("torch.nn.parallel.", "torch.distributed.")

_KINDS = {
    "torch.nn.modules.normalization.LayerNorm": "layer",
    "torch.nn.modules.normalization.RMSNorm": "rms",
    "torch.nn.modules.linear.Identity": "identity",
    "diffusers.models.normalization.FP32LayerNorm": "layer",
}
_LAYERS: dict[tuple[type, str], type] = {
    (layers.LayerNormScaleShift, "layer"): layers.LayerNormScaleShift,
    (layers.RMSNormScaleShift, "rms"): layers.RMSNormScaleShift,
    (layers.ScaleResidualNormScaleShift, "layer"): layers.ScaleResidualLayerNormScaleShift,
    (layers.ScaleResidualNormScaleShift, "rms"): layers.ScaleResidualRMSNormScaleShift,
    (layers.ScaleResidualNormScaleShift, "identity"): layers.ScaleResidualIdentity,
}


@dataclass(frozen=True)
class Swap:
    """One module of a unit, the upstream class that it has or had, and the body that goes in front of it."""

    name: str
    module: nn.Module
    upstream: type
    body: type
    table: nn.Parameter | None = None
    """What is added to the modulation of this layer in fp32."""
    modulated: bool = True


@dataclass
class Unit:
    """A fusable module with the modules that are fused inside it."""

    name: str
    module: nn.Module
    body: type[FusedBlock]
    swaps: list[Swap] = field(default_factory=list)
    refusal: str | None = None
    unfused: dict[str, str] = field(default_factory=dict)
    """Attention modules that stay upstream's -> why. That doesn't refuse the block."""

    @property
    def fused(self) -> bool:
        return generated.origin_of(type(self.module)) is not None or _made_from_ours(type(self.module))

    @property
    def rounding(self) -> str | None:
        return self.module.rounding if self.fused else None  # type: ignore[return-value]

    @property
    def upstream(self) -> type:
        return upstream_of(type(self.module))


def find_units(model: nn.Module) -> list[Unit]:
    """The topmost modules of ``model`` with a fused body, or that look as if they had one, in the model's order."""
    units = list(_walk("", model, None, None, set()))
    blocks = any(unit.body.block and unit.refusal is None for unit in units)
    return [unit for unit in units if blocks or not unit.body.holders]


def upstream_of(cls: type) -> type:
    """The upstream class that ``cls`` is or was made from by this package."""
    origins = (generated.origin_of(base) for base in cls.__mro__)
    return next((origin for origin in origins if origin is not None), cls)


def _made_from_ours(cls: type) -> bool:
    return upstream_of(cls) is not cls


def _walk(name: str, module: nn.Module, holder: nn.Module | None, wrapper: str | None, seen: set[int]) -> Iterator[Unit]:
    if id(module) in seen:
        return
    seen.add(id(module))
    unit = _unit(name, module, holder, wrapper)
    if unit is not None:
        yield unit
        return
    if type(module).__module__.startswith(_PARALLEL):
        wrapper = type(module).__name__
    for child_name, child in module.named_children():
        yield from _walk(_join(name, child_name), child, module, wrapper, seen)


def _join(name: str, child: str) -> str:
    # torch.compile's OptimizedModule holds the module itself under _orig_mod.
    return name if child == "_orig_mod" else f"{name}.{child}".removeprefix(".")


def _unit(name: str, module: nn.Module, holder: nn.Module | None, wrapper: str | None) -> Unit | None:
    upstream = upstream_of(type(module))
    body = body_for(upstream)
    if body is None:
        body = near_miss(upstream)
        return None if body is None else Unit(name, module, body, refusal=_unknown(upstream, body))
    unit = Unit(name, module, body)
    unit.refusal = f"it is inside {wrapper}" if wrapper else _refusal(unit)
    if body.holders and (unit.refusal is not None or not _suits(body, holder)):
        return None  # no op of ours is missing there, and nobody is told
    if unit.refusal is None:
        unit.swaps += _gelus(unit)
    return unit


def _suits(body: type[FusedBlock], holder: nn.Module | None) -> bool:
    """Whether the model and its blocks are known to take what ``body`` returns."""
    if holder is None:
        return False
    forward = inspect.unwrap(upstream_of(type(holder)).forward)  # type: ignore[attr-defined]
    blocks = [block for child in holder.children() if isinstance(child, nn.ModuleList) for block in child]
    return fingerprint(forward) in body.holders and all(body_for(upstream_of(type(block))) is not None for block in blocks)


def _unknown(upstream: type, body: type[FusedBlock]) -> str:
    found = ", ".join(f"{name} {fingerprint(getattr(upstream, name))}" for name in body.fingerprints if hasattr(upstream, name))
    return f"{upstream.__module__}.{upstream.__qualname__} is not a version that ditnorm knows (fingerprint: {found})"


def _refusal(unit: Unit) -> str | None:
    reason = _collect(unit, unit.name, unit.module, unit.body)
    if reason is not None:
        return reason
    for swap in unit.swaps:
        inside = f"{swap.name.removeprefix(unit.name).removeprefix('.')}: " if swap.module is not unit.module else ""
        try:
            captured(swap.module)
        except Untraceable as untraceable:
            return f"{inside}{untraceable}"
    return None


def _collect(unit: Unit, name: str, module: nn.Module, body: type[FusedBlock]) -> str | None:
    """Adds ``module`` and its sites to the swaps of ``unit``; returns why that can't be done, or None."""
    upstream = upstream_of(type(module))
    reason = generated_by_others(type(module)) or body.unsupported(module)
    if reason is not None:
        return reason
    unit.swaps.append(Swap(name, module, upstream, body))
    table = getattr(module, body.table) if body.table is not None else None
    for path, expected in body.sites.items():
        child = module.get_submodule(path)
        if issubclass(expected, FusedAttention):
            _collect_attention(unit, _join(name, path), child, expected)
            continue
        reason = _collect_site(unit, _join(name, path), child, expected, table, path not in body.unmodulated)
        if reason is not None:
            return f"{path}: {reason}"
    return None


def _collect_attention(unit: Unit, name: str, child: nn.Module, body: type[FusedAttention]) -> None:
    """Adds an attention module and its norms to the swaps of ``unit``, or the reason why not to what stays unfused."""
    upstream = upstream_of(type(child))
    reason = generated_by_others(type(child)) or (None if matches(body, upstream) else _unknown(upstream, body)) or body.unsupported(child)
    if reason is None:
        swaps = [Swap(name, child, upstream, body)]
        norms = {norm: child.get_submodule(norm) for norm in body.norms(child)}
        swaps += [Swap(_join(name, norm), module, upstream_of(type(module)), QKNorm) for norm, module in norms.items()]
        reason = next(filter(None, (_untouchable(swap.module) for swap in swaps)), None)
    if reason is None:
        unit.swaps += swaps
    else:
        unit.unfused[name] = reason


def _untouchable(module: nn.Module) -> str | None:
    try:
        captured(module)
    except Untraceable as untraceable:
        return str(untraceable)
    return generated_by_others(type(module))


def _gelus(unit: Unit) -> list[Swap]:
    """The activations inside that are known. What isn't is left alone and nobody is told: no op of ours is missing there."""
    found = [(path, module, upstream_of(type(module))) for path, module in unit.module.named_modules()]
    return [
        Swap(_join(unit.name, path), module, upstream, FusedGELU)
        for path, module, upstream in found
        if matches(FusedGELU, upstream) and _untouchable(module) is None
    ]


def _collect_site(unit: Unit, name: str, child: nn.Module, expected: type, table: nn.Parameter | None, modulated: bool) -> str | None:
    upstream = upstream_of(type(child))
    if issubclass(expected, FusedBlock):
        if body_for(upstream) is not expected:
            return _unknown(upstream, expected)
        return _collect(unit, name, child, expected)
    reason = generated_by_others(type(child))
    if reason is not None:
        return reason
    dotted = f"{upstream.__module__}.{upstream.__qualname__}"
    layer = _LAYERS.get((expected, _KINDS.get(dotted, "")))
    if layer is None:
        return f"no fused layer stands in for {dotted}"
    unit.swaps.append(Swap(name, child, upstream, layer, table, modulated))
    return None


def generated_by_others(cls: type) -> str | None:
    """A reason, where ``cls`` is neither ours nor found under its own name (FSDP2, parametrize and the like make such classes)."""
    if generated.origin_of(cls) is not None:
        return None
    found: object = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return None if found is cls else f"its class {cls.__name__} was generated by {cls.__module__}"
