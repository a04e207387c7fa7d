"""What the rows of a table depend on beside the embedding: weights, the modules around them,
adapters. Notices that any of it changed.
"""

from collections.abc import Sequence
from operator import attrgetter, is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from .modulating import Precomputed

_SAMPLES = 8  # bytes of a weight that are looked at: each is a wait for memory


class Watch:
    """The state of ``modules`` when rows were made. What is compared in every pass is kept flat, a
    list for each fact, so that the comparing is done by C: there are hundreds of weights, and the
    device may wait.
    """

    def __init__(self, modules: Sequence[Precomputed]) -> None:
        self.modules = [item.module for item in modules]
        self.changes = [module.modulation_changes for module in self.modules]
        places = [(m, key, part) for m in self.modules for key, part in zip(m.modulation_parts, m.modulation_modules(), strict=True)]
        self.parts = Links([(module._modules, key, part) for module, key, part in places])
        self.inside = [module for part in self.parts.values for module in part.modules()]
        self.types: list[Any] = [*map(type, self.inside)]
        self.methods = [(cls, cls.forward) for cls in dict.fromkeys(self.types)]
        self.forwards = Links([(module.__dict__, "forward", module.__dict__.get("forward")) for module in self.inside])
        hooks = [hooks for module in self.inside for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.hooks = [(hooks, list(hooks)) for hooks in hooks if hooks]
        self.without_hooks = [hooks for hooks in hooks if not hooks]
        self.states = [(part, state) for part in self.parts.values if (state := _state(part)) or part._modules]
        stateful = {id(part) for part, _ in self.states}
        self.without_children = [part._modules for part in self.parts.values if id(part) not in stateful]
        held = [held for module in self.inside for held in (module._parameters, module._buffers, module.__dict__)]
        self.weights = Links([(held, name, t) for held in held for name, t in held.items() if isinstance(t, Tensor)])
        self.counted = [t for t in self.weights.values if not t.is_inference()]
        self.seen = [*map(_seen, self.counted)]
        self.addresses = [*map(Tensor.data_ptr, self.weights.values)]
        self.quantised = [(t, attrgetter(*t.__tensor_flatten__()[0])) for t in self.counted if hasattr(t, "__tensor_flatten__")]
        self.parts_seen = self._parts_seen()
        self.probes = [probe for p in self.weights.values if (probe := _probe(p)) is not None]
        self.bits = [*map(_bytes, self.probes)]
        self.dropouts = [module for module in self.inside if isinstance(module, nn.Dropout | nn.AlphaDropout)]

    def unchanged(self) -> bool:
        return (
            [*map(_changes, self.modules)] == self.changes
            and self.parts.unchanged()
            and [*map(type, self.inside)] == self.types
            and all(cls.forward is forward for cls, forward in self.methods)
            and self.forwards.unchanged()
            and not any(self.without_hooks)
            and all(list(hooks) == before for hooks, before in self.hooks)
            and not any(self.without_children)
            and all(_state(part) == state for part, state in self.states)
            and self.weights.unchanged()
            and [*map(_seen, self.counted)] == self.seen
            and [*map(Tensor.data_ptr, self.weights.values)] == self.addresses
            and self._parts_seen() == self.parts_seen
            and [*map(_bytes, self.probes)] == self.bits
        )

    def is_random(self) -> bool:
        """Whether something is dropped, anew in each call."""
        return any(module.training and module.p > 0 for module in self.dropouts)

    def _parts_seen(self) -> list[int | None]:
        """The versions of what quantised weights are made of, which may move to another device."""
        found = [parts if isinstance(parts := get(t), tuple) else (parts,) for t, get in self.quantised]
        return [_version(part) for parts in found for part in parts]


class Links:
    """Which value stood at each key of each dict; None where there was none."""

    def __init__(self, links: Sequence[tuple[dict[str, Any], str, Any]]) -> None:
        self.dicts = [link[0] for link in links]
        self.keys = [link[1] for link in links]
        self.values = [link[2] for link in links]

    def unchanged(self) -> bool:
        return all(map(is_, map(dict.get, self.dicts, self.keys), self.values))


_changes, _seen, _bytes = attrgetter("modulation_changes"), attrgetter("_version", "dtype"), methodcaller("tobytes")


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


def _probe(p: Tensor) -> Any:
    """A view of some low bytes of a tensor in host memory, as an array."""
    if p.device.type != "cpu" or type(p) not in (nn.Parameter, Tensor) or not p.is_contiguous() or p.nbytes < 4:
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
        tuple((name, _scale(value)) for name, value in sorted(scaling.items())) if isinstance(scaling, dict) else None,
    )


def _scale(value: Any) -> Any:
    """The scale of an adapter, which PEFT writes anew where it is a tensor."""
    return (id(value), _version(value), value) if isinstance(value, Tensor) else value  # equal identities first
