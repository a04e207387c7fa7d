"""What is found in a model by itself: blocks, and parts that also occur outside of blocks."""

import warnings
from typing import Any, ClassVar, cast

from torch import nn

from ..layers import ScaleResidualIdentity
from ..swapping.generated import origin_of
from ..swapping.hook_chains import set_class
from .feed_forward import FusedFeedForward
from .gelu import FusedGELU
from .module import FusedModule
from .quantized_linear import QuantizedLinear


class FusedUnit(FusedModule):
    """A body whose modules are looked for in all of a model, and swapped or refused with everything that they hold."""

    family: ClassVar[str]
    """The models it belongs to, as users call them."""
    names: ClassVar[frozenset[str]] = frozenset()
    """Names of the upstream classes it was written for; a class of this name with another fingerprint is reported, not touched."""
    holders: ClassVar[frozenset[str]] = frozenset()
    """Where what it returns suits only some models: fingerprints of their ``forward``. Their blocks must all have a body."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Gives a module back to upstream's ``forward`` when somebody replaces one of its norms by a module that takes no modulation."""
        super().__setattr__(name, value)
        upstream = origin_of(type(self))
        if upstream is None or name not in self.sites or issubclass(self.sites[name], FusedModule) or self._takes(name, value):
            return
        set_class(cast(nn.Module, self), upstream)
        warnings.warn(
            f"ditnorm: one {upstream.__name__} isn't fused any more: its {name} was replaced by {type(value).__name__}; patching again "
            "fuses it where it can",
            UserWarning,
            stacklevel=2,
        )

    @classmethod
    def _takes(cls, site: str, value: Any) -> bool:
        """Whether ``value``, put where the norm of ``site`` was, is a layer that takes the same modulation."""
        unmodulated = (ScaleResidualIdentity,) if site in cls.unmodulated else ()
        return origin_of(type(value)) is not None and isinstance(value, (cls.sites[site], *unmodulated))


class FusedBlock(FusedUnit):
    """A transformer block. A new model is one file in :mod:`ditnorm.models` with such bodies."""

    anywhere = (FusedGELU, QuantizedLinear, FusedFeedForward)
