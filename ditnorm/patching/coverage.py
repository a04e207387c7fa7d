"""Which models of the installed diffusers patching fuses, from their classes alone: no model is
built.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from torch import nn

from ..fused.attention import FusedAttention
from ..fused.block import FusedBlock
from ..fused.module import FusedModule
from ..models import body_for, near_miss
from ..swapping.originals import full_name

_PACKAGES = ("diffusers.models.transformers", "diffusers.models.controlnets")


@dataclass(frozen=True)
class Coverage:
    """What :func:`coverage` found."""

    fused: dict[str, list[str]]
    """Family -> the classes of its models."""
    unknown: list[str]
    """What looks like a part of a family and isn't a version that ditnorm knows: patching leaves it
    as it is.
    """
    others: list[str]
    """The models that no family is for."""


def coverage() -> Coverage:
    """Goes through the transformers and ControlNets of the installed diffusers. ``ImportError``
    where diffusers can't be imported.
    """
    fused: dict[str, list[str]] = {}
    unknown: list[str] = []
    others: list[str] = []
    for module in _modules():
        models = [cls.__name__ for cls in _classes(module) if cls.__module__ == module.__name__ and issubclass(cls, _model_class())]
        bodies = {cls: body for cls in _classes(module) if (body := body_for(cls)) is not None and issubclass(body, FusedBlock)}
        for family in dict.fromkeys(body.family for body in bodies.values()):
            fused.setdefault(family, []).extend(models)
        others += [] if bodies else models
        for cls in _classes(module):
            if cls in bodies:
                unknown += _unknown_parts(cls, bodies[cls])
            elif body_for(cls) is None and (meant := near_miss(cls)) is not None and (reason := meant.unknown(cls)) is not None:
                unknown.append(reason)
    return Coverage({family: sorted(set(models)) for family, models in sorted(fused.items())}, sorted(set(unknown)), sorted(set(others)))


def _model_class() -> type:
    """The base in diffusers of what has a checkpoint of its own."""
    cls: type = importlib.import_module("diffusers").ModelMixin
    return cls


def _modules() -> Iterator[ModuleType]:
    for package in map(importlib.import_module, _PACKAGES):
        for found in pkgutil.iter_modules(package.__path__):
            try:
                yield importlib.import_module(f"{package.__name__}.{found.name}")
            except ImportError:  # of a package that this model alone needs
                continue


def _classes(module: ModuleType) -> list[type]:
    """The modules of torch that a module defines or imports."""
    return [cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, nn.Module)]


def _unknown_parts(block: type, body: type[FusedModule]) -> Iterator[str]:
    """The parts of a block that none of the classes that its module can make them of is known
    for.
    """
    classes = _classes(importlib.import_module(block.__module__))
    for path, part in body.sites.items():
        if issubclass(part, FusedModule) and not any(_knows(part, cls) for cls in classes):
            yield f"{full_name(block)}: its {path} is not a version that ditnorm knows"


def _knows(part: type[FusedModule], cls: type) -> bool:
    return part.knows(cls) and not (issubclass(part, FusedAttention) and not part.known_processors(cls))
