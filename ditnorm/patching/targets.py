"""From what users pass, pipelines and models, to the models that can be fused."""

from collections.abc import Mapping

from torch import nn

from ..models import families
from .units import Unit, find_units

Targets = dict[str, tuple[nn.Module, list[Unit]]]
"""Models with their units, by the name of the component."""


def components(pipe: object) -> dict[str, nn.Module]:
    """The distinct modules of a pipeline by component name. ``TypeError`` for anything but a
    pipeline.
    """
    held = getattr(pipe, "components", None)
    if isinstance(pipe, nn.Module) or not isinstance(held, Mapping):
        raise TypeError(f"expected a diffusers pipeline, got {_described(pipe)}{_hint(pipe)}")
    modules = {name: unwrap(module) for name, module in held.items() if isinstance(module, nn.Module)}
    return {name: module for name, module in modules.items() if next(n for n, m in modules.items() if m is module) == name}


def targets(models: Mapping[str, nn.Module], target: object = None) -> Targets:
    """The models that hold a block with a fused body, or what looks like one, with their units.

    ``ValueError`` if there is none; it names what is missing in ``target``, the pipeline that the
    models are from.
    """
    found = {name: (model, find_units(model)) for name, model in models.items()}
    found = {name: (model, units) for name, (model, units) in found.items() if any(unit.is_block for unit in units)}
    if not found:
        looked_at = ", ".join(type(model).__name__ for model in models.values()) or f"a {type(target).__name__} without modules"
        absent = " (its transformer is None)" if hasattr(target, "transformer") and target.transformer is None else ""
        raise ValueError(f"nothing to fuse in {looked_at}{absent}; supported families: {', '.join(families())}")
    return found


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile`` returned, or ``model``."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def single(model: object) -> dict[str, nn.Module]:
    """A model under the name that it has in reports. ``TypeError`` for anything else."""
    if not isinstance(model, nn.Module):
        hint = " (use patch_pipeline and its like)" if hasattr(model, "components") and not isinstance(model, type) else _hint(model)
        raise TypeError(f"expected a torch.nn.Module, got {_described(model)}{hint}")
    return {"model": unwrap(model)}


def _described(target: object) -> str:
    if isinstance(target, type):
        return f"the class {target.__name__}"
    return repr(target) if target is None or isinstance(target, str) else type(target).__name__


def _hint(target: object) -> str:
    """What a user may have meant."""
    if isinstance(target, nn.Module):
        return " (use patch_model and its like)"
    if isinstance(target, str):
        return " (load it first: diffusers.DiffusionPipeline.from_pretrained)"
    if isinstance(target, type):
        return " (make an instance first: from_pretrained)"
    return ""


def modules_of(target: object) -> dict[str, nn.Module]:
    """The modules of a model or of a pipeline. ``TypeError`` for anything else."""
    if isinstance(target, nn.Module):
        return single(target)
    if isinstance(target, type) or not isinstance(getattr(target, "components", None), Mapping):
        raise TypeError(f"expected a diffusers pipeline or a torch.nn.Module, got {_described(target)}{_hint(target)}")
    return components(target)


def number_of(n: int, thing: str) -> str:
    """``n`` things in words: "1 block", "2 blocks"."""
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def listed(names: list[str]) -> str:
    """``names`` in words, at most three of them. The empty name is that of the model itself."""
    names = [name or "the model itself" for name in names]
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"
