"""Linear layers in PEFT's LoRA: what is in one is called, and what it makes of the results is
written here, since PEFT's own way there takes as long as the kernels, and multiplies by 1.
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..swapping.fingerprint import fingerprint
from ..swapping.swapped import untouched

_PEFT = "peft.tuners.lora.layer"
_FINGERPRINTS = {  # 0.21.2
    "forward": frozenset({"99c1d544a85f"}),
    "_check_forward_args": frozenset({"427e34d544e3"}),
    "_cast_input_dtype": frozenset({"4681df2a45bf"}),
}

_is_compiling = torch.compiler.is_compiling


def adapted(layer: Any, x: Any) -> Tensor:
    """``layer(x)`` of a linear layer that may be in an adapter: [..., D] -> [..., out features].

    The layer itself, the adapter's matrices and its dropout are called as modules, in PEFT's order.
    """
    cls: Any = type(layer)
    if cls is nn.Linear or cls.__module__ != _PEFT or _is_compiling() or not _known(cls, cls.forward):
        return layer(x)
    state = layer.__dict__
    modules, adapter = state["_modules"], state["_active_adapter"]
    if type(adapter) is list and len(adapter) == 1:
        adapter = adapter[0]
    first = modules["lora_A"]._modules.get(adapter) if type(adapter) is str else None
    if (
        type(first) is not nn.Linear
        or first.weight.dtype is not x.dtype
        or adapter in state["lora_variant"]  # DoRA and its like
        or state["merged_adapters"]
        or state["_disable_adapters"]
        or not untouched(layer)
    ):
        return layer(x)
    dropout, scaling = modules["lora_dropout"]._modules[adapter], state["scaling"][adapter]
    base = modules["base_layer"](x)
    if type(dropout) is not nn.Identity or not untouched(dropout):
        x = dropout(x)
    added = modules["lora_B"]._modules[adapter](first(x))
    result = base + (added if scaling == 1 else added * scaling)
    return result if result.dtype is base.dtype else result.to(base.dtype)


@functools.cache
def _known(cls: Any, forward: Any) -> bool:
    """Whether a class of PEFT's is the one that :func:`adapted` was written for, with this
    ``forward``.
    """
    if cls is not getattr(sys.modules.get(_PEFT), "Linear", None):
        return False
    return all(fingerprint(getattr(cls, name, None)) in accepted for name, accepted in _FINGERPRINTS.items())
