"""Patches models in place and undoes it: ``module.__class__`` is swapped, nothing is stored on
modules.
"""

import gc
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .. import kernels
from ..fused.module import upstream_of
from ..ops import expect
from ..ops.options import ROUNDINGS
from ..swapping import generated
from ..swapping.hook_chains import set_class, untraceable
from . import verification
from .restoring import restore
from .targets import Targets, components, listed, single, targets
from .units import Unit, generated_by_others

P = TypeVar("P")
M = TypeVar("M", bound=nn.Module)

_log = logging.getLogger("ditnorm")

calls_before: WeakKeyDictionary[nn.Module, Counter[tuple[str, str]]] = WeakKeyDictionary()
"""The process-wide counters when a model was first patched."""


def patch_pipeline(pipe: P, *, strict: bool = False, rounding: str = "eager") -> P:
    """Fuses what can be fused in every transformer and ControlNet of a diffusers pipeline, in
    place.

    What can't be fused stays as it is, with one warning for each reason; :func:`ditnorm.report`
    lists it. Where CUDA is in use by now, the fused calls are verified on this GPU. Patching again
    changes the rounding, or completes the work.

    Args:
        pipe: a diffusers pipeline.
        strict: raise instead of warning, and change nothing then.
        rounding: ``"eager"`` keeps the pipeline's pictures bit for bit; ``"single"`` rounds once,
            which is more accurate and a little faster.

    Returns:
        ``pipe``.

    Raises:
        TypeError: for anything but a pipeline.
        ValueError: if no component is of a family that is known, or for another rounding.
        RuntimeError: under ``strict``, where something can't be fused, or has other bits on this
            GPU.

    Examples:
        >>> pipe = diffusers.FluxPipeline(scheduler, vae, None, None, None, None, transformer)
        >>> ditnorm.patch_pipeline(pipe) is pipe
        True
        >>> isinstance(transformer, diffusers.FluxTransformer2DModel)
        True
        >>> ditnorm.report(pipe).transformers[0].fused
        4
        >>> pipe = ditnorm.unpatch_pipeline(pipe)
    """
    _patch(components(pipe), strict, rounding, pipe)
    return pipe


def patch_model(model: M, *, strict: bool = False, rounding: str = "eager") -> M:
    """Fuses what can be fused in one transformer or ControlNet, in place, as :func:`patch_pipeline`
    does.

    Args:
        model: a model of diffusers, a module around one, or a block.
        strict: raise instead of warning, and change nothing then.
        rounding: ``"eager"`` or ``"single"``.

    Returns:
        ``model``.

    Raises:
        TypeError: for anything but a ``torch.nn.Module``.
        ValueError: if nothing in it is of a family that is known, or for another rounding.
        RuntimeError: under ``strict``, where something can't be fused, or has other bits on this
            GPU.

    Examples:
        >>> before = transformer(**inputs).sample
        >>> after = ditnorm.patch_model(transformer)(**inputs).sample
        >>> torch.equal(before, after)
        True
        >>> transformer = ditnorm.unpatch_model(transformer)
    """
    _patch(single(model), strict, rounding)
    return model


def unpatch_pipeline(pipe: P) -> P:
    """Undoes :func:`patch_pipeline`, also on copies and on unpickled pipelines; without effect on
    one that isn't patched.

    Precomputed modulations are restored, too. A module that a fused module of another model holds
    as well stays fused, with a warning, until that is unpatched.

    Args:
        pipe: a diffusers pipeline.

    Returns:
        ``pipe``.

    Raises:
        TypeError: for anything but a pipeline.
        RuntimeError: where a module was wrapped or its class was derived since (by FSDP2,
            parametrize, another patcher); nothing is changed then.

    Examples:
        >>> pipe = diffusers.FluxPipeline(scheduler, vae, None, None, None, None, transformer)
        >>> type(ditnorm.unpatch_pipeline(ditnorm.patch_pipeline(pipe)).transformer)
        <class 'diffusers.models.transformers.transformer_flux.FluxTransformer2DModel'>
    """
    _unpatch(components(pipe))
    return pipe


def unpatch_model(model: M) -> M:
    """Undoes :func:`patch_model`, as :func:`unpatch_pipeline` does.

    Args:
        model: a model, a module around one, or a block.

    Returns:
        ``model``.

    Raises:
        TypeError: for anything but a ``torch.nn.Module``.
        RuntimeError: as :func:`unpatch_pipeline`.

    Examples:
        >>> block = transformer.transformer_blocks[0]
        >>> ditnorm.unpatch_model(ditnorm.patch_model(transformer)) is transformer
        True
        >>> type(block) is diffusers.models.transformers.transformer_flux.FluxTransformerBlock
        True
    """
    _unpatch(single(model))
    return model


def _patch(models: Mapping[str, nn.Module], strict: bool, rounding: str, pipe: object = None) -> None:
    expect.option("rounding", rounding, ROUNDINGS)
    _complete(models)
    found = targets(models, pipe)
    refused = _refusals(found)
    if strict and (demanded := _refusals(found, demanded=True)):
        raise RuntimeError("ditnorm: nothing was patched: " + "; ".join(demanded))
    if torch.cuda.is_initialized():
        _look_at_cuda(found, strict, rounding)
    for message in refused:
        warnings.warn(f"ditnorm: {message}", UserWarning, stacklevel=3)
    for model, units in found.values():
        if model not in calls_before or not any(unit.fused for unit in units):
            calls_before[model] = verification.calls()
    _swap(models, found, rounding)
    _log.info("patched, rounding=%r: %s", rounding, "; ".join(_summary(name, *target) for name, target in found.items()))


def _look_at_cuda(found: Targets, strict: bool, rounding: str) -> None:
    if kernels.unavailable is not None:
        warnings.warn(f"ditnorm: CUDA tensors will take the slower PyTorch path: {kernels.unavailable}", RuntimeWarning, stacklevel=4)
    for model, units in found.values():
        if rounding == "eager" and verification.execution_device(model).type == "cuda":
            verification.verify_units(model, units, strict=strict)


def _swap(models: Mapping[str, nn.Module], found: Targets, rounding: str) -> None:
    """All classes are made before any module changes, and modules change after those inside them.

    So wherever this ends early, fused modules have fused parts, and parts that are fused already
    are called as upstream calls them, which gives upstream's values: the model runs, with the bits
    that it had.
    """
    swaps = [swap for _, units in found.values() for unit in units if unit.refusal is None for swap in unit.swaps]
    classes = {id(swap.module): generated.subclass(swap.body, swap.upstream, rounding) for swap in swaps}
    for module in _inner_first(models):
        if id(module) in classes:
            set_class(module, classes[id(module)])


def _inner_first(models: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Each module once, after all that it holds, also where several hold it."""
    ordered: dict[nn.Module, None] = {}

    def add(module: nn.Module) -> None:
        if module not in seen:
            seen.add(module)
            for child in module.children():
                add(child)
            ordered[module] = None

    seen: set[nn.Module] = set()
    for model in models.values():
        add(model)
    return list(ordered)


def _complete(models: Mapping[str, nn.Module]) -> None:
    """Finishes what was interrupted between a module's class and its hooks, which then still call
    the forward of its upstream class.
    """
    for module in _inner_first(models):
        if _is_stale(module):
            set_class(module, type(module))


def _is_stale(module: nn.Module) -> bool:
    if generated.origin_of(type(module)) is None or untraceable(module, of_origin=True) is not None:
        return False
    return untraceable(module) is not None


def _refusals(found: Targets, demanded: bool = False) -> list[str]:
    """One line for each reason; of all that isn't fused, or of what is ``demanded`` to be."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for name, (_, units) in found.items():
        for unit in units:
            if unit.refusal is not None:
                by_reason.setdefault((name, unit.refusal), []).append(unit.name)
                continue
            for part in unit.missing():
                if part.demanded or not demanded:
                    by_reason.setdefault((name, part.reason), []).append(part.name)
    return [f"{name}: {listed(units)} not fused: {reason}" for (name, reason), units in by_reason.items()]


def _summary(name: str, model: nn.Module, units: Iterable[Unit]) -> str:
    blocks = [unit for unit in units if unit.is_block]
    return f"{name} ({type(model).__name__}) {sum(unit.fused for unit in blocks)} of {len(blocks)} blocks"


def _unpatch(models: Mapping[str, nn.Module]) -> None:
    ours = {m: name for model in models.values() for name, m in model.named_modules() if upstream_of(type(m)) is not type(m)}
    obstacles = [f"{name}: {reason}" for module, name in ours.items() if (reason := _obstacle(module)) is not None]
    if obstacles:
        raise RuntimeError("ditnorm: nothing was unpatched: " + "; ".join(obstacles))
    restore(models)
    needed = _parts_of_others(ours)
    if needed:
        others = ", ".join(sorted({type(other).__name__ for other in needed.values()}))
        kept = listed([ours[part] for part in needed])
        warnings.warn(f"ditnorm: {kept} not unpatched: a part of another fused module ({others}); unpatch that", UserWarning, stacklevel=3)
    for module in reversed(_inner_first(models)):
        if module in ours and module not in needed:
            set_class(module, upstream_of(type(module)))
    for model in models.values():
        calls_before.pop(model, None)
    unpatched = len(ours) - len(needed)
    _log.info("unpatched %d modules of %s", unpatched, ", ".join(f"{name} ({type(model).__name__})" for name, model in models.items()))


def _parts_of_others(ours: Mapping[nn.Module, str]) -> dict[nn.Module, nn.Module]:
    """Modules of ``ours`` that are also parts of fused modules elsewhere -> one of those modules,
    which calls them with arguments that upstream's class doesn't take.
    """
    held = _held_by_others(ours)
    if held:  # perhaps by modules that nobody uses any more
        del held
        gc.collect()
        held = _held_by_others(ours)
    return held


def _held_by_others(ours: Mapping[nn.Module, str]) -> dict[nn.Module, nn.Module]:
    """A module doesn't know what holds it, so this looks at all modules of the process."""
    if not ours:
        return {}
    # A copy that failed halfway has modules without a state, which its traceback keeps alive.
    others = [o for o in generated.instances() if o not in ours and "_modules" in vars(o)]
    return {part: other for other in others for part in other.modules() if part in ours}


def _obstacle(module: nn.Module) -> str | None:
    """Why ``module``, whose class is or derives from ours, can't get its upstream class back."""
    return generated_by_others(type(module)) or untraceable(module, of_origin=True)
