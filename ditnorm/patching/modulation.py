"""Moves the linear layers that make modulations to host memory, with a table in their place, and
back.
"""

import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..fused.modulation import ModulatedModel, Modulating
from ..fused.modulation.embedding import RowEmbedding
from ..fused.modulation.modulating import ModulationSequential, Precomputed
from ..fused.modulation.streaming import GROUP_OFFLOADED, send_home, spread, uncounted
from ..fused.modulation.table import ModulationTable
from ..fused.module import unknown_version, upstream_of
from ..models import MODULATED, NOTHING_TO_GAIN
from ..swapping import generated
from ..swapping.fingerprint import fingerprint
from ..swapping.hook_chains import group_offloading, set_class
from . import verification
from .patch import patch_model
from .restoring import restore
from .targets import modules_of, targets
from .units import Unit, untouchable

T = TypeVar("T")

_log = logging.getLogger("ditnorm")


@dataclass(frozen=True)
class Plan:
    """What is to be done in one model."""

    name: str
    model: nn.Module
    facts: ModulatedModel
    units: list[Unit]

    @property
    def embedding(self) -> nn.Module:
        return self.model.get_submodule(self.facts.embedding)


def precompute_modulation(target: T, timesteps: Tensor | None = None) -> T:
    """Moves the weights that turn the timestep into scale, shift and gate to host memory, and puts
    a table of their results in their place.

    They are a third of Qwen-Image and HunyuanVideo-1.5, more than a quarter of HunyuanVideo,
    HunyuanImage and FLUX.1. They stay Parameters of the model; where CUDA is in use their memory is
    pinned. Before the first step of a generation they pass through the device once, a module at a
    time, and make the rows of the whole schedule, with the bits that the model would compute. A
    timestep without a row is made from the weights when it comes. Changed weights and adapters
    empty the table. :func:`ditnorm.report` says how many rows were made, found and missed.

    Args:
        target: a diffusers pipeline, whose scheduler knows the timesteps, or a model. It is patched
            as by :func:`ditnorm.patch_pipeline`. Another call adds a pipeline that shares the
            model, or other timesteps.
        timesteps: 1-D, those that a model without a pipeline will be given.

    Returns:
        ``target``.

    Raises:
        TypeError: for anything but a pipeline or a model, or timesteps that aren't 1-D.
        ValueError: where there is nothing to gain.
        RuntimeError: where it can't be done, with the reason; nothing is changed then.

    Examples:
        >>> with torch.no_grad():
        ...     before = transformer(**inputs).sample
        ...     transformer = ditnorm.precompute_modulation(transformer, inputs["timestep"])
        ...     torch.equal(transformer(**inputs).sample, before)
        True
        >>> transformer = ditnorm.unpatch_model(transformer)
    """
    _check(timesteps)
    models = modules_of(target)
    found = targets(models)
    plans = [plan for name, (model, units) in found.items() for plan in _plans(name, model, units)]
    if not plans:
        raise ValueError("; ".join(dict.fromkeys(_nothing(model, units) for model, units in found.values())))
    obstacles = [f"{plan.name}: {reason}" for plan in plans if (reason := _obstacle(plan)) is not None]
    if obstacles:
        raise RuntimeError("ditnorm: nothing was changed: " + "; ".join(obstacles))
    for model, units in found.values():
        roundings = {unit.rounding for unit in units if unit.rounding is not None}
        if not all(unit.fused for unit in units if unit.refusal is None):
            patch_model(model, rounding=roundings.pop() if len(roundings) == 1 else "eager")
    for plan in plans:
        table = _table_of(plan) or _set_up(plan)
        if timesteps is not None:
            table.known.timesteps = timesteps
        if not isinstance(target, nn.Module):
            table.known.follow(target)
    return target


def _check(timesteps: Any) -> None:
    if timesteps is None:
        return
    expected = "timesteps: expected a 1-D Tensor, as the model is given them one at a time"
    if not isinstance(timesteps, Tensor):
        raise TypeError(f"{expected}, got {type(timesteps).__name__}")
    if timesteps.ndim != 1:
        raise TypeError(f"{expected}, got shape {list(timesteps.shape)}")
    if timesteps.is_meta or timesteps.dtype is torch.bool or timesteps.is_complex():
        raise TypeError(f"{expected}, of numbers, got {timesteps.dtype} on {timesteps.device}")


def restore_modulation(target: T) -> T:
    """Undoes :func:`precompute_modulation`: the weights move to the device where the model is by
    now, and run in every step again. The model stays patched.

    Args:
        target: a pipeline or a model; without effect where nothing was precomputed.

    Returns:
        ``target``.

    Raises:
        TypeError: for anything but a pipeline or a model.

    Examples:
        >>> transformer = ditnorm.precompute_modulation(transformer)
        >>> ditnorm.restore_modulation(transformer) is transformer
        True
        >>> transformer = ditnorm.unpatch_model(transformer)
    """
    restore(modules_of(target))
    return target


def _plans(name: str, model: nn.Module, units: list[Unit]) -> Iterator[Plan]:
    for path, module in model.named_modules():
        upstream = upstream_of(type(module))
        facts = next((facts for facts in MODULATED if upstream.__name__ in facts.names), None)
        if facts is not None:
            inside = [unit for unit in units if f"{unit.name}.".startswith(f"{path}." if path else "")]
            yield Plan(f"{name}.{path}" if path else name, module, facts, inside)


def _nothing(model: nn.Module, units: list[Unit]) -> str:
    name = upstream_of(type(model)).__name__
    if any(unit.module is model for unit in units):
        return f"{name} is a part of a model, and only whole models have a table: pass the model or the pipeline"
    return f"nothing to gain in {name}: {NOTHING_TO_GAIN.get(name, 'ditnorm does not know how its modulations are made')}"


def _obstacle(plan: Plan) -> str | None:
    """Why the embedding of this model can't be replaced by row numbers, or None."""
    upstream: Any = upstream_of(type(plan.model))
    digest = fingerprint(inspect.unwrap(upstream.forward))
    if digest not in plan.facts.forward:
        return unknown_version(upstream, f"forward {digest}")
    by_module = {id(unit.module): unit for unit in plan.units}
    for name, taker in _takers(plan):
        unit = by_module.get(id(taker))
        if unit is None:
            return f"{name} is a {type(taker).__name__}, which ditnorm doesn't know"
        if unit.refusal is not None:
            return f"{name} can't be fused: {unit.refusal}"
    if plan.facts.changed_by is not None and hasattr(plan.model, plan.facts.changed_by):
        return f"it adds what its {plan.facts.changed_by} makes to the embedding of the timestep"
    reason = untouchable(plan.embedding)
    if reason is not None:
        return f"{plan.facts.embedding}: {reason}"
    if plan.embedding._forward_hooks:
        return f"{plan.facts.embedding} has a forward hook, which would be shown row numbers"
    return _weights_obstacle(plan)


def _weights_obstacle(plan: Plan) -> str | None:
    devices = set()
    if (reason := spread(plan.model)) is not None:
        return reason
    if any(group_offloading(module) is not None for module in plan.model.modules()):
        return GROUP_OFFLOADED
    for name, modulation in _modulations(plan.model, plan.units):
        if (reason := uncounted(modulation)) is not None:
            return f"{name}: {reason}"
        devices |= {p.device for p in modulation.parameters() if p.device.type not in ("cpu", "meta")}
    if len(devices) > 1:
        return f"the weights of its modulations are on several devices ({', '.join(map(str, sorted(devices, key=str)))})"
    if verification.stream_dtype(plan.model) is None:
        return "it computes in none of float32, float16 and bfloat16"
    return None


def _takers(plan: Plan) -> Iterator[tuple[str, nn.Module]]:
    for path in plan.facts.takers:
        taker = getattr(plan.model, path, None)
        if isinstance(taker, nn.ModuleList):
            yield from ((f"{path}.{i}", block) for i, block in enumerate(taker))
        elif taker is not None:
            yield path, taker


def _modulations(model: nn.Module, units: list[Unit]) -> Iterator[tuple[str, nn.Module]]:
    """The modules of ``units`` that make modulations, under their names in ``model``."""
    names = {id(module): name for name, module in model.named_modules()}
    for unit in units:
        for swap in unit.swaps:
            found = [swap.module] if issubclass(swap.body, Modulating) else []
            found += [swap.module.get_submodule(path) for path in getattr(swap.body, "modulations", ())]
            yield from ((names[id(module)], module) for module in found)


def _table_of(plan: Plan) -> ModulationTable | None:
    return plan.embedding.__dict__.get("modulations")


@torch.inference_mode(False)  # what is made in inference mode can't be written to outside, nor stand in a Parameter
def _set_up(plan: Plan) -> ModulationTable:
    halves = plan.facts.halved if plan.facts.halved_if and getattr(plan.model, plan.facts.halved_if) else ()
    modules = []
    for name, module in _modulations(plan.model, plan.units):
        if not isinstance(module, Modulating):
            set_class(module, generated.subclass(ModulationSequential, nn.Sequential, "eager"))
        modules.append(Precomputed(name, module, name.endswith(halves) if halves else False))
    for item in modules:
        send_home(item.module)
    embedding = plan.embedding
    embedding.__dict__["modulations"] = table = ModulationTable(plan.model, embedding, modules, verification.stream_dtype, plan.facts)
    upstream: Any = type(embedding)
    set_class(embedding, generated.subclass(RowEmbedding, upstream, "eager"))
    _log.info("%s: %d modulations precomputed, %.2f GB in host memory", plan.name, len(modules), table.host_bytes / 1e9)
    return table
