"""Finds what can be fused in a model: units, each swapped as a whole or refused as a whole with a
reason. Changes nothing.
"""

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..fused.activation_sites import Activation
from ..fused.block import FusedBlock, FusedUnit
from ..fused.module import FusedModule, upstream_of
from ..fused.sites import FusedCall
from ..models import body_for, near_miss
from ..swapping import generated
from ..swapping.fingerprint import fingerprint
from ..swapping.hook_chains import untraceable

# Wrappers that shard or replicate the parameters of the modules inside (DDP, FSDP).
_PARALLEL = ("torch.nn.parallel.", "torch.distributed.")


@dataclass(frozen=True)
class Swap:
    """One module of a unit, the upstream class that it has or had, and the body or layer that goes
    in front of it.
    """

    name: str
    module: nn.Module
    upstream: type
    body: type

    @property
    def unfused_by_hooks(self) -> bool:
        """Whether it runs unfused where a hook watches it: that of a norm is shown the norm's own
        output.
        """
        return self.body.unfused_by_hooks if issubclass(self.body, FusedModule) else True

    def calls(self, dtype: torch.dtype) -> Iterator[FusedCall]:
        """Its fused calls on a stream of ``dtype``. Those of a norm belong to the body that calls
        it.
        """
        if issubclass(self.body, FusedModule):
            yield from self.body.calls(self.module, dtype)
        yield from (site for activation in self.activations() if (site := activation.site(dtype)) is not None)

    def activations(self) -> Iterator[Activation]:
        """Its activations, under their names in the model."""
        if issubclass(self.body, FusedModule):
            for activation in self.body.activations(self.module):
                yield replace(activation, path=_join(self.name, activation.path))


@dataclass(frozen=True)
class Unfused:
    """An optional part that stays upstream's: its name, what of it is unfused, and why."""

    name: str
    what: str
    reason: str
    demanded: bool
    """Whether ``strict`` patching fails for it."""
    announced: bool = True
    """Whether patching warns of it."""


@dataclass
class Unit:
    """A fusable module with the modules that are fused inside it."""

    name: str
    module: nn.Module
    body: type[FusedUnit]
    swaps: list[Swap] = field(default_factory=list)
    refusal: str | None = None
    unfused: list[Unfused] = field(default_factory=list)
    """Optional parts that stay upstream's. That doesn't refuse the unit."""

    @property
    def is_block(self) -> bool:
        return issubclass(self.body, FusedBlock)

    @property
    def fused(self) -> bool:
        return self.upstream is not type(self.module)

    @property
    def rounding(self) -> str | None:
        return self.module.rounding if self.fused else None  # type: ignore[return-value]

    @property
    def upstream(self) -> type:
        return upstream_of(type(self.module))

    def calls(self, dtype: torch.dtype) -> Iterator[FusedCall]:
        """All fused calls of one forward on a stream of ``dtype``."""
        return (call for swap in self.swaps for call in swap.calls(dtype))

    def activations(self) -> list[Activation]:
        """The activations between its linear layers, as they are called now."""
        found = {activation.path: activation for swap in self.swaps for activation in swap.activations()}
        return list(found.values())  # of two that describe one activation the later, a feed-forward layer, knows more

    @property
    def upstreams(self) -> set[str]:
        """What its bodies leave to upstream."""
        return {what for swap in self.swaps for what in getattr(swap.body, "upstreams", {})}

    def missing(self) -> Iterator[Unfused]:
        """What patching warns of: it stays upstream's, and an op of ours is missing there."""
        yield from (part for part in self.unfused if part.announced)
        for activation in self.activations():
            if activation.announced:
                yield Unfused(activation.path, "activation", str(activation.reason), demanded=True)


class _Refused(Exception):
    """Why a module can't be swapped, and its path inside the unit."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def within(self, path: str) -> str:
        """The reason as told of the module at ``path``."""
        inside = self.path.removeprefix(path).removeprefix(".")
        return f"{inside}: {self.reason}" if inside else self.reason


def find_units(model: nn.Module) -> list[Unit]:
    """The topmost modules of ``model`` with a fused body, or that look as if they had one, in the
    model's order.
    """
    units = list(_walk("", model, None, None, set()))
    _refuse_shared(units)
    blocks = any(unit.is_block and unit.refusal is None for unit in units)
    return [unit for unit in units if blocks or not unit.body.holders]


def _refuse_shared(units: list[Unit]) -> None:
    """Refuses units one of whose modules would have to be of two classes: a norm at two different
    sites.
    """
    bodies: dict[nn.Module, dict[type, str]] = {}
    for unit in units:
        for swap in unit.swaps:
            bodies.setdefault(swap.module, {}).setdefault(swap.body, swap.name)
    for unit in units:
        shared = next((swap.module for swap in unit.swaps if len(bodies[swap.module]) > 1), None)
        if shared is not None:
            unit.refusal = f"{' and '.join(bodies[shared].values())} are one module"
            unit.swaps = []


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
    return name if child == "_orig_mod" else f"{name}.{child}".strip(".")


def _unit(name: str, module: nn.Module, holder: nn.Module | None, wrapper: str | None) -> Unit | None:
    upstream = upstream_of(type(module))
    body = body_for(upstream)
    if body is None:
        body = near_miss(upstream)
        return None if body is None else Unit(name, module, body, refusal=body.unknown(upstream))
    unit = Unit(name, module, body)
    try:
        if wrapper is not None:
            raise _Refused("", f"it is inside {wrapper}")
        unit.swaps = list(_swaps(unit, "", module, body))
    except _Refused as refused:
        unit.refusal = refused.within("")
    if body.holders and (unit.refusal is not None or not _suits(body, holder)):
        return None  # no op of ours is missing there, and nobody is told
    return unit


def _suits(body: type[FusedUnit], holder: nn.Module | None) -> bool:
    """Whether the model and its blocks are known to take what ``body`` returns."""
    if holder is None:
        return False
    forward = inspect.unwrap(upstream_of(type(holder)).forward)  # type: ignore[attr-defined]
    blocks = [block for child in holder.children() if isinstance(child, nn.ModuleList) for block in child]
    return fingerprint(forward) in body.holders and all(body_for(upstream_of(type(block))) is not None for block in blocks)


def _swaps(unit: Unit, path: str, module: nn.Module, body: type) -> Iterator[Swap]:
    """``module`` and its parts. What can't be swapped raises ``_Refused``, or is noted in the unit
    where it is optional.
    """
    upstream = upstream_of(type(module))
    reason = untouchable(module)
    if reason is None and issubclass(body, FusedModule):
        reason = body.unsupported(module) if body.knows(upstream) else body.unknown(upstream)
        inlined = next((name for name in body.fingerprints if name in vars(module) and name != "forward"), None)
        reason = reason or (None if inlined is None else f"its {inlined} was replaced")
    if reason is not None:
        raise _Refused(path, reason)
    yield Swap(_join(unit.name, path), module, upstream, body)
    for what, why in getattr(body, "upstreams", {}).items():
        unit.unfused.append(Unfused(_join(unit.name, path), what, why, demanded=False, announced=False))
    for part in body.parts(module) if issubclass(body, FusedModule) else ():
        inside = _join(path, part.path)
        if part.body is None:
            raise _Refused(inside, untouchable(part.module) or str(part.reason))
        if not (issubclass(part.body, FusedModule) and part.body.optional):
            yield from _swaps(unit, inside, part.module, part.body)
            continue
        try:
            yield from list(_swaps(unit, inside, part.module, part.body))
        except _Refused as refused:
            if part.body.reported_as is not None:
                how = part.body.reported_as, refused.within(inside), part.body.demanded, part.body.announced
                unit.unfused.append(Unfused(_join(unit.name, inside), *how))


def untouchable(module: nn.Module) -> str | None:
    """Why the class of ``module`` can't be changed, whatever it is."""
    return untraceable(module) or generated_by_others(type(module))


def generated_by_others(cls: type) -> str | None:
    """A reason, where ``cls`` is neither ours nor found under its own name (FSDP2, parametrize and
    the like make such classes).
    """
    if generated.origin_of(cls) is not None:
        return None
    found: object = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return None if found is cls else f"its class {cls.__name__} was generated by {cls.__module__}"
