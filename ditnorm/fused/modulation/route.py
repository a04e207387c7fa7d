"""The way of row numbers through a model, from the embedding to the modules that take them."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...swapping.hook_chains import group_offloading, untraceable
from .streaming import GROUP_OFFLOADED


class Route:
    """The modules from a model down to those that take row numbers. Anybody who doesn't know of row
    numbers and comes between is noticed.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        """``names``: of the modules that take row numbers, in the model."""
        self.model, self.names = model, names
        self._traced: dict[int, Any] = {}
        self._path: list[tuple[str, dict[str, Any], str, nn.Module]] = []

    def trace(self) -> str | None:
        """Notes the modules as they are; the name of one that isn't there, if any."""
        paths = [name.split(".") for name in self.names]
        for name in dict.fromkeys(".".join(path[:n]) for path in paths for n in range(1, len(path) + 1)):
            try:
                self._path.append((name, *_link(self.model, name)))
            except (AttributeError, KeyError):
                return name
        return None

    def lost(self) -> str | None:
        """Who would be given row numbers now and doesn't know of them, in words; None if nobody."""
        if not self._path and (missing := self.trace()) is not None:
            return f"{missing} was replaced"
        for name, siblings, key, module in self._path:
            if siblings.get(key) is not module and getattr(siblings.get(key), "_orig_mod", None) is not module:
                return f"{name} was replaced"
            if "_diffusers_hook" in module.__dict__ and group_offloading(module) is not None:
                return GROUP_OFFLOADED
            forward = module.__dict__.get("forward")
            if forward is not None and self._traced.get(id(module)) is not forward:
                if (reason := untraceable(module)) is not None:
                    return f"{name}: {reason}"
                self._traced[id(module)] = forward
        return None


def _link(model: nn.Module, name: str) -> tuple[dict[str, Any], str, nn.Module]:
    """The dict that holds the module ``name`` of ``model``, its key there, and the module."""
    parent, _, key = name.rpartition(".")
    siblings: dict[str, Any] = model.get_submodule(parent)._modules
    return siblings, key, siblings[key]
