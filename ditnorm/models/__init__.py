"""The model families. Every module or folder here that defines :class:`FusedUnit` subclasses takes
part; nothing else needs to know of it.
"""

import importlib
import pkgutil

from ..fused import adaln
from ..fused.block import FusedBlock, FusedUnit
from ..fused.modulation import ModulatedModel

_MODULES = [adaln, *(importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))]

for _module in _MODULES:
    for _value in vars(_module).values():
        if isinstance(_value, type) and _value.__module__.startswith(f"{_module.__name__}."):
            _value.__module__ = _module.__name__  # pickles name a class by its family, whichever file of a folder defines it


def _bodies() -> tuple[type[FusedUnit], ...]:
    return tuple(
        body
        for module in _MODULES
        for body in vars(module).values()
        if isinstance(body, type) and issubclass(body, FusedUnit) and body.__module__ == module.__name__
    )


BODIES = _bodies()
"""All bodies of units."""

MODULATED: tuple[ModulatedModel, ...] = tuple(facts for module in _MODULES for facts in getattr(module, "MODULATED", ()))
"""The models whose modulations can be precomputed."""

NOTHING_TO_GAIN: dict[str, str] = {name: why for module in _MODULES for name, why in getattr(module, "NOTHING_TO_GAIN", {}).items()}
"""The other models -> why theirs aren't, for users."""


def body_for(upstream: type) -> type[FusedUnit] | None:
    """The body that computes what instances of ``upstream`` do, going by fingerprints, or None."""
    return next((body for body in BODIES if body.knows(upstream)), None)


def near_miss(upstream: type) -> type[FusedUnit] | None:
    """For a class without a body, the body that was written for another version of it or for what
    it derives from, going by name.
    """
    names = {cls.__name__ for cls in upstream.__mro__}
    return next((body for body in BODIES if not names.isdisjoint(body.names)), None)


def families() -> list[str]:
    """The supported model families."""
    return sorted({body.family for body in BODIES if issubclass(body, FusedBlock)})
