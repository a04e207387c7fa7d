"""The model families. Every module here that defines :class:`FusedBlock` subclasses takes part; nothing else needs to know of it."""

import importlib
import pkgutil

from ..fused import adaln
from ..fused.attention import FusedAttention
from ..fused.module import FusedBlock, matches


def _bodies() -> tuple[type[FusedBlock], ...]:
    modules = [adaln, *(importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))]
    return tuple(
        body
        for module in modules
        for body in vars(module).values()
        if isinstance(body, type) and issubclass(body, FusedBlock) and body is not FusedBlock and body.__module__ == module.__name__
        if not issubclass(body, FusedAttention)  # a site of blocks: what it computes is settled by its processor
    )


BODIES = _bodies()
"""All fused bodies."""


def body_for(upstream: type) -> type[FusedBlock] | None:
    """The body that computes what instances of ``upstream`` do, going by fingerprints, or None."""
    return next((body for body in BODIES if matches(body, upstream)), None)


def near_miss(upstream: type) -> type[FusedBlock] | None:
    """For a class without a body, the body that was written for another version of it, going by its name."""
    return next((body for body in BODIES if upstream.__name__ in body.names), None)


def families() -> list[str]:
    """The supported model families."""
    return sorted({body.family for body in BODIES if body.block})
