"""Classes made of a fused body and the upstream class it stands in for.

A generated class has upstream's ``__name__`` (diffusers, accelerate and caches match on it), its
origin as a base (``isinstance`` holds) and its rounding law as a class attribute, so that nothing
is stored on instances.

How to use it, for a body of any kind (a mixin with a ``forward``)::

    cls = subclass(body, origin_of(type(module)) or type(module), "eager")
    set_class(module, cls)  # of hook_chains
    set_class(module, origin_of(type(module)))  # unpatches it

The body finds its law in ``self.rounding`` and upstream's method in ``super().forward``. It must
return upstream's value when it is called as upstream calls it, since patching and unpatching go
through states in which the modules around it are upstream's.
"""

import copyreg
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

from . import block_registry
from .torch_private import traced_like

_MADE = "__ditnorm_made__"
_classes: "weakref.WeakSet[type]" = weakref.WeakSet()
_lock = threading.RLock()  # making a class runs __init_subclass__ of users' own classes


class Generated(type):
    """The class of generated classes.

    Pickle writes how they are made in place of where they are found. So pickles load in a process
    that has never patched anything, also those of models with users' own classes in ``__main__`` or
    inside other classes.
    """


class _Made(dict[tuple[type, str], type]):
    """The classes made of one origin: (body, rounding) -> class. It hangs on the origin and lives
    as long; nothing else keeps them.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _Made, ()  # libraries that pickle the origin by value don't need what was made of it


def subclass(body: type, origin: type, rounding: str) -> type:
    """The class ``origin`` with the methods of ``body`` in front; the same arguments give the same
    class object, in every thread.
    """
    with _lock:
        made = vars(origin).get(_MADE)
        if made is None:
            made = _Made()
            type.__setattr__(origin, _MADE, made)
        generated: type | None = made.get((body, rounding))
        if generated is None:
            generated = _make(body, origin, rounding)
            block_registry.register(generated, origin)
            made[body, rounding] = generated
    return generated


def origin_of(cls: type) -> type | None:
    """The upstream class that a generated class stands in for; None for any other class, also for
    one derived from a generated one.
    """
    origin: type | None = vars(cls).get("origin") if isinstance(cls, Generated) else None
    return origin


def instances() -> list[Any]:
    """All objects of generated classes, and of classes derived from those.

    A process with PyTorch has some hundred thousand objects, and a look at each from Python takes
    half a second. Asking the collector who refers to a class takes a tenth of that.
    """
    with _lock:
        classes = set(_classes)
    remaining = list(classes)
    while remaining:
        derived: set[type] = set(remaining.pop().__subclasses__()) - classes
        classes |= derived
        remaining += derived
    return [o for o in gc.get_referrers(*classes) if type(o) in classes] if classes else []


def _make(body: type, origin: type, rounding: str) -> type:
    attributes: dict[str, Any] = {"origin": origin, "rounding": rounding, "__module__": __name__, **traced_like(origin)}
    metaclass = Generated if issubclass(Generated, type(origin)) else _joined(type(origin))
    generated = metaclass(origin.__name__, (body, origin), attributes)
    _classes.add(generated)
    return generated


def _joined(metaclass: type) -> Callable[..., type]:
    """:class:`Generated` for an origin that has a metaclass of its own, as ``abc.ABC`` has."""
    joined = type("Generated", (Generated, metaclass), {})
    copyreg.pickle(joined, _reduce)
    return joined


def _reduce(cls: type) -> str | tuple[Any, ...]:
    if origin_of(cls) is None:  # derived from a generated class by somebody else: found by its name, as classes are
        return cls.__qualname__
    body, origin = cls.__bases__
    return subclass, (body, origin, vars(cls)["rounding"])


copyreg.pickle(Generated, _reduce)
