"""Brings back what :mod:`ditnorm.patching.modulation` took off the device."""

import logging
from collections.abc import Mapping

import torch
from torch import nn

from ..fused.modulation import ModulationSequential
from ..fused.modulation_table import ModulationTable
from ..swapping.hook_chains import set_class
from .units import upstream_of

_log = logging.getLogger("ditnorm")


def restore(models: Mapping[str, nn.Module]) -> None:
    """Undoes it in ``models`` and in the models inside them."""
    for name, model in models.items():
        for inner in model.modules():
            embedding = next((m for m in inner.children() if "modulations" in m.__dict__), None)
            if embedding is not None:
                _restore(name, inner, embedding)


def tables(model: nn.Module) -> list[ModulationTable]:
    """Of a model and of the models inside it."""
    return [module.__dict__["modulations"] for module in model.modules() if "modulations" in module.__dict__]


def _restore(name: str, model: nn.Module, embedding: nn.Module) -> None:
    table: ModulationTable = embedding.__dict__["modulations"]
    ours = {id(p) for _, holder, _ in table.holders for p in holder.modulation_weights()}
    device = next((p.device for p in model.parameters() if id(p) not in ours and p.device.type != "meta"), torch.device("cpu"))
    set_class(embedding, upstream_of(type(embedding)))
    del embedding.__dict__["modulations"]
    for _, holder, _ in table.holders:
        for p in holder.modulation_weights():
            if p.device.type == "cpu":
                p.data = p.data.clone() if device.type == "cpu" and p.data.is_pinned() else p.data.to(device)
        for attribute in ("modulation_table", "modulation_changes"):
            holder.__dict__.pop(attribute, None)
        if issubclass(type(holder), ModulationSequential):
            set_class(holder, upstream_of(type(holder)))
    _log.info("%s: %d modulations restored on %s", name, len(table.holders), device)
