"""What the rows of a table depend on beside the embedding: weights, the modules around them,
adapters. Notices that any of it changed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 8  # bytes of a weight that are looked at: each is a wait for memory


class Watch:
    """The state of ``holders`` when rows were made. What is compared in every pass is kept flat,
    and by identity.
    """

    def __init__(self, holders: Sequence[tuple[str, Any, bool]]) -> None:
        self.changes = [(holder, holder.modulation_changes) for _, holder, _ in holders]
        self.parts: list[tuple[Any, ...]] = []
        self.weights: list[tuple[Any, ...]] = []
        for _, holder, _ in holders:
            for key, part in zip(holder.modulation_parts, holder.modulation_modules(), strict=True):
                hooks = part._forward_hooks, part._forward_pre_hooks
                self.parts.append((part, holder._modules, key, part.__dict__.get("forward"), *map(tuple, hooks), _state(part)))
                for module in part.modules():
                    for name, p in module._parameters.items():
                        if p is not None:
                            probe = _probe(p)
                            bits = None if probe is None else probe.tobytes()
                            self.weights.append((module._parameters, name, p, p._version, p.dtype, p.data_ptr(), probe, bits))

    def unchanged(self) -> bool:
        if any(holder.modulation_changes != changes for holder, changes in self.changes):
            return False
        for part, siblings, key, forward, hooks, pre_hooks, state in self.parts:
            if siblings.get(key) is not part or part.__dict__.get("forward") is not forward:
                return False
            if tuple(part._forward_hooks) != hooks or tuple(part._forward_pre_hooks) != pre_hooks:
                return False
            if (part._modules or state) and _state(part) != state:
                return False
        for parameters, name, p, version, dtype, address, probe, bits in self.weights:
            if parameters.get(name) is not p or p._version != version or p.dtype is not dtype or p.data_ptr() != address:
                return False
            if probe is not None and probe.tobytes() != bits:
                return False
        return True


def _probe(p: Tensor) -> Any:
    """A view of some low bytes of a tensor in host memory, as an array."""
    if p.device.type != "cpu" or type(p) is not nn.Parameter or not p.is_contiguous() or p.nbytes < 4:
        return None
    array = p.detach().view(-1).view(torch.uint8).numpy()
    return array[:: max(4, len(array) // _SAMPLES // 4 * 4)]


def _state(part: nn.Module) -> list[Any]:
    """The modules inside a module and the state of its adapters."""
    return [(id(module), _adapters(module)) for module in part.modules() if module is not part or hasattr(module, "active_adapters")]


def _adapters(module: nn.Module) -> Any:
    """The state of a PEFT layer that its output depends on."""
    if not hasattr(module, "active_adapters"):
        return None
    state: Any = module
    scaling = getattr(state, "scaling", {})
    return (
        tuple(state.active_adapters),
        bool(getattr(state, "disable_adapters", False)),
        tuple(getattr(state, "merged_adapters", ())),
        tuple(sorted(scaling.items())) if isinstance(scaling, dict) else None,
    )
