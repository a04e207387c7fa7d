"""Bodies that are looked for in all of a model: blocks, and norms and embeddings that also occur
outside of blocks.
"""

import warnings
from typing import Any, ClassVar

from torch import nn

from ..swapping.generated import origin_of
from .activation import FusedSwiGLU
from .bfl_linear import QUANTIZED_LINEARS
from .feed_forward import FusedFeedForward
from .gelu import FusedGELU
from .lora_linear import LoraLinear
from .module import FusedModule


class FusedUnit(FusedModule):
    """A body whose modules are looked for in all of a model, and swapped or refused with everything
    that they hold.
    """

    family: ClassVar[str]
    """The models it belongs to, as users call them."""
    names: ClassVar[frozenset[str]] = frozenset()
    """Names of the upstream classes it was written for; a class of this name with another
    fingerprint is reported, not touched.
    """
    holders: ClassVar[frozenset[str]] = frozenset()
    """Where only some models can take what the body returns: the fingerprints of their ``forward``.
    All blocks of such a model must have a body, too.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name != "__class__":  # after which it may be upstream's module
            self._announce(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As that of ``nn.Module``, which ``register_module`` calls, too."""
        super().add_module(name, module)  # type: ignore[misc]
        self._announce(name, module)

    def _announce(self, name: str, value: Any) -> None:
        """Warns where somebody replaces one of the norms by a module that takes no modulation.
        Calls run upstream's forward from then on.
        """
        layers = dict(self._modulated).get(name)
        if layers is None or (isinstance(value, layers) and origin_of(type(value)) is not None):
            return
        warnings.warn(
            f"ditnorm: one {type(self).__name__} isn't fused any more: its {name} was replaced by {type(value).__name__}; patching again "
            "fuses it where it can",
            UserWarning,
            stacklevel=3,
        )


class FusedBlock(FusedUnit):
    """A transformer block. A new model is a module of :mod:`ditnorm.models` with such bodies."""

    anywhere: ClassVar[tuple[type[FusedModule], ...]] = (
        FusedGELU,
        FusedSwiGLU,
        *QUANTIZED_LINEARS,
        LoraLinear,
        FusedFeedForward,
    )
