"""What a fused body states about the upstream class whose ``forward`` it replaces."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..swapping.fingerprint import fingerprint
from ..swapping.generated import origin_of
from ..swapping.originals import full_name
from ..swapping.swapped import Swapped
from ..swapping.torch_private import asked_once, traced_as
from .activation_sites import Activation
from .norms import dtype_of, layer_for, layers_at, norm_call, shape_of
from .sites import FusedCall, Site


@dataclass(frozen=True)
class Part:
    """A module that is swapped together with the one whose body names it, and the body or layer
    that goes in front of it.
    """

    path: str
    module: nn.Module
    body: type | None
    reason: str | None = None
    """Why there is no ``body``, where that is None."""


class FusedModule(Swapped):
    """A ``forward`` that computes what the upstream one does, with ops of this package.

    A body is a plain mixin: :func:`ditnorm.swapping.generated.subclass` puts it in front of an
    upstream class, and modules change to the resulting class in place. It has upstream's parameter
    names and return value, keeps no state, and calls every sub-module as a module (hooks of
    offloading, LoRA and quantisation sit there).

    A body describes itself in :meth:`parts`, :meth:`calls` and :meth:`activations`, which by
    default follow from the attributes below. Patching, verification and the report ask these.
    """

    fingerprints: ClassVar[Mapping[str, frozenset[str]]] = {}
    """Upstream's ``forward`` and each method of the class that the body inlines -> the accepted
    fingerprints.
    """
    functions: ClassVar[Mapping[str, frozenset[str]]] = {}
    """Functions of upstream's module that the body inlines -> the accepted fingerprints."""
    sites: ClassVar[Mapping[str, type]] = {}
    """Path of a sub-module -> what it must become: a layer of :mod:`ditnorm.layers` for a norm, or
    a body.
    """
    unmodulated: ClassVar[frozenset[str]] = frozenset()
    """The sites without scale and shift."""
    anywhere: ClassVar[tuple[type["FusedModule"], ...]] = ()
    """Bodies of sub-modules that are swapped wherever they are found."""
    residuals: ClassVar[int] = 0
    """Calls of ``scale_residual`` in one forward, without those of its parts."""
    table: ClassVar[str | None] = None
    """The Parameter whose rows are added to the modulation in float32, if there is one."""
    written_for: ClassVar[frozenset[str]] = frozenset()
    """The upstream classes that such a body (one of another's ``anywhere``) is for. A class that
    derives from one of them, or a changed version, is reported as unfused.
    """
    optional: ClassVar[bool] = False
    """Whether a module without this part is fused all the same."""
    reported_as: ClassVar[str | None] = None
    """What of an optional part runs unfused where it can't be swapped, in words for the report.
    None: no op of ours is missing there, and nobody is told.
    """
    demanded: ClassVar[bool] = True
    """Whether ``strict`` patching fails where such an optional part can't be swapped."""
    announced: ClassVar[bool] = True
    """Whether patching warns where such a part can't be swapped: not where it is PyTorch's op
    either way, which only the report says.
    """
    upstreams: ClassVar[Mapping[str, str]] = {}
    """What a fused body leaves to upstream, in words for the report -> why."""
    unfused_by_hooks: ClassVar[bool] = False
    """Whether the module runs unfused, or as upstream's, where a hook watches it."""

    rounding: str
    """The law; set on the generated class."""
    _inlined: ClassVar[tuple[tuple[dict[str, Any] | None, str, Any], ...]] = ()
    """What the body inlines, as it was when upstream's class was last looked at: methods, and
    functions with the globals that hold them.
    """
    _modulated: ClassVar[tuple[tuple[str, tuple[type, ...]], ...]] = ()
    """The sites of norms in the module itself, and the layers that can be called there; set with
    the one before.
    """

    if TYPE_CHECKING:
        _modules: dict[str, Any]  # nn.Module's

        def __getattr__(self, name: str) -> Any:
            """The sub-modules and Parameters of the upstream class."""

    @classmethod
    def knows(cls, upstream: type) -> bool:
        """Whether the body computes what instances of ``upstream`` do."""
        return matches(cls, upstream)

    @classmethod
    def applies_to(cls, module: nn.Module) -> bool:
        """Whether ``module`` is one that the body is looked for in."""
        upstream = upstream_of(type(module))
        return cls.knows(upstream) or any(full_name(base) in cls.written_for for base in upstream.__mro__)

    @classmethod
    def _look(cls) -> bool:
        if not super()._look() or cls._unknown_function(cls.origin) is not None:
            return False
        methods = ((None, name, getattr(cls.origin, name)) for name in cls.fingerprints if name != "forward")
        namespace = cls.origin.forward.__globals__
        cls._inlined = (*methods, *((namespace, name, namespace[name]) for name in cls.functions))
        norms = ((path, expected) for path, expected in cls.sites.items() if not issubclass(expected, FusedModule))
        cls._modulated = tuple((path, layers_at(expected, path not in cls.unmodulated)) for path, expected in norms)
        return True

    @asked_once
    def intact_now(self) -> bool:
        """:meth:`intact` of this class, as Dynamo asks it."""
        return FusedModule.intact(self)

    def traced_intact(self) -> bool:
        """:meth:`intact`, as Dynamo traces it. Dynamo doesn't guard on methods of upstream's
        classes, and it does on functions that these call: so only those are looked at.
        """
        return self.intact_now() and (not self.functions or self._inlines())

    @traced_as(traced_intact)
    def intact(self) -> bool:
        """Whether the body still computes what upstream's class does, and all its norms take
        modulation. If not, upstream's forward is to run.

        Others replace methods and modules in ways that nothing announces, so each call asks.
        """
        cls = type(self)
        if not (cls.origin.forward is cls.known_forward or cls._look()):
            return False
        if cls._inlined and not self._inlines() and not (cls._look() and self._inlines()):
            return False
        modules = self._modules
        for path, layers in cls._modulated:
            norm = modules.get(path)
            fused = isinstance(norm, layers) and type(norm).origin is not None  # type: ignore[attr-defined]
            if not fused and path in cls.sites_in(self):
                return False
        return True

    def _inlines(self) -> bool:
        """Whether what the body inlines is what it was."""
        for namespace, name, function in self._inlined:
            found = getattr(self, name) if namespace is None else namespace.get(name)
            if getattr(found, "__func__", found) is not function:
                return False
        return True

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        """Why this instance of a matching class can't be fused, or None. Its parts are looked at on
        their own.
        """
        name = cls._unknown_function(upstream_of(type(module)))
        return None if name is None else f"this version of {name} is unknown"

    @classmethod
    def unknown(cls, upstream: type) -> str | None:
        """Why the body doesn't know ``upstream``, in words."""
        found = ", ".join(f"{name} {fingerprint(getattr(upstream, name))}" for name in cls.fingerprints if hasattr(upstream, name))
        return unknown_version(upstream, found)

    @classmethod
    def _unknown_function(cls, upstream: Any) -> str | None:
        found = {name: upstream.forward.__globals__.get(name) for name in cls.functions}
        return next((name for name, function in found.items() if fingerprint(function) not in cls.functions[name]), None)

    @classmethod
    def sites_in(cls, module: Any) -> Mapping[str, type]:
        """The sites of ``module``: all of ``sites``, unless instances differ."""
        return cls.sites

    @classmethod
    def parts(cls, module: nn.Module) -> Iterator[Part]:
        """The modules that are swapped together with ``module``, without the parts of those."""
        for path, expected in cls.sites_in(module).items():
            child = getattr(module, path, None)
            if not isinstance(child, nn.Module):
                yield Part(path, module, None, f"it is a {type(child).__name__}")
            elif issubclass(expected, FusedModule):
                yield Part(path, child, expected)
            else:
                yield Part(path, child, *layer_for(expected, child, upstream_of(type(child)), path not in cls.unmodulated))
        for body in cls.anywhere:
            yield from (Part(path, m, body) for path, m in module.named_modules() if body.applies_to(m))

    @classmethod
    def calls(cls, module: nn.Module, dtype: torch.dtype) -> Iterator[FusedCall]:
        """The fused calls of one forward on a stream of ``dtype``, without those of the parts that
        have a body of their own.
        """
        table = None if cls.table is None else dtype_of(getattr(module, cls.table))
        for part in cls.parts(module):
            if part.body is not None and not issubclass(part.body, FusedModule):
                yield norm_call(part.body, part.module, cls.width(module), dtype, table, part.path not in cls.unmodulated)
        for _ in range(cls.residuals):
            yield Site("scale_residual", cls.width(module), dtype, table=table)

    @classmethod
    def activations(cls, module: Any) -> Iterator[Activation]:
        """The activations between its linear layers, as they are called now, without those of the
        parts that have a body of their own. ``module`` may be unfused yet.
        """
        return iter(())

    @classmethod
    def width(cls, module: nn.Module) -> int:
        """The width of the stream, which is that of the first norm."""
        for path, expected in cls.sites_in(module).items():
            child: Any = module.get_submodule(path)
            if issubclass(expected, FusedModule) and expected.sites:
                return expected.width(child)
            shape = shape_of(child)
            if shape is not None:
                return shape[-1]
        raise TypeError(f"{cls.__name__} has no norm")


def unknown_version(upstream: type, fingerprints: str) -> str:
    """The message that ditnorm doesn't know this version of ``upstream``, with its
    ``fingerprints``.
    """
    return f"{full_name(upstream)} is not a version that ditnorm knows (fingerprint: {fingerprints})"


def upstream_of(cls: type) -> type:
    """The upstream class that ``cls`` is or was made from by this package."""
    origins = (origin_of(base) for base in cls.__mro__)
    return next((origin for origin in origins if origin is not None), cls)


def matches(body: type[Any], cls: type) -> bool:
    """Whether ``body`` computes what ``cls`` does, by fingerprint. Parameter names are compared
    first: reading source is slow.

    A body may have one parameter more, ``law``: how what it returns is to be quantised.
    """
    ours, theirs = _parameters(body.own_forward), _parameters(getattr(cls, "forward", None))
    if ours is None or tuple(name for name in ours if name != "law") != theirs:
        return False
    return all(fingerprint(getattr(cls, name, None)) in accepted for name, accepted in body.fingerprints.items())


def _parameters(function: Any) -> tuple[str, ...] | None:
    code = getattr(function, "__code__", None)
    return None if code is None else code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
