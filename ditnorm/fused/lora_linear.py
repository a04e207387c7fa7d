"""PEFT's LoRA around a linear layer, without the pass over its result that multiplies by 1, and
without keeping what a norm can make again.

The scaling is ``lora_alpha / r``, which training scripts set to 1. The product with it is a pass
over memory forward and another one backward, for each of a block's adapted layers.
"""

from types import FunctionType
from typing import Any

from torch import Tensor

from ..ops.made_again import made_again
from ..swapping.originals import defined_in
from .module import FusedModule


class LoraLinear(FusedModule):
    """peft's ``lora.Linear``: x [..., in_features] -> [..., out_features].

    x may be what a quantised ``base_layer`` takes, wherever PEFT's own layer may be given it.
    """

    fingerprints = {"forward": frozenset({"99c1d544a85f"}), "_check_forward_args": frozenset({"427e34d544e3"})}  # 0.18.0 to 0.21.2

    optional = True
    demanded = announced = False

    @classmethod
    def knows(cls, upstream: type) -> bool:
        """Whether ``upstream`` has PEFT's forward and what that asks for: a class derived from
        PEFT's may choose other adapters.
        """
        return super().knows(upstream) and all(_is_pefts(getattr(upstream, name, None)) for name in _ASKED)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self._disable_adapters or self.merged_adapters or self.lora_variant or not self.as_made():
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        modules, active = self._modules, self._active_adapter
        down, up, dropouts = modules["lora_A"]._modules, modules["lora_B"]._modules, modules["lora_dropout"]._modules
        result: Tensor = modules["base_layer"](x)
        dtype = result.dtype
        for name in (active,) if isinstance(active, str) else active:
            first = down.get(name)
            if first is None:
                continue
            if x.dtype is not first.weight.dtype:
                x = self._cast_input_dtype(x, first.weight.dtype)
            dropped, scaling = dropouts[name](x), self.scaling[name]
            read = made_again(dropped, first)
            added = up[name](first(dropped) if read is None else read.read_by(first, dropped))
            result = result + (added if type(scaling) in _NUMBERS and scaling == 1 else added * scaling)
        return result if result.dtype is dtype else result.to(dtype)


_NUMBERS = (int, float)  # to compare a tensor, the host would wait for the GPU
_ASKED = ("active_adapter", "active_adapters", "disable_adapters", "merged")


def _is_pefts(asked: Any) -> bool:
    """Whether a property is PEFT's own."""
    function = asked.fget if isinstance(asked, property) else None
    return isinstance(function, FunctionType) and defined_in(function, "peft")
