"""Classes made of a fused body and the upstream class it stands in for.

A generated class has upstream's ``__name__`` (diffusers and accelerate match on it), its origin as a base (``isinstance`` holds) and
its rounding law as a class attribute, so that nothing is stored on instances. Its ``__qualname__`` says how to make it again: pickles
load in a process that has never patched anything.
"""

import functools
import importlib
from typing import Any

from . import block_registry

_SEPARATOR = "__"
_OF = "__of__"


@functools.cache
def subclass(body: type, origin: type, rounding: str) -> type:
    """The class ``origin`` with the methods of ``body`` in front; the same arguments give the same class object."""
    qualname = _encode(body, origin, rounding)
    attributes: dict[str, Any] = {"rounding": rounding, "origin": origin, "__module__": __name__, "__qualname__": qualname}
    generated = type(origin.__name__, (body, origin), attributes)
    globals()[qualname] = generated
    block_registry.register(generated, origin)
    return generated


def origin_of(cls: type) -> type | None:
    """The upstream class that a generated class stands in for; None for any other class."""
    origin: type | None = cls.__dict__.get("origin") if cls.__module__ == __name__ else None
    return origin


def _encode(body: type, origin: type, rounding: str) -> str:
    ours, theirs = (_SEPARATOR.join([*c.__module__.split("."), c.__qualname__]) for c in (body, origin))
    return f"{rounding}{_SEPARATOR}{ours}{_OF}{theirs}"


def _decode(qualname: str) -> type:
    rounding, rest = qualname.split(_SEPARATOR, 1)
    ours, theirs = rest.split(_OF)
    return subclass(_import(ours), _import(theirs), rounding)


def _import(encoded: str) -> Any:
    *module, name = encoded.split(_SEPARATOR)
    return getattr(importlib.import_module(".".join(module)), name)


def __getattr__(name: str) -> type:
    if _OF not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _decode(name)
