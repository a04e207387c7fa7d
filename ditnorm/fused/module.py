"""What a fused body states about the upstream class whose ``forward`` it replaces."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import nn

from ..swapping.fingerprint import fingerprint
from ..swapping.generated import origin_of
from ..swapping.hook_chains import set_class

FP32_LAYER_NORM = "918561380066"
"""``FP32LayerNorm.forward`` of diffusers 0.37.0 to 0.42.1."""


class FusedBlock:
    """A ``forward`` that computes what the upstream one does, with the norm sites fused.

    A body is a plain mixin: :func:`ditnorm.swapping.generated.subclass` puts it in front of an upstream class, and modules change to the
    resulting class in place. It has upstream's parameter names and return value, keeps no state, and calls every sub-module as a module
    (hooks of offloading, LoRA and quantisation sit there). A new model is one file in this package with such bodies.
    """

    family: ClassVar[str]
    """The models it belongs to, as users call them."""
    names: ClassVar[frozenset[str]]
    """Names of the upstream classes it was written for; a class of this name with another fingerprint is reported, not touched."""
    fingerprints: ClassVar[Mapping[str, frozenset[str]]]
    """Upstream's ``forward`` and each method of the class that the body inlines -> the accepted fingerprints."""
    sites: ClassVar[Mapping[str, type]]
    """Path of a sub-module -> what it must become: a layer of :mod:`ditnorm.layers` for a norm, a body for an ``AdaLayerNorm*``."""
    unmodulated: ClassVar[frozenset[str]] = frozenset()
    """The sites without scale and shift."""
    table: ClassVar[str | None] = None
    """The Parameter whose rows are added to the modulation in float32, if there is one."""
    block: ClassVar[bool] = True
    """False for a part that also occurs outside of blocks."""
    holders: ClassVar[frozenset[str]] = frozenset()
    """Where what it returns suits only some models: fingerprints of their ``forward``. Their blocks must all have a body."""
    site_count: ClassVar[int]
    """Fused calls of one forward, without those of the bodies among ``sites``."""

    rounding: str
    """The law; set on the generated class."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The sub-modules and Parameters of the upstream class."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Gives a module back to upstream's ``forward`` when somebody replaces one of its norms by a module that takes no modulation."""
        super().__setattr__(name, value)
        upstream = origin_of(type(self))
        if upstream is None or name not in self.sites or issubclass(self.sites[name], FusedBlock) or origin_of(type(value)) is not None:
            return
        set_class(cast(nn.Module, self), upstream)
        warnings.warn(
            f"ditnorm: a {upstream.__name__} isn't fused any more: its {name} was replaced by a {type(value).__name__}; patching again "
            "fuses it where it can",
            UserWarning,
            stacklevel=2,
        )

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        """Why this instance of a matching class can't be fused, or None. The classes of its sites are checked where they are swapped."""
        for path in cls.sites:
            site = module.get_submodule(path)
            norm = origin_of(type(site)) or type(site)
            if norm.__name__ == "FP32LayerNorm" and fingerprint(norm.forward) != FP32_LAYER_NORM:  # type: ignore[attr-defined]
                return f"{path}: this version of FP32LayerNorm is unknown"
            if len(getattr(site, "normalized_shape", (1,))) != 1:
                return f"{path}: it norms over more than the last dim"
        return None


def matches(body: type[Any], cls: type) -> bool:
    """Whether ``body`` computes what ``cls`` does, by fingerprint. Parameter names are compared first: reading source is slow."""
    if _parameters(getattr(cls, "forward", None)) != _parameters(body.__dict__["forward"]):
        return False
    return all(fingerprint(getattr(cls, name, None)) in accepted for name, accepted in body.fingerprints.items())


def _parameters(function: Any) -> tuple[str, ...] | None:
    code = getattr(function, "__code__", None)
    return None if code is None else code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
